"""Names and shapes of a model's tensors, and the location of each linear module and expert in them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jcrosslora.architectures import ROLE_PATHS, Architecture, ExpertRules, Family, Layer, module_name
from jcrosslora.architectures.blocks import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    LAYER_EMBEDDING,
    LAYER_INPUT_NORM,
    LAYER_INPUT_PROJECTION,
    Experts,
)
from jcrosslora.checkpoint.store import TensorStore, errors_of
from jcrosslora.errors import CheckpointError

# Layers after the last one for multi-token prediction, which the class does not read.
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
    """Return the path, within a layer, of the stored module that holds a role."""
    return next((path for path, roles in family.fused.items() if role in roles), ROLE_PATHS[role])


def fused_modules(model: Architecture) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """List the fused modules: name -> (logical name, first row, last row exclusive)."""
    result = {}
    for number, layer in enumerate(model.stack):
        for path, roles in _fused(model.family, layer).items():
            ends = list(itertools.accumulate((layer.shapes[role][0] for role in roles), initial=0))
            names = [module_name(number, role) for role in roles]
            result[f"model.layers.{number}.{path}"] = tuple(zip(names, ends[:-1], ends[1:], strict=True))
    return result


def _fused(family: Family, layer: Layer) -> dict[str, tuple[str, ...]]:
    """Return the fused modules of a layer and the roles in each."""
    return {path: roles for path, roles in family.fused.items() if roles[0] in layer.shapes}


def build_modules(
    model: Architecture, fused: Mapping[str, tuple[tuple[str, int, int], ...]], store: TensorStore
) -> dict[str, Module]:
    """List the logical modules, by layer, then in the order of `ROLES`; `fused` comes from `fused_modules`."""
    holders = {part: (name, (start, stop)) for name, rows in fused.items() for part, start, stop in rows}
    modules = {}
    for number, layer in enumerate(model.stack):
        for role in (role for role in model.role_shapes if role in layer.shapes):
            name = module_name(number, role)
            holder, rows = holders.get(name, (name, None))
            tensor = f"{holder}.weight"
            modules[name] = Module(name, number, role, layer.shapes[role], tensor, rows, store.dtype(tensor))
    return modules


def expected_shapes(model: Architecture, experts: Mapping[str, str] | None = None) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every required tensor; `experts` is one of `ExpertRules.layouts` (first by default)."""
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
    if family.experts is not None and layer.experts is not None:
        yield from _stored_shapes(family.experts, experts or family.experts.layouts[0], layer.experts)
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

    Raises CheckpointError for missing or misshapen tensors; it names the first few and counts the rest.
    """
    names, family, dims = store.names(), model.family, model.dims
    # Checked before any loop over layers: a hostile configuration may claim 2^30 of them.
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
            problems.append(f"{name} has dtype {store.dtype(name)}, expected a float dtype")
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


def layout_of(family: Family, names: Callable[[], list[str]]) -> Mapping[str, str] | None:
    """Return the layout in which a model stores its experts; None for a family without experts."""
    if family.experts is None:
        return None
    stored = {name.split(".", 3)[-1] for name in names() if name.startswith("model.layers.")}
    layouts = family.experts.layouts
    return next((layout for layout in layouts if layout["down"].format(0) in stored), layouts[0])


def is_loadable(layout: Mapping[str, str]) -> bool:
    """Tell whether classes load unquantised experts under a layout's names, which they do not for GGUF and MXFP4."""
    merged = "gate" in layout and "{}" not in layout["gate"]
    return not merged and not any(path.endswith("_blocks") for path in layout.values())


def expert_tensors(rules: ExpertRules) -> tuple[str, ...]:
    """Return the names that `StoredExperts.tensor` accepts; each tensor has a first axis of experts."""
    return tuple(rules.layouts[-1])


def single_parts(rules: ExpertRules) -> tuple[str, ...]:
    """Return the names of the matrices that make up "gate_up", in order."""
    return ("gate", "up") if rules.gated else ("up",)


def _stored_shapes(
    rules: ExpertRules, paths: Mapping[str, str], block: Experts
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the path in a layer and the shape of each tensor of experts, stored in one of `ExpertRules.layouts`."""
    count, columns, width = block.matrix_shape("down")
    shapes: dict[str, tuple[int, ...]] = {
        "router": (count, block.hidden),
        "router_bias": (count,),
        "correction": (1,) * (rules.correction_axes - 1) + (count,),
        "gate": (count, width, columns),
        "up": (count, width, columns),
        "gate_up": block.matrix_shape("gate_up"),
        "down": (count, columns, width),
        "gate_up_bias": (count, 2 * width),
        "gate_bias": (count, width),
        "up_bias": (count, width),
        "down_bias": (count, columns),
    }
    for name, path in paths.items():
        shape = shapes[name]
        if "{}" in path:
            yield from ((path.format(expert), shape[1:]) for expert in range(count))
        else:
            yield path, (shape[0], shape[2], shape[1]) if path in rules.transposed else shape


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """The experts of an opened model, read from its tensors; `paths` is one of `ExpertRules.layouts`."""

    rules: ExpertRules
    paths: Mapping[str, str]
    block: Experts
    store: TensorStore

    def shape(self, matrix: str) -> tuple[int, int, int]:
        """Return (E, O, I) of a matrix of all experts of a layer, "gate_up" or "down"."""
        return self.block.matrix_shape(matrix)

    def axis(self, matrix: str) -> int:
        """Return the axis of `shape` that `rows` counts: 2 if the matrix is stored transposed."""
        return 2 if self.paths.get(matrix) in self.rules.transposed else 1

    def names(self, layer: int) -> tuple[str, ...]:
        """Return the names of the tensors of a layer's experts as they are stored."""
        return tuple(_in_layer(layer, path) for path, _ in _stored_shapes(self.rules, self.paths, self.block))

    def dtype(self, layer: int, matrix: str) -> str:
        """Return the storage dtype of a matrix, "gate_up" or "down"."""
        path = self.paths["up" if matrix not in self.paths else matrix]
        return self.store.dtype(_in_layer(layer, path.format(0)))

    def tensor(self, layer: int, name: str) -> np.ndarray:
        """Read a tensor of all experts: "gate_up" (E, 2 I, H) with the rows of gate first, "down" (E, H, I), ...

        Without a gate "gate_up" is (E, I, H). `name` is one of `expert_tensors`.

        Raises CheckpointError if its dtype cannot be read.
        """
        if name not in self.paths:  # gate and up on their own
            parts = [name.replace("gate_up", part) for part in single_parts(self.rules)]
            return np.concatenate([self.tensor(layer, part) for part in parts], axis=1)
        path, count = self.paths[name], self.block.routing.count
        if "{}" in path:
            return np.stack([self.store.tensor(_in_layer(layer, path.format(expert))) for expert in range(count)])
        array = self.store.tensor(_in_layer(layer, path))
        if path in self.rules.transposed:
            array = array.swapaxes(1, 2)
        if self.rules.interleaved and name in ("gate_up", "gate_up_bias"):
            array = array[:, _in_turn(array.shape[1])]
        return array.reshape(count) if name == "correction" else array.reshape(count, *array.shape[1:])

    def rows(self, layer: int, matrix: str, expert: int, ids: np.ndarray) -> np.ndarray:
        """Read only the given rows of a matrix of one expert, as float32 (n, columns).

        `ids` (n,) count `axis` of the matrix, "gate_up" or "down", in increasing order.
        """
        found = self._stored_rows(matrix, expert, np.asarray(ids, np.int64), self.shape(matrix))
        rows = np.concatenate([self.store.rows(_in_layer(layer, path), own) for path, own in found])
        if matrix == "gate_up" and self.rules.interleaved and self.axis(matrix) == 2:
            return rows[:, _in_turn(rows.shape[1])]
        return rows

    def _stored_rows(
        self, matrix: str, expert: int, ids: np.ndarray, shape: tuple[int, int, int]
    ) -> list[tuple[str, np.ndarray]]:
        """Return where rows of a matrix are stored: tensor paths in a layer, and the rows of each."""
        if matrix not in self.paths:  # gate and up on their own
            names = single_parts(self.rules)
            height = shape[1] // len(names)
            parts = [(name, ids[ids // height == place] - place * height) for place, name in enumerate(names)]
            own = (shape[0], height, shape[2])
            return [found for name, rows in parts for found in self._stored_rows(name, expert, rows, own)]
        path = self.paths[matrix]
        if "{}" in path:
            return [(path.format(expert), ids)]
        axis = self.axis(matrix)
        if matrix == "gate_up" and self.rules.interleaved and axis == 1:
            ids = _in_turn(shape[1])[ids]
        return [(path, expert * shape[axis] + ids)]


def _in_layer(layer: int, path: str) -> str:
    return f"model.layers.{layer}.{path}"


def _in_turn(count: int) -> np.ndarray:
    """Return the stored index of each row, gate rows first, for a matrix where gate and up rows alternate."""
    return np.arange(count).reshape(-1, 2).T.reshape(-1)
