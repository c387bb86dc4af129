"""Describe how two bases are related in sentences, from the flags and figures of `relation`."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jcrosslora.checkpoint import ROLES
from jcrosslora.relation.difference import FLOAT32_NOISE, Change
from jcrosslora.relation.relation import PairFinding, PairKind, RelationFlag, TensorComparison
from jcrosslora.relation.structure import Part

_SHOWN_NAMES = 3  # tensors named in one sentence
_COPY, _PARTS = "the two bases are nearly identical{}", "one of the two bases is made of the other's parts{}"
OTHER_GAINS = (
    "the gains of norms differ as if channels had been rescaled, and the weights that read them do not show the scales"
)
_FOUND = {
    PairKind.SAME: "source and target are one and the same base (equal digests), and nothing has to be moved",
    PairKind.COPY: _COPY,
    PairKind.TRAINED_COPY: f"{_COPY}, but one is the other {RelationFlag.TRAINED}",
    PairKind.MERGED_COPY: f"{_COPY}, but one is the other {RelationFlag.LORA_MERGED}",
    PairKind.OTHER_GAINS: f"{_COPY}, but {OTHER_GAINS}",
    PairKind.SPARSE_COPY: f"{_COPY}, but numbers of the target were set to zero",
    PairKind.COARSE_COPY: f"{_COPY}, but the target is rounded coarsely",
    PairKind.COARSE_SOURCE: f"{_COPY}, but the source is rounded coarsely",
    PairKind.FEWER_EXPERTS: f"{_COPY}, but the target lacks experts of the source",
    PairKind.PARTS: _PARTS,
    PairKind.FEWER_PARTS: f"{_PARTS}, and the target lacks some",
    PairKind.NONE: "the weights of the two bases differ{}",
}
_FIT = "and then fitted to what the adapted source predicts (--method {} leaves out the fit, and takes seconds)"
# What becomes of the update by each method that `auto` stands for; and where no update can be fitted.
_CONSEQUENCES = {
    "distill": ", and both can be run on text, so an update is fitted to what they predict",
    "copy": ", so the update is copied",
    "interpolated-copy": ", so the update goes with part of the difference between the two bases",
    "compensated-copy": ", so the update is carried over together with what the rounding does on text",
    "select": ", so the update is carried over part by part",
    "distilled-copy": f", so the update is carried over {_FIT.format('copy')}",
    "distilled-select": f", so the update is carried over part by part {_FIT.format('select')}",
}
_SCALES = "scales of channels as AWQ and SmoothQuant leave them"
_REMAINS = "the update is copied, and what the compression costs remains"
_WITHOUT_FIT = {"cross-lora": "only weights are compared", "copy": _REMAINS, "select": _REMAINS}


def finding_phrase(finding: PairFinding) -> str:
    """Say how the two bases compare, as the first part of the reason for a method."""
    weights = finding.similarity
    if weights is None:
        return "the modules of the two bases have different shapes"
    figures = f"cosine {weights.cosine:.3f}, relative distance {weights.distance:.3f}"
    figures = f"{figures} of the weights of {weights.modules} sampled modules"
    if finding.experts > weights.distance:
        figures += f", relative distance {finding.experts:.3f} of the sampled experts"
    figures = f" ({figures})"
    if finding.rescaled:
        figures = f", apart from {_SCALES}, which the update gets as well{figures}"
    phrase = _FOUND[finding.pair_kind].format(figures)
    if finding.by_quantiser:
        phrase += ", and its quantiser may have left what looks like further training"
    if finding.unmatched:
        phrase += f"; attention, MLP or experts of {finding.unmatched} layers have no counterpart"
    return phrase


def choice_reason(found: str, method: str, hindrance: str | None = None) -> str:
    """Return the reason for a method: the relation, why a fit is impossible (if it is), and what the method does."""
    return found + _CONSEQUENCES[method] if hindrance is None else f"{found}, {hindrance}, so {_WITHOUT_FIT[method]}"


def unequal_phrase(names: Sequence[str]) -> str:
    """Name tensors that differ although all sampled rows are equal."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    listed = ", ".join(names[:_SHOWN_NAMES]) + more
    return f"all sampled rows are equal, but {len(names)} tensors differ elsewhere: {listed}"


def structure_phrases(parts: Iterable[Part]) -> list[str]:
    """Describe which parts the target lacks, adds, repeats and reorders."""
    parts = tuple(parts)
    lacks = [f"{part.used:,} of {part.source:,} {part.name}" for part in parts if part.used < part.source]
    adds = [
        f"{part.target - part.found:,} of {part.target:,} {part.name}" for part in parts if part.found < part.target
    ]
    repeats = [f"{part.used:,} {part.name} to {part.found:,}" for part in parts if part.repeated]
    moved = [part.name for part in parts if not (part.in_order or part.repeated)]
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
        Change.LOW_RANK: _low_rank,
        Change.TRAINED: _trained,
        Change.TRAINED_OR_ROUNDED: _trained_or_rounded,
        Change.ROUNDED: _rounded,
    }
    phrases = []
    others = [item for item in compared if item.replaced]
    for change, write in writers.items():
        items = [item for item in compared if item.difference.change is change and not item.difference.only_scaled]
        items = [item for item in items if item not in others]
        if items:
            phrases.append(f"{_tensors(items, compared)} {write(items)}")
    rescaled = [item for item in compared if item.rescaled]
    if rescaled:
        phrases.insert(0, f"{_tensors(rescaled, compared)} have {_SCALES}, and are compared without these")
    zeroed = [item for item in compared if item.difference.zeroed]
    if zeroed:
        phrases.insert(0, f"{_tensors(zeroed, compared)} {_zeroed(zeroed, compared)}")
    scaled = [item for item in compared if item.difference.scale != 1]
    if scaled:
        factors = sorted({f"{item.difference.scale:.4g}" for item in scaled}, key=float)
        span = factors[0] if len(factors) == 1 else f"{len(factors)} factors from {factors[0]} to {factors[-1]}"
        phrases.append(f"{_tensors(scaled, compared)} are multiplied by {span}")
    for item in others:
        phrases.append(f"the two have nothing in common in the {item.role} (cosine {item.difference.cosine:.4f})")
    return phrases or [f"all {len(compared)} tensors are equal in every sampled row"]


def _tensors(items: Sequence[TensorComparison], compared: Sequence[TensorComparison]) -> str:
    count = "all" if len(items) == len(compared) else f"{len(items)} of"
    others = sorted({item.role for item in items} - set(ROLES))
    only = f" ({', '.join(others)})" if others and all(item.role in others for item in items) else ""
    return f"{count} {len(compared)} tensors{only}"


def _zeroed(items: list[TensorComparison], compared: Sequence[TensorComparison]) -> str:
    shares = [item.difference.zeroed for item in items]
    others = all(item.difference.change is Change.EQUAL for item in compared)
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
