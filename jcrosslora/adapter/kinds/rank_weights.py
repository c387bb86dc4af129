"""Kinds whose ranks have trained weights of their own: AdaLoRA and BeamLoRA.

AdaLoRA: dW = alpha / (n + 1e-5) B diag(E) A, with n the initial rank of training.

Source: AdaLoRA (arXiv 2303.10512), equation 3; peft 0.21, tuners/adalora/layer.py.

BeamLoRA: dW = s B diag(r softmax(g / tau)) A, with a gate g over the ranks.

The format is that of https://github.com/gccnlp/BeamLoRA: PEFT's with a `lora_gate` (1, r) for each module. The
temperature tau is set in its code and not in the file: 0.05, or 0.03 for learning rates below 1e-4 (its README).

Source: BeamLoRA (arXiv 2502.13604).
"""

import numpy as np

from jcrosslora.adapter.config import check_lora, check_targets, is_alpha, is_rank, shown
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds import config_tables
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Config, Kind, Update, each_module
from jcrosslora.adapter.kinds.plain import read_factors, read_pair
from jcrosslora.errors import AdapterError

_INITIAL_RANK, _ALPHA = 12, 8  # peft's defaults of init_r and lora_alpha


def _check(config: Config, where: str) -> None:
    if not is_rank(config.get("init_r", _INITIAL_RANK)):
        msg = f"{where}: init_r is {shown(config, 'init_r')}, a whole number of 1 or more was wanted: correct the file"
        raise AdapterError(msg)
    # Zero or less means the rank here.
    alpha = config.get("lora_alpha", _ALPHA)
    if alpha != 0 and not is_alpha(alpha):
        msg = f"{where}: lora_alpha is {shown(config, 'lora_alpha')}, a number was wanted: correct the file"
        raise AdapterError(msg)
    check_targets(config, where)


def _read_adalora(file: AdapterFile, module: str) -> Update | None:
    keys = file.modules[module]
    if "A" in keys and 0 in file.file.entries[keys["A"]].shape:
        return None  # all its ranks were pruned
    (a, b), gains = read_pair(file, module), file.part(module, "lora_E").astype(np.float64)
    if not a.shape[0] == b.shape[1] == gains.size:
        msg = (
            f"{file.path}: module {module!r} has A of shape {list(a.shape)}, B of shape {list(b.shape)} and E of shape "
        )
        msg += f"{list(gains.shape)}: one rank was wanted; the file is damaged"
        raise AdapterError(msg)
    alpha = file.config.get("lora_alpha", _ALPHA)
    scale = (alpha if alpha > 0 else a.shape[0]) / (file.config.get("init_r", _INITIAL_RANK) + 1e-5)
    scaled = gains.reshape(-1, 1) * a.astype(np.float64)
    return Update(LoRAFactors(a=scaled.astype(np.float32), b=b, scale=scale))


ADALORA = Kind(
    name="AdaLoRA", peft_type="ADALORA", formula="s B diag(E) A", read=each_module(_read_adalora), check=_check
)


_TEMPERATURE = 0.05


def _read_beam(file: AdapterFile, module: str) -> Update:
    factors = read_factors(file, module)
    gate = file.part(module, "lora_gate").astype(np.float64)
    if gate.size != factors.rank:
        msg = f"{file.path}: module {module!r} has a gate of shape {list(gate.shape)} for rank {factors.rank}"
        msg += ": the file is damaged"
        raise AdapterError(msg)
    gains = np.exp((gate - gate.max()) / _TEMPERATURE).ravel()
    gains *= factors.rank / gains.sum()
    # The most important ranks first.
    order = np.argsort(-gains, kind="stable")
    a = (gains[:, None] * np.asarray(factors.a).astype(np.float64))[order]
    return Update(LoRAFactors(a=a.astype(np.float32), b=np.asarray(factors.b)[:, order], scale=factors.scale))


BEAM = Kind(
    name="BeamLoRA",
    peft_type="LORA",
    formula="s B diag(r softmax(g / tau)) A",
    read=each_module(_read_beam),
    check=check_lora,
    applies=lambda config, parts: config_tables.VARIANTS[config_tables.BEAM](config) or "lora_gate" in parts,
    remark=f"its temperature is not in the file, its repository's default of {_TEMPERATURE} was taken",
)
