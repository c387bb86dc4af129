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
_TRAINED = frozenset({"further trained", "LoRA-merged"})


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
    clearly trained further. Bases of which one is made of the
    other's parts (pruned, permuted, with repeated layers) get `select`. Others get `distill` if the decoder supports
    both and both tokenizers can be read, and `cross-lora` if not.

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
    if structure is not None and not structure.in_place(source):
        similarity = compare_weights(source, target, structure)
        nested = all(part.nested for part in count_parts(structure, source, target) if part.name != "tokens")
        if similarity is not None and similarity.near and nested:
            made = f"one of the two bases is made of the other's parts ({_figures(similarity)})"
            return _choice(PARTS_METHOD, made, ", so the update is carried over part by part")
    similarity = compare_weights(source, target)
    lacking = 0 if structure is None else structure.lacking
    if similarity is not None and similarity.near and not lacking:
        words = [] if structure is None else change_words(compare(structure))
        return _choose_for_copies(source, target, f"the two bases are nearly identical ({_figures(similarity)})", words)
    differ = "the modules of the two bases have different shapes"
    if similarity is not None:
        differ = f"the weights of the two bases differ ({_figures(similarity)})"
        differ += f"; attention or MLP of {lacking} layers have no counterpart" if lacking else ""
    obstacle = why_not_run(source, target)
    if obstacle is None:
        rest = ", and both can be run on text, so an update is fitted to what they predict"
        return _choice(ACTIVATION_METHOD, differ, rest)
    rest = f", and not both can be run on text ({obstacle}), so only weights are compared"
    return _choice(WEIGHT_METHOD, differ, rest)


def by_maps(choice: Choice) -> Choice:
    """Replace a method that runs bases with the adapter by one that compares weights.

    An aLoRA is inactive before its invocation tokens, so no base can be run with it on ordinary text.

    Args:
        choice: for other adapters of the pair.
    """
    if choice.method != ACTIVATION_METHOD:
        return choice
    # Theseus, which runs only the bases, lowered the target's scores on ARC-Easy (-0.72 and -0.38 of the lift, README).
    # cross-lora has no effect between unlike bases, and the report says so.
    rest = ", but no base can be run with an adapter that acts only after its invocation tokens, so only weights are "
    return _choice(WEIGHT_METHOD, choice.found, f"{rest}compared")


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


def _choose_for_copies(source: BaseModel, target: BaseModel, same: str, words: Sequence[str]) -> Choice:
    trained = next((word for word in words if word in _TRAINED), None)
    if trained is None:
        return _choice(COPY_METHOD, same, ", so the update stays as it is")
    # Quantisers such as GPTQ may round to another than the nearest level.
    stated = any(quantisation_of(base.config) for base in (source, target))
    if trained == "further trained" and "quantised" in words and stated:
        rest = ", and its quantiser may have left what looks like further training, so the update stays as it is"
        return _choice(COPY_METHOD, same, rest)
    same += f", but one is the other {trained}"
    return _choice(TRAINED_METHOD, same, ", so the update goes with part of the difference between the two bases")


def _choice(method: str, found: str, rest: str) -> Choice:
    return Choice(method, found + rest, found)


def _figures(similarity: WeightSimilarity) -> str:
    figures = f"cosine {similarity.cosine:.3f}, relative distance {similarity.distance:.3f}"
    return f"{figures} of the weights of {similarity.modules} sampled modules"
