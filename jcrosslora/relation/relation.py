"""Describe how two bases are related, in flags and figures. `wording` makes sentences from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from jcrosslora.checkpoint import ROLES
from jcrosslora.relation.difference import Change
from jcrosslora.relation.matching import MIN_MEAN_COSINE
from jcrosslora.relation.structure import Part
from jcrosslora.relation.tensor_comparison import TensorComparison
from jcrosslora.relation.weight_similarity import WeightSimilarity


class Relation(StrEnum):
    """What a target base is to its source base. Several may hold at once; the most important one comes first."""

    UNRELATED = "unrelated"  # alone
    SAME = "same"
    PRUNED = "pruned"  # the target lacks parts of the source
    EXTENDED = "extended"  # it has parts that the source lacks
    UPSCALED = "upscaled"  # it repeats parts
    PERMUTED = "permuted"  # it has them in another order
    SPARSE = "sparse"  # numbers of its matrices were set to zero
    LORA_MERGED = "LoRA-merged"
    TRAINED = "further trained"
    TRAINED_OR_QUANTISED = "further trained or quantised"  # the two cannot be told apart
    SCALED = "scaled"
    QUANTISED = "quantised"  # to 8 bits or fewer
    ROUNDED = "rounded"  # to a narrower float format
    EMBEDDING_REPLACED = "embedding replaced"
    HEAD_REPLACED = "head replaced"
    OTHER_TOKENIZER = "other tokenizer"  # ids of one embedding stand for other tokens


class Likeness(Enum):
    """How alike two bases are, as far as the way of an update from one to the other depends on it."""

    COPY = auto()  # but for rounding
    TRAINED_COPY = auto()
    MERGED_COPY = auto()  # with a LoRA
    SPARSE_COPY = auto()
    COARSE_COPY = auto()  # rounded to about 4 bits or fewer
    FEWER_EXPERTS = auto()  # and otherwise a copy
    PARTS = auto()  # one base is made of the other's parts
    FEWER_PARTS = auto()  # and the target lacks some
    NONE = auto()


@dataclass(frozen=True)
class Finding:
    """What the choice of a method depends on.

    Attributes:
        similarity: of the weights that correspond; None if the modules have different shapes.
        by_quantiser: whether what looks like further training may come from a quantiser.
        unmatched: number of target layers whose attention, MLP or experts have no counterpart.
    """

    likeness: Likeness
    similarity: WeightSimilarity | None
    by_quantiser: bool = False
    unmatched: int = 0


_LINEAR = {*ROLES, "experts"}
_REPLACED = {"embedding": Relation.EMBEDDING_REPLACED, "head": Relation.HEAD_REPLACED}


def relation_of(parts: Sequence[Part], compared: Sequence[TensorComparison]) -> set[Relation]:
    """Return what holds of the structure and of the weights; nothing if all parts and all compared numbers agree."""
    linear = [item.difference for item in compared if item.role in _LINEAR]
    others = [item.difference for item in compared if item.role not in _LINEAR and not replaced(item)]
    every, changes, other_changes = [*linear, *others], {one.change for one in linear}, {one.change for one in others}
    low_rank = Change.LOW_RANK in changes and Change.TRAINED not in changes
    trained = Change.TRAINED in changes or (not low_rank and bool(other_changes & {Change.TRAINED, Change.LOW_RANK}))
    rounded = [one for one in every if one.change is Change.ROUNDED and not one.only_scaled]
    mostly_quantised = 2 * sum(one.quantised for one in linear) > len(linear)
    quantised = any(one.quantised for one in rounded) or ((low_rank or trained) and mostly_quantised)
    unsure = not (low_rank or trained) and Change.TRAINED_OR_ROUNDED in changes | other_changes
    applies = {
        Relation.PRUNED: any(part.used < part.source for part in parts),
        Relation.EXTENDED: any(part.found < part.target for part in parts),
        Relation.UPSCALED: any(part.repeated for part in parts),
        Relation.PERMUTED: not all(part.in_order or part.repeated for part in parts),
        Relation.SPARSE: 2 * sum(one.zeroed > 0 for one in linear) > len(linear),
        Relation.LORA_MERGED: low_rank,
        Relation.TRAINED: trained,
        Relation.TRAINED_OR_QUANTISED: unsure,
        Relation.SCALED: any(one.scale != 1 for one in every),
        Relation.QUANTISED: quantised,
        Relation.ROUNDED: rounded and not quantised,
    }
    found = {relation for relation, true in applies.items() if true}
    return found | {_REPLACED[item.role] for item in compared if replaced(item)}


def replaced(item: TensorComparison) -> bool:
    """Whether an embedding or a head is another one, and not that of the source after training."""
    far = abs(item.difference.cosine) < MIN_MEAN_COSINE
    return item.role in _REPLACED and item.difference.change in (Change.TRAINED, Change.LOW_RANK) and far
