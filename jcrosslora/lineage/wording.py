"""Describe the relation of two bases in words, from counted parts and compared tensors alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jcrosslora.checkpoint import ROLES
from jcrosslora.lineage.difference import FLOAT32_NOISE, Change, Difference
from jcrosslora.lineage.matching import MIN_MEAN_COSINE
from jcrosslora.lineage.structure import Part
from jcrosslora.lineage.tensor_comparison import TensorComparison

_LINEAR = {*ROLES, "experts"}


def structure_words(parts: Iterable[Part]) -> list[str]:
    """Return the words on the structure that apply: "pruned", "extended", "upscaled", "permuted"."""
    parts = tuple(parts)
    applies = {
        "pruned": any(part.used < part.source for part in parts),
        "extended": any(part.found < part.target for part in parts),
        "upscaled": any(part.repeated for part in parts),
        "permuted": any(_permuted(part) for part in parts),
    }
    return [word for word, true in applies.items() if true]


def change_words(compared: Sequence[TensorComparison]) -> list[str]:
    """Return the words on the weights that apply, see `BaseComparison`; none if all compared numbers are equal."""
    linear = [item.difference for item in compared if item.role in _LINEAR]
    others = [item.difference for item in compared if item.role not in _LINEAR and not _replaced(item)]
    every = [*linear, *others]
    low_rank = _any(linear, "low rank") and not _any(linear, "trained")
    trained = _any(linear, "trained") or (not low_rank and _any(others, "trained", "low rank"))
    words = ["sparse"] if 2 * sum(item.zeroed > 0 for item in linear) > len(linear) else []
    if low_rank:
        words.append("LoRA-merged")
    elif trained:
        words.append("further trained")
    elif _any(every, "trained or rounded"):
        words.append("further trained or quantised")
    if any(item.scale != 1 for item in every):
        words.append("scaled")
    rounded = [item for item in every if item.change == "rounded" and not item.only_scaled]
    mostly_quantised = 2 * sum(item.quantised for item in linear) > len(linear)
    if any(item.quantised for item in rounded) or ((low_rank or trained) and mostly_quantised):
        words.append("quantised")
    elif rounded:
        words.append("rounded")
    return words + [f"{item.role} replaced" for item in compared if _replaced(item)]


def structure_phrases(parts: Iterable[Part]) -> list[str]:
    """Describe which parts the target lacks, adds, repeats and reorders."""
    parts = tuple(parts)
    lacks = [f"{part.used:,} of {part.source:,} {part.name}" for part in parts if part.used < part.source]
    adds = [
        f"{part.target - part.found:,} of {part.target:,} {part.name}" for part in parts if part.found < part.target
    ]
    repeats = [f"{part.used:,} {part.name} to {part.found:,}" for part in parts if part.repeated]
    moved = [part.name for part in parts if _permuted(part)]
    phrases = []
    if lacks:
        phrases.append(f"the target has {', '.join(lacks)} of the source")
    if adds:
        phrases.append(f"{', '.join(adds)} of the target are not in the source")
    if repeats:
        phrases.append(f"the target repeats {', '.join(repeats)}")
    if moved:
        phrases.append(f"the order of {', '.join(moved)} differs")
    return phrases


def change_phrases(compared: Sequence[TensorComparison]) -> list[str]:
    """Describe how the weights changed, with figures."""
    writers: dict[Change, Callable[[list[TensorComparison]], str]] = {
        "low rank": _low_rank,
        "trained": _trained,
        "trained or rounded": _trained_or_rounded,
        "rounded": _rounded,
    }
    phrases = []
    replaced = [item for item in compared if _replaced(item)]
    for change, write in writers.items():
        items = [item for item in compared if item.difference.change == change and not item.difference.only_scaled]
        items = [item for item in items if item not in replaced]
        if items:
            phrases.append(f"{_tensors(items, compared)} {write(items)}")
    zeroed = [item for item in compared if item.difference.zeroed]
    if zeroed:
        phrases.insert(0, f"{_tensors(zeroed, compared)} {_zeroed(zeroed, compared)}")
    scaled = [item for item in compared if item.difference.scale != 1]
    if scaled:
        factors = sorted({f"{item.difference.scale:.4g}" for item in scaled}, key=float)
        span = factors[0] if len(factors) == 1 else f"{len(factors)} factors from {factors[0]} to {factors[-1]}"
        phrases.append(f"{_tensors(scaled, compared)} are multiplied by {span}")
    for item in replaced:
        phrases.append(f"the two have nothing in common in the {item.role} (cosine {item.difference.cosine:.4f})")
    return phrases or [f"all {len(compared)} tensors are equal in every sampled row"]


def _replaced(item: TensorComparison) -> bool:
    """Whether an embedding or a head is another one, and not that of the source after training."""
    return (
        item.role in ("embedding", "head")
        and item.difference.change in ("trained", "low rank")
        and abs(item.difference.cosine) < MIN_MEAN_COSINE
    )


def _permuted(part: Part) -> bool:
    return not part.in_order and not part.repeated


def _any(differences: Iterable[Difference], *changes: Change) -> bool:
    return any(item.change in changes for item in differences)


def _tensors(items: Sequence[TensorComparison], compared: Sequence[TensorComparison]) -> str:
    count = "all" if len(items) == len(compared) else f"{len(items)} of"
    others = sorted({item.role for item in items} - set(ROLES))
    only = f" ({', '.join(others)})" if others and all(item.role in others for item in items) else ""
    return f"{count} {len(compared)} tensors{only}"


def _zeroed(items: list[TensorComparison], compared: Sequence[TensorComparison]) -> str:
    shares = [item.difference.zeroed for item in items]
    others = all(item.difference.change == "equal" for item in compared)
    rest = ", and the others unchanged" if others else ""
    return f"have {_shares(min(shares), max(shares))} of their numbers set to zero{rest}"


def _low_rank(items: list[TensorComparison]) -> str:
    ranks: dict[str, list[int]] = {}
    for item in items:
        if item.difference.rank is not None:
            ranks.setdefault(item.role, []).append(item.difference.rank)
    spans = [f"{role} {_span(found)}" for role, found in ranks.items()]
    return f"differ by an update of low rank (of relative size {_distances(items)}; ranks: {', '.join(spans)})"


def _trained(items: list[TensorComparison]) -> str:
    cosine = np.mean([item.difference.cosine for item in items])
    return f"are trained further (relative distance {_distances(items)}, cosine {cosine:.4f})"


def _trained_or_rounded(items: list[TensorComparison]) -> str:
    explained = min(item.difference.explained for item in items)
    return (
        f"differ by about a step of quantisation (relative distance {_distances(items)}), but rounding to the nearest "
        f"level explains as few as {explained:.1%} of the numbers: they were trained further and quantised, or "
        "quantised in another way"
    )


def _rounded(items: list[TensorComparison]) -> str:
    exact = [item for item in items if item.difference.distance < FLOAT32_NOISE]
    if len(exact) == len(items):
        distance = max(item.difference.distance for item in exact)
        return f"differ by the last digits of float32 (relative distance {distance:.1e})"
    by_format: Counter[str] = Counter()
    for item in items:
        side, grids = item.difference.rounded, item.difference.grids
        name = f"levels of {grids[0]} and {grids[1]} agree" if side is None else f"{side} to {grids[side == 'target']}"
        by_format[name] += 1
    formats = ", ".join(f"{name} ({count})" for name, count in by_format.most_common())
    explained = min(item.difference.explained for item in items)
    hidden = max(item.difference.hidden for item in items)
    return (
        f"differ by rounding alone: {formats}; it explains at least {explained:.2%} of the numbers of each (relative "
        f"distance {_distances(items)}; changes below {hidden:.2%} would not show)"
    )


def _distances(items: list[TensorComparison]) -> str:
    sizes = [item.difference.distance for item in items]
    return _shares(min(sizes), max(sizes), 2)


def _shares(low: float, high: float, digits: int = 0) -> str:
    ends = f"{low:.{digits}%}", f"{high:.{digits}%}"
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _span(numbers: list[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
