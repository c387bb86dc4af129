"""What of an adapter file does not move, and how much of its whole change that is, where it can be known."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jcrosslora.adapter.kinds.opened import AdapterFile
from jcrosslora.adapter.kinds.plain import pattern_name
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.norms import update_norm
from jcrosslora.adapter.patterns import module_rank, module_scale
from jcrosslora.adapter.records import Adapter, LoRAFactors
from jcrosslora.adapter.token_updates import TokenUpdate
from jcrosslora.errors import AdapterError, JCrossLoRAError

SORTS = {
    "embedding": "LoRA of an embedding",
    "head": "an update of the output head",
    "tokens": "trained tokens (trainable_token_indices)",
    "bias": "trained biases",
    "lora_bias": "biases that were trained with LoRA's B (lora_bias)",
    "full": "whole tensors (modules_to_save)",
}


def sentence(sort: str, names: Sequence[str], share: float | None, why: str = "") -> str:
    """One sentence on what does not move.

    Args:
        sort: a key of `SORTS`.
        names: the modules.
        share: of the whole adapter's squared Frobenius norm, or None where it is not known.
        why: the reason, without a full stop.
    """
    return f"{described(sort, names, share)}{f': {why}' if why else ''}."


def described(sort: str, names: Sequence[str], share: float | None) -> str:
    """What a change is of and how large it is, for a sentence; arguments as for `sentence`."""
    part = "" if share is None else f" ({share:.1%} of the whole change's squared norm)"
    return f"{SORTS[sort]}, {_listed(names)}{part}"


def without_tokens(adapter: Adapter, why: str) -> Adapter:
    """The adapter without its changes of embedding and head, which are listed in `info.ignored` with the reason."""
    if not adapter.tokens:
        return adapter
    info = dataclasses.replace(adapter.info, ignored=adapter.info.ignored + token_sentences(adapter.tokens, why))
    return dataclasses.replace(adapter, tokens=(), info=info)


def token_sentences(tokens: Sequence[TokenUpdate], why: str) -> tuple[str, ...]:
    """One sentence on each change of embedding or head that does not move."""
    return tuple(sentence(update.sort, update.modules, update.share, why) for update in tokens)


def energy_of(file: AdapterFile, sort: str, tensors: Sequence[TensorName]) -> float | None:
    """Squared Frobenius norm of a change that does not move; None where it cannot be known.

    What replaces a weight of the base can only be compared with it where the base is given.
    """
    try:
        return _ENERGIES[sort](file, tensors) if sort in _ENERGIES else None
    # Nothing depends on the figure: a tensor that cannot be read is left out like those that can.
    except (JCrossLoRAError, ArithmeticError, KeyError, TypeError, ValueError):
        return None


def embedding_factors(file: AdapterFile, tensors: Sequence[TensorName]) -> LoRAFactors:
    """The LoRA of an embedding as an update of its V rows: a (K, D), b (V, K).

    Args:
        file: the adapter.
        tensors: `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K) of one embedding.

    Raises:
        AdapterError: one of them is damaged, or their ranks differ.
        KeyError: one of them is missing.
    """
    keys = {tensor.key[-1]: tensor.key for tensor in tensors}
    a, b = (file.read(keys[side]) for side in "AB")
    if a.shape[0] != b.shape[1]:
        msg = f"its factors have ranks {a.shape[0]} and {b.shape[1]}"
        raise AdapterError(msg)
    scale = module_scale(file.config, pattern_name(file.config, tensors[0].module), a.shape[0])
    return LoRAFactors(a=np.ascontiguousarray(b.T), b=np.ascontiguousarray(a.T), scale=scale)


def by_module(tensors: Sequence[TensorName]) -> list[list[TensorName]]:
    """The tensors of each module, in the order in which they first occur."""
    groups: dict[str, list[TensorName]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.module, []).append(tensor)
    return list(groups.values())


def _embedding(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    return sum(update_norm(embedding_factors(file, group)) ** 2 for group in by_module(tensors))


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


def _energy(change: np.ndarray) -> float:
    return float(np.sum(change**2))


_ENERGIES: Mapping[str, Callable[[AdapterFile, Sequence[TensorName]], float | None]] = {
    "embedding": _embedding,
    "lora_bias": _lora_bias,
    "bias": _replaced,
    "full": _replaced,
}


def _listed(names: Sequence[str], shown: int = 3) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
