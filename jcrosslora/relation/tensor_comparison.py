"""Compare the weights of two bases tensor by tensor, from a sample of rows and through their shared structure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.architectures.names import EMBEDDING, HEAD, LAYER_EMBEDDING, LAYER_INPUT_NORM, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.layout import Module, expert_tensors
from jcrosslora.relation.difference import Change, Difference, compare_rows
from jcrosslora.relation.matching import MATRICES, expert_rows
from jcrosslora.relation.rounding import Rounding, float_rounding, infer_rounding
from jcrosslora.relation.structure import Structure
from jcrosslora.relation.weight_similarity import Sample, check_finite, counterpart_rows, evenly_spaced

_ROWS = 64  # of each module
# Norms whose features are no dimensions of the stream.
_OF_HEADS = frozenset({"q", "k", "global_q", "global_k", "q_a", "kv_a"})
# 64 rows cannot show the rank of an adapter of rank 64, which is in use, so a few modules are read further.
_MORE_ROWS, _MODULES_READ_FURTHER = 512, 2


@dataclass(frozen=True)
class TensorComparison:
    """A tensor of the target compared with its counterpart in the source.

    Attributes:
        role: of a linear module, e.g. "q_proj"; "experts"; or "embedding", "head", "norms", "biases", "routers" (with
            the biases of experts), "mixer tensors" (that are no linear modules), "layer inputs" (what makes them).
        target: name of the target module, or which expert of which layer; for other tensors the role.
        source: name of the source module; for other tensors the role.
    """

    role: str
    target: str
    source: str
    difference: Difference


def compare_modules(source: BaseModel, target: BaseModel, structure: Structure) -> list[TensorComparison]:
    """Compare 64 evenly spaced rows of every linear target module that has a counterpart, and of some experts.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    found = []
    for module in target.modules.values():
        comparison = _compare_module(source, target, structure, module, _ROWS)
        if comparison is not None:
            found.append(comparison)
        source.release()
        target.release()
    return [*_read_ranks(source, target, structure, found), *_compare_experts(source, target, structure)]


def compare_other_tensors(source: BaseModel, target: BaseModel, structure: Structure) -> list[TensorComparison]:
    """Compare embedding and head at the structure's tokens, by id if it has none, and all norms and biases.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    pieces = {
        "embedding": _compare_table(source, target, structure, EMBEDDING),
        "head": None if source.tied and target.tied else _compare_table(source, target, structure, HEAD),
        "norms": _compare_vectors(_norms(source, target, structure)),
        "biases": _compare_vectors(_biases(source, target, structure)),
        "routers": _compare_vectors(_routers(source, target, structure)),
        "mixer tensors": _compare_vectors(_mixer_tensors(source, target, structure)),
        "layer inputs": _compare_vectors(_layer_inputs(source, target, structure)),
    }
    return [TensorComparison(role, role, role, piece) for role, piece in pieces.items() if piece is not None]


def _compare_module(
    source: BaseModel, target: BaseModel, structure: Structure, module: Module, rows: int
) -> TensorComparison | None:
    name, pair = structure.counterpart(module), counterpart_rows(source, target, structure, module.name, rows)
    if name is None or pair is None:
        return None
    difference = _compare(*pair, (source.modules[name].dtype, module.dtype))
    return TensorComparison(module.role, module.name, name, difference)


def _compare_experts(source: BaseModel, target: BaseModel, structure: Structure) -> Iterator[TensorComparison]:
    """Compare 64 rows of the matrices of one expert of each layer, of another expert in each."""
    for number, layer in enumerate(structure.layers):
        if layer is None or layer.experts is None or not (layer.experts >= 0).any():
            continue
        matched = np.flatnonzero(layer.experts >= 0)
        expert = int(matched[number % len(matched)])
        other = int(layer.experts[expert])
        for matrix in MATRICES:
            src = expert_rows(source, layer.layer, matrix, other, _ROWS)
            tgt = expert_rows(target, number, matrix, expert, _ROWS)
            every = np.arange(src.shape[1])
            names = (
                f"{matrix} of expert {expert} of layer {number}",
                f"{matrix} of expert {other} of layer {layer.layer}",
            )
            dtypes = source.expert_dtype(layer.layer, matrix), target.expert_dtype(number, matrix)
            yield TensorComparison("experts", *names, _compare((src, every), (tgt, every), dtypes))
        source.release()
        target.release()


def _compare(src: Sample, tgt: Sample, dtypes: tuple[str, str]) -> Difference:
    """Compare the corresponding columns of whole rows, given with their stored dtypes."""
    x, y = src[0][:, src[1]], tgt[0][:, tgt[1]]
    if np.array_equal(x, y):  # their roundings make no difference
        roundings = [Rounding(x, x, dtype, coarse=False) for dtype in dtypes]
    else:
        roundings = [
            _columns(infer_rounding(rows, dtype), columns)
            for (rows, columns), dtype in zip((src, tgt), dtypes, strict=True)
        ]
    return compare_rows(x, y, *roundings)


def _columns(rounding: Rounding, columns: np.ndarray) -> Rounding:
    return replace(rounding, low=rounding.low[:, columns], high=rounding.high[:, columns])


def _read_ranks(
    source: BaseModel, target: BaseModel, structure: Structure, found: list[TensorComparison]
) -> list[TensorComparison]:
    """Read more rows of the first and the last module of each role that looks trained, and replace their results.

    If all of them turn out to be of low rank, the other modules of these roles are taken for low rank too, with an
    unknown rank. Otherwise the list is returned unchanged.
    """
    trained: dict[str, list[TensorComparison]] = {}
    for item in found:
        if item.difference.change is Change.TRAINED and target.modules[item.target].shape[0] > _ROWS:
            trained.setdefault(item.role, []).append(item)
    closer: dict[str, TensorComparison] = {}
    for items in trained.values():
        for index in evenly_spaced(len(items), _MODULES_READ_FURTHER):
            module = target.modules[items[index].target]
            again = _compare_module(source, target, structure, module, _MORE_ROWS)
            assert again is not None
            closer[module.name] = again
    if not closer or any(item.difference.change is not Change.LOW_RANK for item in closer.values()):
        return found

    def corrected(item: TensorComparison) -> TensorComparison:
        if item not in trained.get(item.role, ()):
            return item
        low_rank = replace(item, difference=replace(item.difference, change=Change.LOW_RANK))
        return closer.get(item.target, low_rank)

    return [corrected(item) for item in found]


def _compare_table(source: BaseModel, target: BaseModel, structure: Structure, name: str) -> Difference:
    """Compare rows of the embedding or the head."""
    columns = np.flatnonzero(structure.stream >= 0)
    every = np.arange(min(source.dims.vocab, target.dims.vocab))
    tokens = structure.tokens if structure.by_embedding else (every, every)
    ids = (ids[evenly_spaced(len(ids), _ROWS)] for ids in tokens)
    src, tgt = (check_finite(base, name, base.rows(name, own)) for base, own in zip((source, target), ids, strict=True))
    stored = (EMBEDDING if name != HEAD or base.tied else name for base in (source, target))
    dtype_src, dtype_tgt = (base.store.dtype(own) for base, own in zip((source, target), stored, strict=True))
    return _compare((src, structure.stream[columns]), (tgt, columns), (dtype_src, dtype_tgt))


def _compare_vectors(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Difference | None:
    """Concatenate all vectors of one kind and compare them as a matrix of one row, which has no low rank."""
    both = list(pairs)
    if not both:
        return None
    src, tgt = (np.concatenate(side)[None, :].astype(np.float32) for side in zip(*both, strict=True))
    return compare_rows(src, tgt, float_rounding(src), float_rounding(tgt))


def _norms(source: BaseModel, target: BaseModel, structure: Structure) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the norm weights that both families have, in the dimensions that correspond."""
    matched = structure.stream >= 0
    norms_src, norms_tgt = (base.architecture.norms for base in (source, target))
    shared = [norm for norm in norms_tgt if norm in norms_src and norm not in _OF_HEADS]
    names = [(f"{source.family.final_norm}.weight", f"{target.family.final_norm}.weight")]
    for number, layer in enumerate(structure.layers):
        if layer is not None:
            names += [
                (
                    f"model.layers.{layer.layer}.{norms_src[norm][0]}.weight",
                    f"model.layers.{number}.{norms_tgt[norm][0]}.weight",
                )
                for norm in shared
                if number in target.layers_with(norm) and layer.layer in source.layers_with(norm)
            ]
    # Compared as stored where both families mean the same: adding the offset of a gain would round differently.
    offset = np.float32(target.family.gain_offset - source.family.gain_offset)
    for name_src, name_tgt in names:
        src, tgt = _both((source, name_src), (target, name_tgt))
        tgt = tgt + offset
        yield src[structure.stream[matched]], tgt[matched]


def _biases(source: BaseModel, target: BaseModel, structure: Structure) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for module in target.modules.values():
        name, rows = structure.counterpart(module), structure.outputs(module.layer, module.role)
        if name is None or name not in source.modules or rows is None:
            continue
        src, tgt = source.bias(name), target.bias(module.name)
        if src is not None and tgt is not None:
            src = check_finite(source, f"{name}.bias", src.astype(np.float32))
            tgt = check_finite(target, f"{module.name}.bias", tgt.astype(np.float32))
            yield src[rows[rows >= 0]], tgt[rows >= 0]


def _routers(source: BaseModel, target: BaseModel, structure: Structure) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the tensors of matched experts that are not their matrices."""
    for number, layer in enumerate(structure.layers):
        if layer is None or layer.experts is None:
            continue
        matched = np.flatnonzero(layer.experts >= 0)
        own, others = ({*expert_tensors(base.family.experts)} for base in (target, source) if base.family.experts)
        for name in sorted((own & others) - set(MATRICES)):
            src, tgt = (
                check_finite(base, f"{name} of layer {index}", base.expert_tensor(index, name).astype(np.float32))
                for base, index in ((source, layer.layer), (target, number))
            )
            yield src[layer.experts[matched]].reshape(-1), tgt[matched].reshape(-1)


def _mixer_tensors(
    source: BaseModel, target: BaseModel, structure: Structure
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a sample of the rows of the tensors of mixers that are no linear modules."""
    paths_src, paths_tgt = (base.architecture.tensors for base in (source, target))
    for number, layer in enumerate(structure.layers):
        for name in paths_src.keys() & paths_tgt.keys() if layer is not None else ():
            if number in target.layers_with(name):
                assert layer is not None
                name_src = f"model.layers.{layer.layer}.{paths_src[name].path}"
                src, tgt = _both((source, name_src), (target, f"model.layers.{number}.{paths_tgt[name].path}"))
                some = evenly_spaced(len(tgt), _ROWS)
                yield src[some].reshape(-1), tgt[some].reshape(-1)


def _layer_inputs(
    source: BaseModel, target: BaseModel, structure: Structure
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a sample of the tensors that make further inputs of layers, if both bases have equally many of these."""
    features = [base.architecture.layer_inputs * base.dims.layers for base in (source, target)]
    if not features[0] or features[0] != features[1]:
        return
    matched, some = structure.stream >= 0, evenly_spaced(features[0], _ROWS)
    tokens = [ids[evenly_spaced(len(ids), _ROWS)] for ids in structure.tokens]

    def rows(name: str, ids: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        both = zip((source, target), ids, strict=True)
        return (check_finite(base, name, base.rows(name, own)) for base, own in both)

    src, tgt = rows(LAYER_EMBEDDING, tokens)
    yield src.reshape(-1), tgt.reshape(-1)
    src, tgt = rows(LAYER_INPUT_PROJECTION, (some, some))
    yield src[:, structure.stream[matched]].reshape(-1), tgt[:, matched].reshape(-1)
    src, tgt = _both((source, LAYER_INPUT_NORM), (target, LAYER_INPUT_NORM))
    yield src, tgt


def _both(*named: tuple[BaseModel, str]) -> Iterator[np.ndarray]:
    return (check_finite(base, name, base.tensor(name).astype(np.float32)) for base, name in named)
