"""Names and shapes of the tensors of a model, and where each linear module is in them."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jcrosslora.architectures import ROLE_PATHS, Architecture, Family, Layer
from jcrosslora.architectures.blocks import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    LAYER_EMBEDDING,
    LAYER_INPUT_NORM,
    LAYER_INPUT_PROJECTION,
)
from jcrosslora.checkpoint.experts import ExpertLayout, layout_of
from jcrosslora.checkpoint.store import TensorStore, errors_of
from jcrosslora.errors import CheckpointError

# Layers after the last that predict further tokens, and that the class does not read.
_MORE_LAYERS = "num_nextn_predict_layers"
_SHOWN = 3  # problems named in one error
_NOT_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "C64"})


@dataclass(frozen=True)
class Module:
    """One logical linear module, named as in Llama in every family.

    Attributes:
        name: e.g. "model.layers.0.self_attn.q_proj".
        role: one of `ROLES`.
        shape: (O, I).
        tensor: name of the tensor that holds it, e.g. "model.layers.0.self_attn.qkv_proj.weight".
        rows: first and last (exclusive) row inside a fused tensor, else None.
        dtype: storage dtype as the checkpoint states it, e.g. "BF16" or "Q4_K".
    """

    name: str
    layer: int
    role: str
    shape: tuple[int, int]
    tensor: str
    rows: tuple[int, int] | None
    dtype: str


def holder_of(family: Family, role: str) -> str:
    """Return the path, in a layer, of the module as the model stores it that holds a role."""
    return next((path for path, roles in family.fused.items() if role in roles), ROLE_PATHS[role])


def fused_modules(model: Architecture) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """List the modules that hold several logical ones: name -> (logical name, first row, last row exclusive)."""
    result = {}
    for number, layer in enumerate(model.stack):
        for path, roles in _fused(model.family, layer).items():
            ends = list(itertools.accumulate((layer.shapes[role][0] for role in roles), initial=0))
            names = [f"model.layers.{number}.{ROLE_PATHS[role]}" for role in roles]
            result[f"model.layers.{number}.{path}"] = tuple(zip(names, ends[:-1], ends[1:], strict=True))
    return result


def _fused(family: Family, layer: Layer) -> dict[str, tuple[str, ...]]:
    """Return the modules of a layer that hold several logical ones, and the roles of each."""
    return {path: roles for path, roles in family.fused.items() if roles[0] in layer.shapes}


def build_modules(
    model: Architecture, fused: Mapping[str, tuple[tuple[str, int, int], ...]], store: TensorStore
) -> dict[str, Module]:
    """List the logical modules, by layer, then in the order of `ROLES`; `fused` is that of `fused_modules`."""
    holders = {part: (name, (start, stop)) for name, rows in fused.items() for part, start, stop in rows}
    modules = {}
    for number, layer in enumerate(model.stack):
        for role in (role for role in model.role_shapes if role in layer.shapes):
            name = f"model.layers.{number}.{ROLE_PATHS[role]}"
            holder, rows = holders.get(name, (name, None))
            tensor = f"{holder}.weight"
            modules[name] = Module(name, number, role, layer.shapes[role], tensor, rows, store.dtype(tensor))
    return modules


def expected_shapes(model: Architecture, experts: Mapping[str, str] | None = None) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that the model must have, its experts in one of `ExpertRules.layouts`."""
    family, dims, config = model.family, model.dims, model.config
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (dims.vocab, dims.hidden)}
    expected |= dict(_norm_tensors(family, family.final_norm, dims.hidden))
    if not family.is_tied(config):
        expected[HEAD] = (dims.vocab, dims.hidden)
    if family.has_head_bias(config):
        expected[HEAD_BIAS] = (dims.vocab,)
    if inputs := model.layer_inputs:
        expected |= {
            LAYER_EMBEDDING: (dims.vocab, dims.layers * inputs),
            LAYER_INPUT_PROJECTION: (dims.layers * inputs, dims.hidden),
            LAYER_INPUT_NORM: (inputs,),
        }
    in_layer = {layer: dict(_layer_shapes(model, layer, experts)) for layer in dict.fromkeys(model.stack)}
    for number, layer in enumerate(model.stack):
        expected |= {f"model.layers.{number}.{name}": shape for name, shape in in_layer[layer].items()}
    return expected


def _norm_tensors(family: Family, norm: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{norm}.weight", (size,)
    if family.norm_biases:
        yield f"{norm}.bias", (size,)


def _layer_shapes(
    model: Architecture, layer: Layer, experts: Mapping[str, str] | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    family, config, shapes = model.family, model.config, layer.shapes
    for _, (path, size) in model.norms_of(layer):
        yield from _norm_tensors(family, path, size)
    if family.experts is not None and "router" in layer.names:
        paths = experts or family.experts.layouts[0]
        yield from ExpertLayout(family.experts, paths, config, model.dims.hidden).stored_shapes()
    for tensor in layer.tensors.values():
        yield tensor.path, tensor.shape
    holders = _fused(family, layer)
    held = {role for roles in holders.values() for role in roles}
    holders |= {ROLE_PATHS[role]: (role,) for role in model.role_shapes if role in shapes and role not in held}
    biased = set(family.biased_roles(config))
    for path, roles in holders.items():
        rows = sum(shapes[role][0] for role in roles)
        yield f"{path}.weight", (rows, shapes[roles[0]][1])
        if biased.issuperset(roles):
            yield f"{path}.bias", (rows,)
    for name, usual in family.activation_tensors.items():
        if usual is None:
            yield name, (1,)


def check_tensors(model: Architecture, store: TensorStore, ref: str) -> None:
    """Check that a checkpoint has the tensors that its configuration calls for.

    Raises:
        CheckpointError: missing or misshapen tensors; the message names the first few and counts the rest.
    """
    names, family, dims = store.names(), model.family, model.dims
    # Compared before any loop over layers: a hostile configuration may claim 2^30 of them.
    stored = {part for name in names if (part := layer_of(name)) is not None}
    extra = model.config.get(_MORE_LAYERS)
    extra = extra if isinstance(extra, int) else 0
    stored = {layer for layer in stored if not dims.layers <= layer < dims.layers + extra}
    if stored and (dims.layers > len(stored) or max(stored) >= dims.layers):
        msg = f"{ref}: config says {dims.layers} layers, the weights hold {len(stored)} (up to layer {max(stored)}): "
        raise CheckpointError(msg + "config.json and weights do not belong together, or the download is incomplete")
    known = set(names)
    problems = [] if stored else ["no tensor is named model.layers.*"]
    with errors_of(ref):
        expected = expected_shapes(model, layout_of(family, store.names)) if stored else {}
    for name, shape in expected.items():
        if name not in known:
            problems.append(f"{name} is missing")
        elif store.shape(name) != shape:
            problems.append(f"{name} has shape {list(store.shape(name))}, config says {list(shape)}")
        elif store.dtype(name) in _NOT_WEIGHTS:
            problems.append(f"{name} has dtype {store.dtype(name)}, wanted a float dtype")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        msg = f"{ref}: not a complete {family.name} model: {'; '.join(problems[:_SHOWN])}{more}: {store.advice}"
        raise CheckpointError(msg)


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor, None for one outside the layers."""
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[2].isdecimal() and len(parts[2]) < 10:
        return int(parts[2])
    return None
