"""Select the method that `auto` stands for, by comparing the weights and files of a pair of bases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.quantised.registry import settings_of as quantisation_of
from jcrosslora.errors import CheckpointError
from jcrosslora.lineage.structure import Structure, count_parts
from jcrosslora.lineage.structure_search import find_structure
from jcrosslora.lineage.tensor_comparison import TensorComparison, compare_modules
from jcrosslora.lineage.weight_similarity import WeightSimilarity, compare_weights
from jcrosslora.lineage.wording import change_words

# For unlike bases: where both can be run on text, and where they cannot.
ACTIVATION_METHOD, WEIGHT_METHOD = "distill", "cross-lora"
# For near copies: those that differ by rounding at most, and those that were trained further.
COPY_METHOD, TRAINED_METHOD = "copy", "interpolated-copy"
# For bases of which one is made of the other's parts.
PARTS_METHOD = "select"
# For compressed targets: the same, then fitted to what the adapted source predicts.
MENDED = {COPY_METHOD: "distilled-copy", PARTS_METHOD: "distilled-select"}
_TRAINED = frozenset({"further trained", "LoRA-merged"})
# Relative distance of the weights from which a quantised target is fitted. Rounding to the nearest level moves weights
# of about normal distribution by 0.08 to 0.11 with 4 bits (blocks of 32 to 128), by 0.04 with 5, by 0.03 with fp8 and
# by 0.01 with 8. What a copy loses there: docs/compressed-bases.md.
_COMPRESSED = 0.06
_UNMENDED = "the update is carried over as it is, and what the compression costs remains"
_STRAY = 1.25  # ratio of distances up to which parts in another place are taken for strays of the match


@dataclass(frozen=True)
class Choice:
    """The method that `auto` stands for on a pair of bases.

    Attributes:
        method: the method's name in the registry.
        reason: one sentence without a full stop, for the report.
        found: the first part of the reason: how the two bases compare.
    """

    method: str
    reason: str
    found: str


def choose_method(source: BaseModel, target: BaseModel, found: tuple[Structure | None, str] | None = None) -> Choice:
    """Choose the method for a pair of bases from their weights and files; neither is run.

    Near copies, in which every attention and MLP has a counterpart, get `copy`, or `interpolated-copy` if one was
    clearly trained further. Bases of which one is made of the other's parts (pruned, permuted, with repeated layers)
    get `select`. Where the target is compressed (quantised to about 4 bits or fewer, sparse, or without some of the
    source's parts), the update is then fitted as well (`distilled-copy`, `distilled-select`), if both bases can be run.
    Others get `distill` if the decoder supports both and both tokenizers can be read, and `cross-lora` if not.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        found: the result of `find_structure` on the pair, if it is already known.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    structure = (found or find_structure(source, target))[0]
    return choose_from(source, target, structure, lambda structure: compare_modules(source, target, structure))


def choose_from(
    source: BaseModel,
    target: BaseModel,
    structure: Structure | None,
    compare: Callable[[Structure], Sequence[TensorComparison]],
) -> Choice:
    """Choose the method as `choose_method` does, from what is already known of the bases.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        structure: from `find_structure`.
        compare: returns the result of `compare_modules`; called only if the choice depends on it.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    similarity = compare_weights(source, target)
    if structure is not None and not structure.in_place(source):
        by_parts = compare_weights(source, target, structure)
        parts = [part for part in count_parts(structure, source, target) if part.name != "tokens"]
        near = by_parts is not None and by_parts.near and all(part.nested for part in parts)
        if by_parts is not None and near and not _as_near(similarity, by_parts):
            made = f"one of the two bases is made of the other's parts ({_figures(by_parts)})"
            carried = ", so the update is carried over part by part"
            if any(part.used < part.source for part in parts):
                return _mended(source, target, PARTS_METHOD, f"{made}, and the target lacks some", carried)
            return _choice(PARTS_METHOD, made, carried)
    lacking = 0 if structure is None else structure.lacking
    if similarity is not None and similarity.near and not lacking:
        if structure is not None and _lacks_experts(structure, source, target):
            same = f"the two bases are nearly identical ({_figures(similarity)})"
            return _mended(source, target, COPY_METHOD, f"{same}, but the target lacks experts of the source")
        compared = [] if structure is None else compare(structure)
        return _choose_for_copies(source, target, similarity, compared)
    differ = "the modules of the two bases have different shapes"
    if similarity is not None:
        differ = f"the weights of the two bases differ ({_figures(similarity)})"
        differ += f"; attention, MLP or experts of {lacking} layers have no counterpart" if lacking else ""
    obstacle = why_not_run(source, target)
    if obstacle is None:
        rest = ", and both can be run on text, so an update is fitted to what they predict"
        return _choice(ACTIVATION_METHOD, differ, rest)
    rest = f", and not both can be run on text ({obstacle}), so only weights are compared"
    return _choice(WEIGHT_METHOD, differ, rest)


def without_fit(choice: Choice, reason: str) -> Choice:
    """Replace a method that runs bases with the adapter by one that looks at weights alone.

    Args:
        choice: for other adapters of the pair.
        reason: why no update can be fitted to the adapter, as the end of a sentence.
    """
    if choice.method == ACTIVATION_METHOD:
        # Theseus, which runs only the bases, lowered the target's scores on ARC-Easy (-0.72 and -0.38 of the lift,
        # README). cross-lora has no effect between unlike bases, and the report says so.
        return _choice(WEIGHT_METHOD, choice.found, f", but {reason}, so only weights are compared")
    for start, fitted in MENDED.items():
        if choice.method == fitted:
            return _choice(start, choice.found, f", but {reason}, so {_UNMENDED}")
    return choice


def why_not_run(*bases: BaseModel) -> str | None:
    """Return why a base cannot be run on text, because of its decoder or tokenizer; None if all can.

    Imports late: near copies need neither the decoder nor the tokenizers.
    """
    from jcrosslora.checkpoint.tokenizer import load_tokenizer
    from jcrosslora.decoder import settings_of

    try:
        for base in bases:
            settings_of(base)
            load_tokenizer(base)
    except CheckpointError as error:
        return str(error)
    return None


def _lacks_experts(structure: Structure, source: BaseModel, target: BaseModel) -> bool:
    return any(part.name == "experts" and part.used < part.source for part in count_parts(structure, source, target))


def _as_near(in_place: WeightSimilarity | None, by_parts: WeightSimilarity) -> bool:
    """Whether parts in the source's order explain the target as well: a pruned neuron may resemble another's most."""
    return in_place is not None and in_place.near and in_place.distance <= _STRAY * by_parts.distance


def _choose_for_copies(
    source: BaseModel, target: BaseModel, similarity: WeightSimilarity, compared: Sequence[TensorComparison]
) -> Choice:
    same, words = f"the two bases are nearly identical ({_figures(similarity)})", change_words(compared)
    trained = next((word for word in words if word in _TRAINED), None)
    # Quantisers such as GPTQ may round to another than the nearest level.
    stated = [bool(quantisation_of(base.config)) for base in (source, target)]
    by_quantiser = trained == "further trained" and "quantised" in words and any(stated)
    if "sparse" in words:
        return _mended(source, target, COPY_METHOD, f"{same}, but numbers of the target were set to zero")
    if trained is not None and not by_quantiser:
        same += f", but one is the other {trained}"
        return _choice(TRAINED_METHOD, same, ", so the update goes with part of the difference between the two bases")
    left = ", and its quantiser may have left what looks like further training" if by_quantiser else ""
    by_source = 2 * sum(item.difference.rounded == "source" for item in compared) > len(compared)
    by_source = by_source or stated == [True, False]
    if words and not by_source and similarity.distance >= _COMPRESSED:
        return _mended(source, target, COPY_METHOD, f"{same}, but the target is rounded coarsely{left}")
    return _choice(COPY_METHOD, same + left, ", so the update stays as it is")


def _mended(source: BaseModel, target: BaseModel, start: str, found: str, carried: str = "") -> Choice:
    """Choose the fit that follows a method on a compressed target, or the method alone if a base cannot be run."""
    obstacle = why_not_run(source, target)
    if obstacle is None:
        rest = f"{carried or ', so the update is carried over'} and then fitted to what the adapted source predicts"
        return _choice(MENDED[start], found, f"{rest} (--method {start} leaves out the fit, and takes seconds)")
    return _choice(start, found, f", but not both can be run on text ({obstacle}), so {_UNMENDED}")


def _choice(method: str, found: str, rest: str) -> Choice:
    return Choice(method, found + rest, found)


def _figures(similarity: WeightSimilarity) -> str:
    figures = f"cosine {similarity.cosine:.3f}, relative distance {similarity.distance:.3f}"
    return f"{figures} of the weights of {similarity.modules} sampled modules"
