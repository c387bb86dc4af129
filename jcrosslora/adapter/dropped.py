"""What of an adapter file does not move, and how much of its whole change that is, where it can be known."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jcrosslora.adapter.kinds.opened import AdapterFile
from jcrosslora.adapter.kinds.plain import pattern_name
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.norms import update_norm
from jcrosslora.adapter.patterns import module_rank, module_scale
from jcrosslora.adapter.records import LoRAFactors
from jcrosslora.errors import JCrossLoRAError

SENTENCES = {
    "embedding": "LoRA of an embedding is not moved: {names}{share}.",
    "head": "an update of the output head is not moved: {names}{share}.",
    "tokens": "trained tokens do not map to another tokenizer and are not moved: {names}{share}.",
    "bias": "trained biases are not moved: {names}{share}.",
    "lora_bias": "biases that were trained with LoRA's B (lora_bias) are not moved: {names}{share}.",
    "full": "whole tensors (modules_to_save) are not moved: {names}{share}.",
}


def sentence(sort: str, names: Sequence[str], energy: float | None, total: float) -> str:
    """One sentence on what does not move.

    Args:
        sort: a key of `SENTENCES`.
        names: the modules.
        energy: squared Frobenius norm of the change, or None where it is not known.
        total: the same of the whole adapter, what moves and what does not.
    """
    share = "" if energy is None or total == 0 else f" ({energy / total:.1%} of the whole change's squared norm)"
    return SENTENCES[sort].format(names=_listed(names), share=share)


def energy_of(file: AdapterFile, sort: str, tensors: Sequence[TensorName]) -> float | None:
    """Squared Frobenius norm of a change that does not move; None where it cannot be known.

    What replaces a weight of the base can only be compared with it where the base is given.
    """
    try:
        return _ENERGIES[sort](file, tensors)
    # Nothing depends on the figure: a tensor that cannot be read is left out like those that can.
    except (JCrossLoRAError, ArithmeticError, KeyError, TypeError, ValueError):
        return None


def _embedding(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    keys = {(tensor.module, tensor.key[-1]): tensor.key for tensor in tensors}
    total = 0.0
    for module in dict.fromkeys(tensor.module for tensor in tensors):
        a, b = (file.read(keys[module, side]) for side in "AB")
        scale = module_scale(file.config, pattern_name(file.config, module), a.shape[0])
        total += update_norm(LoRAFactors(a=a, b=b, scale=scale)) ** 2
    return total


def _lora_bias(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    total = 0.0
    for tensor in tensors:
        name = pattern_name(file.config, tensor.module)
        scale = module_scale(file.config, name, module_rank(file.config, name))
        total += _energy(scale * file.read(tensor.key, axes=1).astype(np.float64))
    return total


def _replaced(file: AdapterFile, tensors: Sequence[TensorName]) -> float | None:
    """Whole tensors and biases, against those of the base."""
    if file.base is None:
        return None
    total = 0.0
    for tensor in tensors:
        new = file.read(tensor.key, axes=len(file.file.entries[tensor.key].shape))
        old = file.base.tensor(f"{tensor.module}.{'bias' if tensor.kind == 'bias' else 'weight'}")
        total += _energy(new.astype(np.float64) - np.asarray(old).astype(np.float64))
    return total


def _tokens(file: AdapterFile, tensors: Sequence[TensorName]) -> float | None:
    """Rows of the embedding, against those of the base."""
    indices = file.config.get("trainable_token_indices")
    if file.base is None or indices is None:
        return None
    total = 0.0
    for tensor in tensors:
        ids = indices[tensor.module.rpartition(".")[2]] if isinstance(indices, Mapping) else indices
        old = file.base.rows(file.base.embedding_name, np.array(ids))
        total += _energy(file.read(tensor.key).astype(np.float64) - old)
    return total


def _energy(change: np.ndarray) -> float:
    return float(np.sum(change**2))


_ENERGIES: Mapping[str, Callable[[AdapterFile, Sequence[TensorName]], float | None]] = {
    "embedding": _embedding,
    "lora_bias": _lora_bias,
    "bias": _replaced,
    "full": _replaced,
    "tokens": _tokens,
}


def _listed(names: Sequence[str], shown: int = 3) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
