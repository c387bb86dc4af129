"""Describe how two bases are related by flags and figures, from a sample of the rows of every tensor.

Rows are matched by the structure that the bases share. `wording` turns the result into sentences.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

import numpy as np

from jcrosslora.architectures.blocks import EMBEDDING, HEAD, LAYER_EMBEDDING, LAYER_INPUT_NORM, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint import ROLES, Module, expert_tensors
from jcrosslora.checkpoint.base import finite
from jcrosslora.relation.bases import Both, some_of
from jcrosslora.relation.channels import expert_scales, name_of
from jcrosslora.relation.difference import Change, Difference, compare_rows
from jcrosslora.relation.matching import MATRICES, MIN_MEAN_COSINE, expert_rows
from jcrosslora.relation.rounding import RoundingIntervals, float_rounding, infer_rounding
from jcrosslora.relation.structure import Part, Structure
from jcrosslora.utils.picking import evenly_spaced

_ROWS = 64  # of each module
# Norms whose features are no dimensions of the stream.
_OF_HEADS = frozenset({"q", "k", "global_q", "global_k", "q_a", "kv_a"})
# 64 rows cannot show the rank of an adapter of rank 64, which is in use, so a few modules are read further.
_MORE_ROWS, _MODULES_READ_FURTHER = 512, 2
# Independent weights have cosine 0 with a spread of 1 / sqrt(numbers): different layers of SmolLM2-135M and of
# Gemma-3-270M, 64 rows of each, stay below 0.05. Rounding these two models to 4 bits (Q4_0) moves a module by at most
# 0.14 of its norm and leaves a cosine of 0.99 or more. An independent change of relative size d leaves a cosine of
# 1 / sqrt(1 + d^2): 0.89 for d = 0.5, 0.8 for d = 0.75. The limits lie there, nearer to copies than to unrelated
# weights; the distance separates a copy from a scaled one.
_NEAR_COSINE, _NEAR_DISTANCE = 0.8, 0.75
# Scales that were found in rows of 4 bits are not exact, so that what they leave may not look like rounding alone. A
# source of 4 bits is at a distance of up to 0.26 if its channels are rescaled.
_MOST_ROUNDED = 0.3


class RelationFlag(StrEnum):
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
    RESCALED = "channels rescaled"  # as AWQ and SmoothQuant do before they round
    QUANTISED = "quantised"  # to 8 bits or fewer
    ROUNDED = "rounded"  # to a narrower float format
    EMBEDDING_REPLACED = "embedding replaced"
    HEAD_REPLACED = "head replaced"
    OTHER_TOKENIZER = "other tokenizer"  # ids of one embedding stand for other tokens


class PairKind(Enum):
    """How similar two bases are, in the classes that decide how an update is moved."""

    SAME = auto()  # files of equal digests, and tokenizers that agree
    COPY = auto()  # up to rounding
    TRAINED_COPY = auto()
    OTHER_GAINS = auto()  # further trained, or rescaled in a way that was not found
    MERGED_COPY = auto()  # with a LoRA
    SPARSE_COPY = auto()
    COARSE_COPY = auto()  # the target is rounded to about 4 bits or fewer
    COARSE_SOURCE = auto()  # the source alone is
    FEWER_EXPERTS = auto()  # and otherwise a copy
    PARTS = auto()  # one base is made of the other's parts
    FEWER_PARTS = auto()  # and the target lacks some
    NONE = auto()


@dataclass(frozen=True)
class WeightSimilarity:
    """The similarity of corresponding weights, as means over the sampled modules.

    Attributes:
        cosine: of the sampled weights W_src and W_tgt of a module.
        distance: ||W_tgt - W_src||_F / ||W_src||_F.
    """

    cosine: float
    distance: float
    modules: int

    @property
    def near(self) -> bool:
        """Whether an update of one base can be used on the other unchanged."""
        return self.cosine > _NEAR_COSINE and self.distance < _NEAR_DISTANCE


@dataclass(frozen=True)
class PairFinding:
    """What the choice of a method depends on.

    Attributes:
        similarity: of the weights that correspond; None if the modules have different shapes.
        by_quantiser: whether what looks like further training may come from a quantiser.
        rescaled: whether the weights were compared after the channels of the source had been rescaled.
        experts: mean relative distance of the sampled experts, where a base is rounded coarsely.
        unmatched: number of target layers whose attention, MLP or experts have no counterpart.
    """

    pair_kind: PairKind
    similarity: WeightSimilarity | None
    by_quantiser: bool = False
    rescaled: bool = False
    experts: float = 0.0
    unmatched: int = 0


@dataclass(frozen=True)
class TensorComparison:
    """A tensor of the target compared with its counterpart in the source.

    Attributes:
        role: of a linear module, e.g. "q_proj"; "experts"; or "embedding", "head", "norms", "biases", "routers" (with
            the biases of experts), "mixer tensors" (that are no linear modules), "layer inputs" (what makes them).
        target: name of the target module, or which expert of which layer; for other tensors the role.
        source: name of the source module; for other tensors the role.
        rescaled: whether the source's rows and columns were rescaled first, see `channels`.
    """

    role: str
    target: str
    source: str
    difference: Difference
    rescaled: bool = False

    @property
    def replaced(self) -> bool:
        """Whether an embedding or a head was replaced, not just trained from the source's."""
        far = abs(self.difference.cosine) < MIN_MEAN_COSINE
        return self.role in _REPLACED and self.difference.change in (Change.TRAINED, Change.LOW_RANK) and far


_LINEAR = {*ROLES, "experts"}
_REPLACED = {"embedding": RelationFlag.EMBEDDING_REPLACED, "head": RelationFlag.HEAD_REPLACED}


def relation_of(parts: Sequence[Part], compared: Sequence[TensorComparison]) -> set[RelationFlag]:
    """Return the relations that hold; none if all parts and all compared numbers agree."""
    linear = [item.difference for item in compared if item.role in _LINEAR]
    others = [item.difference for item in compared if item.role not in _LINEAR and not item.replaced]
    every, changes, other_changes = [*linear, *others], {one.change for one in linear}, {one.change for one in others}
    low_rank = Change.LOW_RANK in changes and Change.TRAINED not in changes
    trained = Change.TRAINED in changes or (not low_rank and bool(other_changes & {Change.TRAINED, Change.LOW_RANK}))
    rounded = [one for one in every if one.change is Change.ROUNDED and not one.only_scaled]
    mostly_quantised = 2 * sum(one.quantised for one in linear) > len(linear)
    quantised = any(one.quantised for one in rounded) or ((low_rank or trained) and mostly_quantised)
    unsure = not (low_rank or trained) and Change.TRAINED_OR_ROUNDED in changes | other_changes
    applies = {
        RelationFlag.PRUNED: any(part.used < part.source for part in parts),
        RelationFlag.EXTENDED: any(part.found < part.target for part in parts),
        RelationFlag.UPSCALED: any(part.repeated for part in parts),
        RelationFlag.PERMUTED: not all(part.in_order or part.repeated for part in parts),
        RelationFlag.SPARSE: _is_sparse(compared),
        RelationFlag.LORA_MERGED: low_rank,
        RelationFlag.TRAINED: trained,
        RelationFlag.TRAINED_OR_QUANTISED: unsure,
        RelationFlag.RESCALED: any(item.rescaled for item in compared),
        RelationFlag.SCALED: any(one.scale != 1 for one in every),
        RelationFlag.QUANTISED: quantised,
        RelationFlag.ROUNDED: rounded and not quantised,
    }
    found = {relation for relation, true in applies.items() if true}
    return found | {_REPLACED[item.role] for item in compared if item.replaced}


def _is_sparse(compared: Sequence[TensorComparison]) -> bool:
    """Return whether numbers were set to zero in more than half of the modules of a role."""
    zeroed = defaultdict(list)
    for item in compared:
        if item.role in _LINEAR:
            zeroed[item.role].append(item.difference.zeroed > 0)
    return any(2 * sum(found) > len(found) for found in zeroed.values())


def compare_modules(structure: Structure) -> list[TensorComparison]:
    """Compare 64 evenly spaced rows of every linear target module that has a counterpart, and of some experts.

    The source's channels get the structure's scales first.
    """
    found = []
    for module in structure.bases.target.modules.values():
        comparison = _compare_module(structure, module, _ROWS)
        if comparison is not None:
            found.append(comparison)
        structure.bases.release()
    return [*_read_ranks(structure, found), *_compare_experts(structure)]


def compare_other_tensors(structure: Structure) -> list[TensorComparison]:
    """Compare embedding and head at the structure's tokens, by id if it has none, and all norms and biases.

    Norms and tensors that scales were taken from are left out, as the weights that read them have their differences.
    """
    tied = all(base.tied for base in structure.bases)
    pieces = {
        "embedding": _compare_table(structure, EMBEDDING),
        "head": None if tied else _compare_table(structure, HEAD),
        "norms": _compare_vectors(_norms(structure)),
        "biases": _compare_vectors(_biases(structure)),
        "routers": _compare_vectors(_routers(structure)),
        "mixer tensors": _compare_vectors(_mixer_tensors(structure)),
        "layer inputs": _compare_vectors(_layer_inputs(structure)),
    }
    return [TensorComparison(role, role, role, piece) for role, piece in pieces.items() if piece is not None]


def _compare_module(structure: Structure, module: Module, rows: int) -> TensorComparison | None:
    name, sample = structure.counterpart(module), structure.sample(module, rows)
    if name is None or sample is None:
        return None
    dtypes, factors = (structure.bases.source.modules[name].dtype, module.dtype), structure.factors(module, rows)
    difference = _compare(*sample, dtypes, factors, 0.0 if structure.scales is None else structure.scales.error)
    return TensorComparison(module.role, module.name, name, difference, _rescales(factors))


def _rescales(factors: np.ndarray | None) -> bool:
    return factors is not None and bool(np.any(factors != 1))


def _read_ranks(structure: Structure, found: list[TensorComparison]) -> list[TensorComparison]:
    """Read more rows of the first and the last module of each role that looks trained, and replace their results.

    If all of them turn out to be of low rank, the other modules of these roles are taken for low rank too, with an
    unknown rank. Otherwise the list is returned unchanged.
    """
    modules = structure.bases.target.modules
    trained: dict[str, list[TensorComparison]] = {}
    for item in found:
        if item.difference.change is Change.TRAINED and modules[item.target].shape[0] > _ROWS:
            trained.setdefault(item.role, []).append(item)
    closer: dict[str, TensorComparison] = {}
    for items in trained.values():
        for index in evenly_spaced(len(items), _MODULES_READ_FURTHER):
            again = _compare_module(structure, modules[items[index].target], _MORE_ROWS)
            assert again is not None
            closer[again.target] = again
    if not closer or any(item.difference.change is not Change.LOW_RANK for item in closer.values()):
        return found

    def corrected(item: TensorComparison) -> TensorComparison:
        if item not in trained.get(item.role, ()):
            return item
        low_rank = replace(item, difference=replace(item.difference, change=Change.LOW_RANK))
        return closer.get(item.target, low_rank)

    return [corrected(item) for item in found]


def _compare_experts(structure: Structure) -> Iterator[TensorComparison]:
    """Compare 64 rows of the matrices of one expert per layer, a different one in each."""
    bases = structure.bases
    for layers, (others, experts) in structure.matched_experts():
        if not len(experts):
            continue
        place = layers[1] % len(experts)
        pair = int(others[place]), int(experts[place])
        found = None if structure.scales is None else expert_scales(bases, structure.scales, layers[1], pair)
        for matrix in MATRICES:
            src, tgt = expert_rows(bases, layers, pair, matrix, _ROWS)
            every = np.arange(src.shape[1])
            name_src, name_tgt = (
                f"{matrix} of expert {expert} of layer {layer}" for expert, layer in zip(pair, layers, strict=True)
            )
            dtypes = bases.source.experts.dtype(layers[0], matrix), bases.target.experts.dtype(layers[1], matrix)
            factors, error = None, 0.0
            if found is not None and structure.scales is not None:
                sides = found[matrix] if bases.target.experts.axis(matrix) == 1 else found[matrix][::-1]
                factors, error = np.outer(some_of(sides[0], _ROWS), sides[1]), structure.scales.error
            difference = _compare((src, every), (tgt, every), dtypes, factors, error)
            yield TensorComparison("experts", name_tgt, name_src, difference, _rescales(factors))
        bases.release()


def _compare(
    src: Both, tgt: Both, dtypes: tuple[str, str], factors: np.ndarray | None = None, error: float = 0.0
) -> Difference:
    """Compare the corresponding columns of whole rows of each side, given with their stored dtypes.

    `factors` multiply the numbers of the source; `error` is their relative error.
    """
    x, y = src[0][:, src[1]], tgt[0][:, tgt[1]]
    if np.array_equal(x, y):  # their roundings make no difference
        return compare_rows(x, y, *(RoundingIntervals(x, x, dtype, coarse=False) for dtype in dtypes))
    sides = zip((src, tgt), dtypes, strict=True)
    roundings = [infer_rounding(rows, dtype).at((slice(None), columns)) for (rows, columns), dtype in sides]
    if factors is not None:
        x, roundings[0] = x * factors, roundings[0].times(factors, error)
    found = compare_rows(x, y, *roundings)
    inexact = factors is not None and any(one.coarse for one in roundings) and found.distance < _MOST_ROUNDED
    if inexact and found.change in (Change.TRAINED, Change.LOW_RANK):
        return replace(found, change=Change.TRAINED_OR_ROUNDED, rank=None, quantised=False)
    return found


def _compare_table(structure: Structure, name: str) -> Difference:
    """Compare rows of the embedding or the head."""
    bases, (dims_src, dims_tgt) = structure.bases, structure.dimensions
    every = np.arange(min(base.dims.vocab for base in bases))
    ids_src, ids_tgt = structure.tokens if structure.by_embedding else (every, every)
    src, tgt = bases.rows(name, (some_of(ids_src, _ROWS), some_of(ids_tgt, _ROWS)))
    dtype_src, dtype_tgt = (base.store.dtype(EMBEDDING if name != HEAD or base.tied else name) for base in bases)
    return _compare((src, dims_src), (tgt, dims_tgt), (dtype_src, dtype_tgt))


def _compare_vectors(pairs: Iterable[Both]) -> Difference | None:
    """Concatenate all vectors of one kind and compare them as a matrix of one row, which has no low rank."""
    both = list(pairs)
    if not both:
        return None
    src, tgt = (np.concatenate([piece.reshape(-1) for piece in side])[None] for side in zip(*both, strict=True))
    return compare_rows(src, tgt, float_rounding(src), float_rounding(tgt))


def _norms(structure: Structure) -> Iterator[Both]:
    """Yield the norm weights that both families have, in the dimensions that correspond."""
    (source, target), (dims_src, dims_tgt) = structure.bases, structure.dimensions
    norms_src, norms_tgt = source.architecture.norms, target.architecture.norms
    shared = [norm for norm in norms_tgt if norm in norms_src and norm not in _OF_HEADS]
    names = [(source.family.final_norm, target.family.final_norm)]
    names += [
        (f"model.layers.{layer.layer}.{norms_src[norm][0]}", f"model.layers.{number}.{norms_tgt[norm][0]}")
        for number, layer in structure.matched()
        for norm in shared
        if number in target.layers_with(norm)
        and layer.layer in source.layers_with(norm)
        and not structure.explains(number, norm)
    ]
    # Compared as stored if both families mean the same: adding the offset of a gain would round differently.
    offset = np.float32(target.family.gain_offset - source.family.gain_offset)
    for name_src, name_tgt in names:
        src, tgt = structure.bases.tensors(f"{name_src}.weight", f"{name_tgt}.weight")
        yield src[dims_src], (tgt + offset)[dims_tgt]


def _biases(structure: Structure) -> Iterator[Both]:
    source, target = structure.bases
    for module in target.modules.values():
        name, rows = structure.counterpart(module), structure.outputs(module.layer, module.role)
        if name is None or rows is None:
            continue
        src, tgt = source.bias(name), target.bias(module.name)
        if src is not None and tgt is not None:
            src, tgt = finite(source, f"{name}.bias", src), finite(target, f"{module.name}.bias", tgt)
            if structure.scales is not None:
                src = src * structure.scales.of(name, module.shape)[0]
            yield src[rows[rows >= 0]], tgt[rows >= 0]


def _routers(structure: Structure) -> Iterator[Both]:
    """Yield the tensors of matched experts that are not their matrices, without routers that were rescaled."""
    bases = structure.bases
    kinds = [{*expert_tensors(base.family.experts)} if base.family.experts else set() for base in bases]
    for layers, experts in structure.matched_experts():
        rescaled = set() if structure.scales is None else structure.scales.columns.keys()
        for name in sorted((kinds[0] & kinds[1]) - set(MATRICES)):
            if name_of(layers[1], name) in rescaled:
                continue
            src, tgt = (
                finite(base, f"{name} of layer {layer}", base.experts.tensor(layer, name))[own]
                for base, layer, own in zip(bases, layers, experts, strict=True)
            )
            yield src, tgt


def _mixer_tensors(structure: Structure) -> Iterator[Both]:
    """Yield a sample of the rows of the tensors of mixers that are no linear modules."""
    source, target = (base.architecture.tensors for base in structure.bases)
    for number, layer in structure.matched():
        for name in sorted(source.keys() & target.keys()):
            if number in structure.bases.target.layers_with(name) and not structure.explains(number, name):
                src, tgt = structure.bases.tensors(
                    f"model.layers.{layer.layer}.{source[name].path}", f"model.layers.{number}.{target[name].path}"
                )
                some = evenly_spaced(len(tgt), _ROWS)
                yield src[some], tgt[some]


def _layer_inputs(structure: Structure) -> Iterator[Both]:
    """Yield a sample of the tensors that make further inputs of layers, if both bases have equally many of these."""
    bases, (dims_src, dims_tgt) = structure.bases, structure.dimensions
    source, target = (base.architecture.layer_inputs * base.dims.layers for base in bases)
    if not source or source != target:
        return
    ids_src, ids_tgt = structure.tokens
    yield bases.rows(LAYER_EMBEDDING, (some_of(ids_src, _ROWS), some_of(ids_tgt, _ROWS)))
    some = evenly_spaced(source, _ROWS)
    src, tgt = bases.rows(LAYER_INPUT_PROJECTION, (some, some))
    yield src[:, dims_src], tgt[:, dims_tgt]
    yield bases.tensors(LAYER_INPUT_NORM, LAYER_INPUT_NORM)
