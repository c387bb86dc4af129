"""The size of changes in an adapter file that are not updates of linear layers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jcrosslora.adapter.factors import update_norm
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.plain import pattern_name, read_embedding_factors
from jcrosslora.adapter.names import TensorName, by_module
from jcrosslora.adapter.patterns import module_rank, module_scale
from jcrosslora.errors import JCrossLoRAError


def change_energy(file: AdapterFile, kind: str, tensors: Sequence[TensorName]) -> float | None:
    """Compute the squared Frobenius norm of a change that does not move.

    Args:
        file: the adapter.
        kind: a key of `ignored.CHANGES`.
        tensors: of this kind.

    Returns:
        The norm; None if it is not known: a tensor that replaces one of the base can only be compared with it if the
        base is given.
    """
    try:
        return _ENERGIES[kind](file, tensors) if kind in _ENERGIES else None
    # The figure is informative: a damaged tensor that does not move is no reason to refuse the adapter.
    except (JCrossLoRAError, ArithmeticError, KeyError, TypeError, ValueError):
        return None


def _embedding(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    return sum(update_norm(read_embedding_factors(file, group)) ** 2 for group in by_module(tensors))


def _lora_bias(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    total = 0.0
    for tensor in tensors:
        name = pattern_name(file.config, tensor.module)
        scale = module_scale(file.config, name, module_rank(file.config, name))
        total += _squared(scale * file.read(tensor.key, axes=1).astype(np.float64))
    return total


def _replaced(file: AdapterFile, tensors: Sequence[TensorName]) -> float | None:
    """Whole tensors and biases, against those of the base."""
    if file.base is None:
        return None
    total = 0.0
    for tensor in tensors:
        new = file.read(tensor.key, axes=len(file.file.entries[tensor.key].shape))
        old = file.base.tensor(f"{tensor.module}.{'bias' if tensor.kind == 'bias' else 'weight'}")
        total += _squared(new.astype(np.float64) - np.asarray(old).astype(np.float64))
    return total


def _squared(change: np.ndarray) -> float:
    return float(np.sum(change**2))


_ENERGIES: Mapping[str, Callable[[AdapterFile, Sequence[TensorName]], float | None]] = {
    "embedding": _embedding,
    "lora_bias": _lora_bias,
    "bias": _replaced,
    "full": _replaced,
}
