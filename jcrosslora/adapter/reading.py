"""Read the updates of an opened adapter into memory, as low-rank factors, and measure what is not such an update."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jcrosslora.adapter.changes import HEAD, ExpertUpdate, ReplacedTensors, TokenUpdate, update_norm
from jcrosslora.adapter.experts import read_experts
from jcrosslora.adapter.kinds.kind import AdapterFile, Kind, Update
from jcrosslora.adapter.kinds.plain import PLAIN, invocation_of, read_embedding_factors
from jcrosslora.adapter.names import TensorName, by_module
from jcrosslora.adapter.opening import OpenedAdapter
from jcrosslora.adapter.patterns import file_scale
from jcrosslora.adapter.records import Adapter, ignored_sentence
from jcrosslora.adapter.replaced_files import read_replaced
from jcrosslora.adapter.token_files import read_tokens
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError, JCrossLoRAError

# A smaller share of the update's energy is rounding.
_ROUNDING = 1e-6


def read_adapter(opened: OpenedAdapter, *, replaced: bool = False) -> Adapter:
    """Read all updates; see `load_adapter`.

    Raises:
        AdapterError: damaged, empty, or of a kind that the base is needed for.
    """
    kind, file = opened.kind, opened.file
    updates = opened.by_text_name((name, update.truncated(file.rank)) for name, update in kind.read(file))
    head = _head(opened, updates)
    linear = {name: update for name, update in updates.items() if name != HEAD}
    experts, why_no_experts = read_experts(file, file.extras.get("experts", ()))
    tokens, own, ignored = _other_changes(opened, linear, head, experts, why_no_experts, replaced=replaced)
    experts = _with_shares(experts, linear, tokens)
    held = [*linear, *experts, *([*tokens, *own] if replaced else ())]
    unused = [ignored_sentence(update.kind, update.modules, update.share) for update in tokens]
    opened.check_not_empty(held, [*ignored, *unused])
    read = [*linear.values(), *(Update(one.factors, one.lost) for one in tokens if one.factors is not None)]
    info = opened.info(
        ignored=(*opened.notes, *ignored),
        read_as=_read_as(kind, read),
        lost=_lost(read),
        rank_limit=file.rank,
        invocation=invocation_of(file.config) if kind.peft_type == "LORA" else None,
    )
    if file.base is not None:
        file.base.release()
    return Adapter({name: update.factors for name, update in linear.items()}, info, tokens, own, experts)


def _with_shares(
    experts: Sequence[ExpertUpdate], linear: Mapping[str, Update], tokens: Sequence[TokenUpdate]
) -> tuple[ExpertUpdate, ...]:
    """Fill in which share of the adapter each update of experts is."""
    total = math.fsum([*map(_energy, linear.values()), *(update.energy for update in (*tokens, *experts))])
    return tuple(dataclasses.replace(update, share=update.energy / total if total else None) for update in experts)


def _head(opened: OpenedAdapter, updates: Mapping[str, Update]) -> Update | None:
    """Read the update of the output head; None if there is none, or none that can be read."""
    file = opened.file
    if not file.others:
        return updates.get(HEAD)  # Of a kind whose file does not name its modules.
    try:
        found = list(opened.kind.read(dataclasses.replace(file, modules=file.others, others=file.modules)))
    except AdapterError:
        return None
    return found[0][1] if len(found) == 1 else None


def _other_changes(
    opened: OpenedAdapter,
    linear: Mapping[str, Update],
    head: Update | None,
    experts: Sequence[ExpertUpdate],
    why_no_experts: str,
    *,
    replaced: bool,
) -> tuple[tuple[TokenUpdate, ...], tuple[ReplacedTensors, ...], list[str]]:
    """Read changes of embedding and head, and replaced tensors if asked for; say in sentences what else there is."""
    file = opened.file
    tokens, read, reasons = read_tokens(opened.kind, file, head)
    left = _without(file.extras, read)
    own, read_own, reasons_own = read_replaced(opened.kind, file, left, linear) if replaced else ((), set(), {})
    kept = {
        kind: _change_energy(file, kind, [one for one in tensors if one.key in read_own])
        for kind, tensors in left.items()
    }
    left, reasons = _without(left, read_own), reasons | reasons_own | {"experts": why_no_experts}
    if experts:
        left.pop("experts")
    names = {kind: [tensor.module for tensor in tensors] for kind, tensors in left.items() if tensors}
    energies = {kind: _change_energy(file, kind, left[kind]) for kind in names}
    if (file.others or head is not None) and HEAD not in read:
        names["head"] = list(file.others) or [HEAD]
        energies["head"] = None if head is None else _energy(head)
    total = math.fsum(map(_energy, linear.values())) + math.fsum(update.energy + update.lost for update in tokens)
    total += math.fsum(update.energy for update in experts)
    total += math.fsum(energy or 0.0 for energy in (*energies.values(), *kept.values()))

    def share(energy: float | None) -> float | None:
        return None if energy is None or total == 0 else energy / total

    ignored = [
        ignored_sentence(kind, found, share(energies[kind]), reasons.get(kind, "")) for kind, found in names.items()
    ]
    moved = tuple(dataclasses.replace(update, share=share(update.energy + update.lost) or 0.0) for update in tokens)
    return moved, tuple(dataclasses.replace(group, share=share(kept[group.kind])) for group in own), ignored


def _without(groups: Mapping[str, Sequence[TensorName]], read: set[str]) -> dict[str, list[TensorName]]:
    return {kind: [tensor for tensor in tensors if tensor.key not in read] for kind, tensors in groups.items()}


def _energy(update: Update) -> float:
    return update_norm(update.factors) ** 2 + update.lost


def _lost(updates: Sequence[Update]) -> float:
    """Share of the update's energy that reading it lost, 0 if it is only rounding."""
    total, lost = math.fsum(map(_energy, updates)), math.fsum(update.lost for update in updates)
    return lost / total if lost > _ROUNDING * total else 0.0


def _read_as(kind: Kind, updates: Sequence[Update]) -> str | None:
    lost = _lost(updates)
    if kind is PLAIN and lost == 0:
        return None
    ranks = sorted({update.factors.rank for update in updates})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    how = f"at {rank}, which loses {lost:.1%} of the update's energy" if lost else f"exactly, at {rank}"
    return f"{kind.name} ({kind.formula}), read {how}{f'; {kind.remark}' if kind.remark else ''}"


def _change_energy(file: AdapterFile, kind: str, tensors: Sequence[TensorName]) -> float | None:
    """Compute the squared Frobenius norm of a change that does not move; `kind` is a key of `records.CHANGES`.

    None if it is not known: a tensor that replaces one of the base can only be compared with it if the base is given.
    """
    try:
        return _ENERGIES[kind](file, tensors) if kind in _ENERGIES else None
    # The figure is informative: a damaged tensor that does not move is no reason to refuse the adapter.
    except (JCrossLoRAError, ArithmeticError, KeyError, TypeError, ValueError):
        return None


def _embedding(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    return sum(update_norm(read_embedding_factors(file, group)) ** 2 for group in by_module(tensors))


def _lora_bias(file: AdapterFile, tensors: Sequence[TensorName]) -> float:
    scaled = (file_scale(file.config, one.module) * file.read(one.key, axes=1).astype(np.float64) for one in tensors)
    return sum(map(_squared, scaled), 0.0)


def _replaced(file: AdapterFile, tensors: Sequence[TensorName]) -> float | None:
    """Whole tensors and biases, against those of the base."""
    if file.base is None:
        return None
    total = 0.0
    for tensor in tensors:
        new = file.read(tensor.key, axes=len(file.weights.entries[tensor.key].shape))
        old = file.base.tensor(f"{text_module_name(tensor.module)}.{'bias' if tensor.kind == 'bias' else 'weight'}")
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
