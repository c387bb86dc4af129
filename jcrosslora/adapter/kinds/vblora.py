"""VB-LoRA: dW = B A, composed of vectors of length v that mix a few vectors of one bank.

Source: VB-LoRA (arXiv 2405.15179); peft 0.21, tuners/vblora/layer.py.
"""

import numpy as np

from jcrosslora.adapter.config import check_rank, check_targets, is_rank, shown
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import INTEGERS, AdapterFile
from jcrosslora.adapter.kinds.kind import Config, Kind, Update, each_module
from jcrosslora.errors import AdapterError

_TOP = 2  # peft's default of topk


def _check(config: Config, where: str) -> None:
    check_rank(config, where)
    check_targets(config, where)
    if not is_rank(config.get("topk", _TOP)):
        msg = f"{where}: topk is {shown(config, 'topk')}, a whole number of 1 or more was wanted: correct the file"
        raise AdapterError(msg)


def _read(file: AdapterFile, module: str) -> Update:
    bank = file.common("vblora_vector_bank").astype(np.float64)
    # (r, I / v, v) and (O / v, r, v)
    a, b = (_mixed(file, module, f"vblora_logits_{side}", bank) for side in "AB")
    if a.shape[0] != b.shape[1]:
        msg = f"{file.path}: module {module!r} has logits of rank {a.shape[0]} for A and {b.shape[1]} for B"
        msg += ": the file is damaged"
        raise AdapterError(msg)
    rank = a.shape[0]
    return Update(
        LoRAFactors(
            a=a.reshape(rank, -1).astype(np.float32),
            b=np.ascontiguousarray(b.swapaxes(1, 2).reshape(-1, rank), np.float32),
        )
    )


def _mixed(file: AdapterFile, module: str, part: str, bank: np.ndarray) -> np.ndarray:
    """Mix the vectors that the logits of each place choose, (.., .., v)."""
    keys = file.modules[module]
    indices_key = f"{part}_topk_indices"
    if indices_key in keys:
        indices = file.read(keys[indices_key], axes=3, dtypes=INTEGERS).astype(np.int64)
        first = file.part(module, f"{part}_topk_weights", axes=3).astype(np.float64) if indices.shape[2] > 1 else None
        # The last weight of each place is not stored: they sum to one.
        weights = (
            np.ones(indices.shape) if first is None else np.append(first, 1 - first.sum(-1, keepdims=True), axis=2)
        )
    else:
        logits = file.part(module, part, axes=3).astype(np.float64)
        top = min(int(file.config.get("topk", _TOP)), logits.shape[2])
        indices = np.argsort(-logits, axis=2, kind="stable")[:, :, :top]
        chosen = np.take_along_axis(logits, indices, axis=2)
        weights = np.exp(chosen - chosen[:, :, :1])
        weights /= weights.sum(-1, keepdims=True)
    if indices.shape != weights.shape or indices.min() < 0 or indices.max() >= bank.shape[0]:
        msg = f"{file.path}: {part} of module {module!r} does not fit the bank of {bank.shape[0]} vectors"
        msg += ": the file is damaged"
        raise AdapterError(msg)
    file.check_size(module, indices.size * bank.shape[1])
    return np.einsum("ijk,ijkv->ijv", weights, bank[indices])


VBLORA = Kind(
    name="VB-LoRA",
    peft_type="VBLORA",
    formula="B A of mixtures of a bank's vectors",
    read=each_module(_read),
    check=_check,
)
