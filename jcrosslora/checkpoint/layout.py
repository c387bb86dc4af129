"""Names and shapes of the tensors of a model, where each linear module is in them, and how experts are stored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jcrosslora.architectures import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    LAYER_EMBEDDING,
    LAYER_INPUT_NORM,
    LAYER_INPUT_PROJECTION,
)
from jcrosslora.architectures.architecture import Architecture, Layer
from jcrosslora.architectures.blocks import ROLE_PATHS
from jcrosslora.architectures.config import Dims
from jcrosslora.architectures.expert_rules import ExpertRules
from jcrosslora.architectures.family import Family
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError

# Layers behind the last that predict further tokens, and that the class does not read.
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
        result |= _fused_rows(model.family, number, layer)
    return result


def _fused_rows(family: Family, number: int, layer: Layer) -> dict[str, tuple[tuple[str, int, int], ...]]:
    result = {}
    for path, roles in _fused(family, layer).items():
        rows, start = [], 0
        for role in roles:
            stop = start + layer.shapes[role][0]
            rows.append((f"model.layers.{number}.{ROLE_PATHS[role]}", start, stop))
            start = stop
        result[f"model.layers.{number}.{path}"] = tuple(rows)
    return result


def _fused(family: Family, layer: Layer) -> dict[str, tuple[str, ...]]:
    """Return the modules of a layer that hold several logical ones, and the roles of each."""
    return {path: roles for path, roles in family.fused.items() if roles[0] in layer.shapes}


def build_modules(model: Architecture, store: TensorStore) -> dict[str, Module]:
    """List the logical modules, by layer, then in the order of `ROLES`."""
    modules = {}
    for number, layer in enumerate(model.stack):
        places = {
            part: (fused, (start, stop))
            for fused, rows in _fused_rows(model.family, number, layer).items()
            for part, start, stop in rows
        }
        for role in (role for role in model.role_shapes if role in layer.shapes):
            name = f"model.layers.{number}.{ROLE_PATHS[role]}"
            holder, rows = places.get(name, (name, None))
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
        yield from expert_shapes(family.experts, model.dims, config, experts or family.experts.layouts[0])
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
        msg = (
            f"{ref}: config says {dims.layers} layers, the weights hold {len(stored)} (up to layer {max(stored)}): "
            "config.json and weights do not belong together, or the download is incomplete"
        )
        raise CheckpointError(msg)
    known = set(names)
    problems = [] if stored else ["no tensor is named model.layers.*"]
    try:
        expected = expected_shapes(model, layout_of(family, store.names)) if stored else {}
    except CheckpointError as error:
        msg = f"{ref}: {error}"
        raise CheckpointError(msg) from error
    for name, shape in expected.items():
        if name not in known:
            problems.append(f"{name} is missing")
        elif store.shape(name) != shape:
            problems.append(f"{name} has shape {list(store.shape(name))}, config says {list(shape)}")
        elif store.dtype(name) in _NOT_WEIGHTS:
            problems.append(f"{name} has dtype {store.dtype(name)}, wanted a float dtype")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        advice = "download it again" if store.files else "give Hugging Face names and weights of shape (out, in)"
        msg = f"{ref}: not a complete {family.name} model: {'; '.join(problems[:_SHOWN])}{more}: {advice}"
        raise CheckpointError(msg)


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor, None for one outside the layers."""
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[2].isdecimal() and len(parts[2]) < 10:
        return int(parts[2])
    return None


def layout_of(family: Family, names: Callable[[], list[str]]) -> Mapping[str, str] | None:
    """Return which of the layouts of a family's experts a model is stored in; None for a family without experts."""
    if family.experts is None:
        return None
    stored = {name.split(".", 3)[-1] for name in names() if name.startswith("model.layers.")}
    layouts = family.experts.layouts
    return next((layout for layout in layouts if layout["down"].format(0) in stored), layouts[0])


def is_loadable(layout: Mapping[str, str]) -> bool:
    """Whether classes load unquantised experts under the names of a layout, unlike those of GGUF and of MXFP4."""
    merged = "gate" in layout and "{}" not in layout["gate"]
    return not merged and not any(path.endswith("_blocks") for path in layout.values())


def expert_shapes(
    experts: ExpertRules, dims: Dims, config: Mapping[str, Any], layout: Mapping[str, str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name in a layer and the shape of each tensor of its experts as they are stored."""
    sizes = experts.sizes(config)
    count, _, columns = expert_shape(experts, dims, config, "gate_up")
    width = sizes.width
    shapes: dict[str, tuple[int, ...]] = {
        "router": (count, dims.hidden),
        "router_bias": (count,),
        "correction": (1,) * (experts.correction_axes - 1) + (count,),
        "gate": (count, width, columns),
        "up": (count, width, columns),
        "gate_up": expert_shape(experts, dims, config, "gate_up"),
        "down": expert_shape(experts, dims, config, "down"),
        "gate_up_bias": (count, 2 * width),
        "gate_bias": (count, width),
        "up_bias": (count, width),
        "down_bias": (count, columns),
    }
    for name, path in layout.items():
        shape = shapes[name]
        if "{}" in path:
            yield from ((path.format(expert), shape[1:]) for expert in range(count))
        elif path in experts.transposed:
            yield path, (shape[0], shape[2], shape[1])
        else:
            yield path, shape


def expert_shape(experts: ExpertRules, dims: Dims, config: Mapping[str, Any], matrix: str) -> tuple[int, int, int]:
    """Return (E, O, I) of a matrix of the experts of a layer, "gate_up" or "down"."""
    sizes = experts.sizes(config)
    columns = dims.hidden if sizes.latent is None else sizes.latent
    if matrix == "down":
        return sizes.number, columns, sizes.width
    return sizes.number, (2 if experts.gated else 1) * sizes.width, columns


def expert_tensors(experts: ExpertRules) -> tuple[str, ...]:
    """Name the tensors of a layer that `read_expert_tensor` reads, each with a first axis of experts."""
    return tuple(experts.layouts[-1])


def read_expert_tensor(
    experts: ExpertRules, layout: Mapping[str, str], read: Callable[[str], np.ndarray], count: int, name: str
) -> np.ndarray:
    """Read a tensor of the experts of a layer: "gate_up" (E, 2 I, H) with the rows of gate first, "down" (E, H, I), ...

    Without a gate "gate_up" is (E, I, H). `read` takes the name of a tensor in the layer, `name` is one of
    `expert_tensors`, and `count` is E.
    """
    if name not in layout:  # gate and up on their own
        parts = [name.replace("gate_up", part) for part in single_parts(experts)]
        return np.concatenate([read_expert_tensor(experts, layout, read, count, part) for part in parts], axis=1)
    path = layout[name]
    if "{}" in path:
        return np.stack([read(path.format(expert)) for expert in range(count)])
    array = read(path)
    if path in experts.transposed:
        array = array.swapaxes(1, 2)
    if experts.interleaved and name in ("gate_up", "gate_up_bias"):
        array = array[:, _in_turn(array.shape[1])]
    return array.reshape(count, *array.shape[1:]) if name != "correction" else array.reshape(count)


def single_parts(experts: ExpertRules) -> tuple[str, ...]:
    """Name the matrices of an expert whose rows "gate_up" holds, in their order."""
    return ("gate", "up") if experts.gated else ("up",)


def _in_turn(count: int) -> np.ndarray:
    """Return the place of each row, those of gate first, where rows of gate and up take turns."""
    return np.arange(count).reshape(-1, 2).T.reshape(-1)


def is_transposed(experts: ExpertRules, layout: Mapping[str, str], matrix: str) -> bool:
    """Whether a matrix, "gate_up" or "down", is stored as (E, I, O), so that its stored rows are columns."""
    return layout.get(matrix) in experts.transposed


def stored_rows(
    experts: ExpertRules,
    layout: Mapping[str, str],
    shape: tuple[int, int, int],
    matrix: str,
    expert: int,
    ids: np.ndarray,
) -> list[tuple[str, np.ndarray]]:
    """Return where rows of a matrix of one expert are: names of tensors in a layer, and rows of each.

    The matrix, "gate_up" or "down", has `shape` (E, O, I). `ids` are (n,) of O, or of I where it is stored transposed,
    in increasing order.
    """
    if matrix not in layout:  # gate and up on their own
        names = single_parts(experts)
        height = shape[1] // len(names)
        own = (shape[0], height, shape[2])
        parts = [(name, ids[ids // height == place] - place * height) for place, name in enumerate(names)]
        return [place for part, rows in parts for place in stored_rows(experts, layout, own, part, expert, rows)]
    path = layout[matrix]
    if "{}" in path:
        return [(path.format(expert), ids)]
    transposed = is_transposed(experts, layout, matrix)
    if matrix == "gate_up" and experts.interleaved and not transposed:
        ids = _in_turn(shape[1])[ids]
    return [(path, expert * shape[2 if transposed else 1] + ids)]


def in_order(experts: ExpertRules, layout: Mapping[str, str], matrix: str, rows: np.ndarray) -> np.ndarray:
    """Return rows that were read at `stored_rows`, with the features of gate before those of up."""
    if matrix == "gate_up" and experts.interleaved and is_transposed(experts, layout, matrix):
        return rows[:, _in_turn(rows.shape[1])]
    return rows
