"""Select the method for `auto` by comparing the weights and files of a pair of bases."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.checkpoint.quantised import settings_of as quantisation_of
from jcrosslora.errors import CheckpointError
from jcrosslora.relation.bases import Bases, compare_token_names, cosine_similarity, module_rows, modules_of
from jcrosslora.relation.channels import ChannelScales, has_other_gains
from jcrosslora.relation.difference import Change
from jcrosslora.relation.relation import (
    PairFinding,
    PairKind,
    RelationFlag,
    TensorComparison,
    WeightSimilarity,
    compare_modules,
    relation_of,
)
from jcrosslora.relation.structure import Structure, count_parts
from jcrosslora.relation.structure_search import find_structure
from jcrosslora.relation.wording import choice_reason, finding_phrase
from jcrosslora.utils.picking import evenly_spaced

# For different bases: if both can be run on text, and otherwise.
ACTIVATION_METHOD, WEIGHT_METHOD = "distill", "cross-lora"
# For near copies: if they differ by rounding at most, and if one was trained further.
COPY_METHOD, TRAINED_METHOD = "copy", "interpolated-copy"
# For a source that was rounded coarsely.
ROUNDED_METHOD = "compensated-copy"
# For bases where one is made of the other's parts.
PARTS_METHOD = "select"
# For compressed targets: the same, then fitted to what the adapted source predicts.
FITTED_VARIANT = {COPY_METHOD: "distilled-copy", PARTS_METHOD: "distilled-select"}
# Where there are answers to fit to.
_FITTED = FITTED_VARIANT | dict.fromkeys((TRAINED_METHOD, ROUNDED_METHOD), FITTED_VARIANT[COPY_METHOD])
# The method for bases that can both be run.
_SUITED = {
    PairKind.SAME: COPY_METHOD,
    PairKind.COPY: COPY_METHOD,
    PairKind.TRAINED_COPY: TRAINED_METHOD,
    PairKind.MERGED_COPY: TRAINED_METHOD,
    PairKind.OTHER_GAINS: COPY_METHOD,
    PairKind.SPARSE_COPY: FITTED_VARIANT[COPY_METHOD],
    PairKind.COARSE_COPY: FITTED_VARIANT[COPY_METHOD],
    PairKind.COARSE_SOURCE: ROUNDED_METHOD,
    PairKind.FEWER_EXPERTS: FITTED_VARIANT[COPY_METHOD],
    PairKind.PARTS: PARTS_METHOD,
    PairKind.FEWER_PARTS: FITTED_VARIANT[PARTS_METHOD],
    PairKind.NONE: ACTIVATION_METHOD,
}
# The methods that replace those which run bases with the adapter. Theseus, which runs only the bases, lowered the
# target's scores on ARC-Easy (-0.72 and -0.38 of the lift, README). cross-lora has no effect between unlike bases, and
# the report says so.
_WITHOUT_FIT = {ACTIVATION_METHOD: WEIGHT_METHOD, **{fitted: start for start, fitted in FITTED_VARIANT.items()}}
_WITHOUT_RUN = _WITHOUT_FIT | {ROUNDED_METHOD: COPY_METHOD}
# Relative distance of the weights from which a copy is not enough. Rounding to the nearest level moves weights of about
# normal distribution by 0.08 to 0.11 with 4 bits (blocks of 32 to 128), by 0.04 with 5, by 0.03 with fp8 and by 0.01
# with 8. What a copy loses to and from there: docs/compressed-bases.md.
_COMPRESSED = 0.06
_LAYERS, _ROWS = 4, 64  # sampled layers of each role, and rows of each module
_STRAY = 1.25  # ratio of distances up to which parts at another index are taken for strays of the match


@dataclass(frozen=True)
class MethodChoice:
    """The method that `auto` chooses for a pair of bases.

    Attributes:
        method: the method's name in the registry.
        reason: one sentence without a full stop, for the report.
        found: the first part of the reason: how the two bases compare.
    """

    method: str
    reason: str
    found: str


def choose_method(
    source: BaseModel,
    target: BaseModel,
    found: tuple[Structure | None, str] | None = None,
    compared: Sequence[TensorComparison] | None = None,
) -> MethodChoice:
    """Choose the method for a pair of bases from their weights and files; neither is run.

    Near copies, in which every attention and MLP has a counterpart, get `copy`, or `interpolated-copy` if one was
    clearly trained further and its norms have about the gains of the other's. Bases where one is made of the other's
    parts (pruned, permuted, with repeated layers) get `select`. If the target is compressed (quantised to about 4 bits
    or fewer, sparse, or without some of the source's parts), the update is then fitted as well (`distilled-copy`,
    `distilled-select`), if both bases can be run. If the source alone is quantised that coarsely, they get
    `compensated-copy`, if both can be run.
    Others get `distill` if the decoder supports both and both tokenizers can be read, and `cross-lora` if not.

    `found` and `compared` are the results of `find_structure` and `compare_modules`, if they are already known. Raises
    CheckpointError if a weight cannot be read, or holds NaN or infinity.
    """
    structure, _ = found or find_structure(source, target)
    finding, scales = _examine(Bases(source, target), structure, compared), structure and structure.scales
    finding = replace(finding, rescaled=scales is not None)
    if _SUITED[finding.pair_kind] == TRAINED_METHOD and has_other_gains(source, target, scales):
        finding = replace(finding, pair_kind=PairKind.OTHER_GAINS)
    method, phrase = _SUITED[finding.pair_kind], finding_phrase(finding)
    choice = MethodChoice(method, choice_reason(phrase, method), phrase)
    obstacle = why_not_run(source, target) if method in _WITHOUT_RUN else None
    joint = "and" if finding.pair_kind is PairKind.NONE else "but"
    return choice if obstacle is None else _instead(choice, f"{joint} not both can be run on text ({obstacle})")


def with_fit(choice: MethodChoice) -> MethodChoice:
    """Replace a method that does not fit the update by its variant that does, if there is one."""
    method = _FITTED.get(choice.method)
    return choice if method is None else MethodChoice(method, choice_reason(choice.found, method), choice.found)


def without_fit(choice: MethodChoice, reason: str) -> MethodChoice:
    """Replace a method that runs bases with the adapter by one that looks at weights alone.

    `reason` says why no update can be fitted to the adapter, as the end of a sentence.
    """
    return _instead(choice, f"but {reason}") if choice.method in _WITHOUT_FIT else choice


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


def _instead(choice: MethodChoice, hindrance: str) -> MethodChoice:
    method = _WITHOUT_RUN[choice.method]
    return MethodChoice(method, choice_reason(choice.found, method, hindrance), choice.found)


def _examine(bases: Bases, structure: Structure | None, compared: Sequence[TensorComparison] | None) -> PairFinding:
    scales = None if structure is None else structure.scales
    similarity = compare_weights(bases.source, bases.target, scales=scales)
    if structure is None:
        near = similarity is not None and similarity.near
        return PairFinding(PairKind.COPY if near else PairKind.NONE, similarity)
    parts = [part for part in count_parts(structure) if part.name != "tokens"]
    lacking = [part.name for part in parts if part.used < part.source]
    if not structure.in_place:
        by_parts = compare_weights(bases.source, bases.target, structure)
        if by_parts is not None and by_parts.near and all(part.nested for part in parts):
            # A pruned neuron may resemble another's most: parts in the source's order may explain the target as well.
            most = _STRAY * by_parts.distance
            if similarity is None or not similarity.near or similarity.distance > most:
                return PairFinding(PairKind.FEWER_PARTS if lacking else PairKind.PARTS, by_parts)
    if similarity is None or not similarity.near or structure.lacking:
        return PairFinding(PairKind.NONE, similarity, unmatched=structure.lacking)
    if "experts" in lacking:
        return PairFinding(PairKind.FEWER_EXPERTS, similarity)
    return _examine_copies(bases, similarity, compared or compare_modules(structure))


def _examine_copies(bases: Bases, similarity: WeightSimilarity, compared: Sequence[TensorComparison]) -> PairFinding:
    if not similarity.distance and equal_files(*bases) and compare_token_names(*bases) is None:
        return PairFinding(PairKind.SAME, similarity)
    relation = relation_of((), compared)
    # Quantisers such as GPTQ may round to another than the nearest level.
    stated = [bool(quantisation_of(base.config)) for base in bases]
    by_quantiser = {RelationFlag.TRAINED, RelationFlag.QUANTISED} <= relation and any(stated)
    experts = [item.difference.distance for item in compared if item.role == "experts"]
    of_experts = float(np.mean(experts)) if experts else 0.0
    trained = bool(relation & {RelationFlag.LORA_MERGED, RelationFlag.TRAINED})
    zeroed = sum(item.difference.zeroed > 0 for item in compared)
    if RelationFlag.SPARSE in relation and (not trained or 2 * zeroed > len(compared)):
        return PairFinding(PairKind.SPARSE_COPY, similarity)
    if RelationFlag.LORA_MERGED in relation:
        return PairFinding(PairKind.MERGED_COPY, similarity)
    # What was quantised is then not in the linear modules, the only ones that are interpolated.
    equal_modules = RelationFlag.QUANTISED in relation and not similarity.distance
    if RelationFlag.TRAINED in relation and not by_quantiser and not equal_modules:
        return PairFinding(PairKind.TRAINED_COPY, similarity)
    if not relation or max(similarity.distance, of_experts) < _COMPRESSED:
        return PairFinding(PairKind.COPY, similarity, by_quantiser)
    coarse = PairKind.COARSE_SOURCE if _is_coarser_source(compared, stated) else PairKind.COARSE_COPY
    return PairFinding(coarse, similarity, by_quantiser, experts=of_experts)


def _is_coarser_source(compared: Sequence[TensorComparison], stated: Sequence[bool]) -> bool:
    """Return whether the source, not the target, is the rounded side of two copies that differ by rounding.

    Most tensors that differ show which side is a rounding of the other's numbers. If they do not, as after a quantiser
    that rounds to another than the nearest level, the only side on coarse levels is the rounded one; and if none is,
    the only side whose configuration states a quantiser.
    """
    changed = [item for item in compared if item.difference.change is not Change.EQUAL]
    rounded = [one.difference.rounded for one in changed if one.rescaled or one.difference.change is Change.ROUNDED]
    for side in ("source", "target"):
        if 2 * rounded.count(side) > len(changed):
            return side == "source"
    coarse = [2 * sum(one.difference.coarse[side] for one in changed) > len(changed) for side in range(2)]
    return (coarse if any(coarse) else list(stated)) == [True, False]


def equal_files(source: BaseModel, target: BaseModel) -> bool:
    """Check whether the weights of two bases are equal, byte by byte; files of one size are read for their digests."""
    sizes = [[path.stat().st_size for path in base.store.files] for base in (source, target)]
    return sizes[0] == sizes[1] and source.digest() == target.digest()


def compare_weights(
    source: BaseModel, target: BaseModel, structure: Structure | None = None, scales: ChannelScales | None = None
) -> WeightSimilarity | None:
    """Compare 64 evenly spaced rows of each module, in four layers from first to last for every role.

    The sample is the same on every run, and only its rows are read and dequantised. `structure` says which parts
    correspond; without it modules of the same name are compared, those of the source with their `scales`. Returns None
    if names or shapes of the modules differ, or, with a structure, if no sampled module has a counterpart. Raises
    CheckpointError if a sampled weight cannot be read, or holds NaN or infinity.
    """
    if structure is None:
        shapes = [{name: module.shape for name, module in base.modules.items()} for base in (source, target)]
        if shapes[0] != shapes[1]:
            return None
        rows = {name: evenly_spaced(shape[0], _ROWS) for name, shape in shapes[0].items()}
        names = _sampled_modules(source)
        pairs = []
        for name in names:
            src, tgt = (module_rows(base, name, rows[name]) for base in (source, target))
            if scales is not None:
                src = src * scales.factors(name, shapes[0][name], rows[name])
            pairs.append(_compare(src, tgt))
    else:
        samples = (structure.sample(target.modules[name], _ROWS) for name in _sampled_modules(target))
        pairs = [_compare(*(rows[:, columns] for rows, columns in sample)) for sample in samples if sample is not None]
    if not pairs:
        return None
    Bases(source, target).release()
    cosine, distance = np.mean(pairs, axis=0)
    return WeightSimilarity(float(cosine), float(distance), len(pairs))


def _sampled_modules(base: BaseModel) -> Iterator[str]:
    for role in ROLES:
        yield from modules_of(base, role, _LAYERS)


def _compare(src: np.ndarray, tgt: np.ndarray) -> tuple[float, float]:
    """Return cosine and relative distance; a zero matrix is at distance 0 of another, and 1 of anything else."""
    src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    norm = float(np.linalg.norm(src))
    distance = float(np.linalg.norm(tgt - src)) / norm if norm else float(tgt.any())
    return cosine_similarity(src, tgt), distance
