"""Names and shapes of the tensors of a model, and the place of each linear module in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jcrosslora.checkpoint.config import Dims
from jcrosslora.checkpoint.experts import expert_shapes, layout_of
from jcrosslora.checkpoint.families import EMBEDDING, HEAD, HEAD_BIAS, ROLE_PATHS, Family
from jcrosslora.checkpoint.family.names import LAYER_EMBEDDING, LAYER_INPUT_NORM, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint.family.parts import LayerParts, holds
from jcrosslora.checkpoint.family.rules import HeadSizes
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
        layer: index of its layer.
        role: one of `families.ROLES`.
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


def role_shapes(family: Family, dims: Dims, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the shape (O, I) of each role of a family."""
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    usual = {
        "q_proj": (queries, dims.hidden),
        "qg_proj": (2 * queries, dims.hidden),
        "k_proj": (keys, dims.hidden),
        "v_proj": (keys, dims.hidden),
        "o_proj": (dims.hidden, queries),
        "gate_proj": (dims.intermediate, dims.hidden),
        "up_proj": (dims.intermediate, dims.hidden),
        "down_proj": (dims.hidden, dims.intermediate),
    }
    if family.global_heads is not None:
        usual |= _global_shapes(family.global_heads(config), dims)
    usual |= {f"wide_{role}": (2 * usual[role][0], dims.hidden) for role in ("gate_proj", "up_proj")}
    usual |= {"wide_down_proj": (dims.hidden, 2 * dims.intermediate), "kv_shared_q_proj": usual["q_proj"]}
    inputs = family.layer_inputs(config)
    usual |= {"per_layer_input_gate": (inputs, dims.hidden), "per_layer_projection": (dims.hidden, inputs)}
    mixer = family.mixer_of(config)
    known = usual if mixer is None else usual | mixer.role_shapes()
    known |= {role: shape(dims, config) for role, shape in family.shapes.items()}
    return {role: known[role] for role in family.roles}


def _global_shapes(heads: HeadSizes, dims: Dims) -> dict[str, tuple[int, int]]:
    queries, keys = dims.heads * heads.size, heads.kv_heads * heads.size
    return {
        **dict.fromkeys(("global_q_proj", "global_kv_shared_q_proj"), (queries, dims.hidden)),
        **dict.fromkeys(("global_k_proj", "global_v_proj"), (keys, dims.hidden)),
        "global_o_proj": (dims.hidden, queries),
    }


def holder_of(family: Family, role: str) -> str:
    """Return the path, in a layer, of the module as the model stores it that holds a role."""
    return next((path for path, roles in family.fused.items() if role in roles), ROLE_PATHS[role])


def fused_modules(family: Family, dims: Dims, config: Mapping[str, Any]) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """List the modules with names of their own: name -> (logical name, first row, last row exclusive)."""
    shapes, result = role_shapes(family, dims, config), {}
    for layer, parts in enumerate(family.layer_parts(config, dims.layers)):
        result |= _fused_rows(family, shapes, layer, parts)
    return result


def _fused_rows(
    family: Family, shapes: Mapping[str, tuple[int, int]], layer: int, parts: LayerParts
) -> dict[str, tuple[tuple[str, int, int], ...]]:
    result = {}
    for path, roles in family.fused.items():
        if not holds(parts, roles[0]):
            continue
        rows, start = [], 0
        for role in roles:
            rows.append((f"model.layers.{layer}.{ROLE_PATHS[role]}", start, start + shapes[role][0]))
            start += shapes[role][0]
        result[f"model.layers.{layer}.{path}"] = tuple(rows)
    return result


def build_modules(family: Family, dims: Dims, config: Mapping[str, Any], store: TensorStore) -> dict[str, Module]:
    """List the logical modules, by layer, then in the order of `family.roles`."""
    modules = {}
    shapes = role_shapes(family, dims, config)
    for layer, parts in enumerate(family.layer_parts(config, dims.layers)):
        places = {
            part: (fused, (start, stop))
            for fused, rows in _fused_rows(family, shapes, layer, parts).items()
            for part, start, stop in rows
        }
        for role in (role for role in family.roles if holds(parts, role)):
            name = f"model.layers.{layer}.{ROLE_PATHS[role]}"
            holder, rows = places.get(name, (name, None))
            tensor = f"{holder}.weight"
            modules[name] = Module(name, layer, role, shapes[role], tensor, rows, store.dtype(tensor))
    return modules


def expected_shapes(
    family: Family, dims: Dims, config: Mapping[str, Any], experts: Mapping[str, str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that the model must have, its experts in a layout of `Experts.layouts`."""
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (dims.vocab, dims.hidden)}
    expected |= dict(_norm_tensors(family, family.final_norm, dims.hidden))
    if not family.is_tied(config):
        expected[HEAD] = (dims.vocab, dims.hidden)
    if family.has_head_bias(config):
        expected[HEAD_BIAS] = (dims.vocab,)
    if inputs := family.layer_inputs(config):
        expected |= {
            LAYER_EMBEDDING: (dims.vocab, dims.layers * inputs),
            LAYER_INPUT_PROJECTION: (dims.layers * inputs, dims.hidden),
            LAYER_INPUT_NORM: (inputs,),
        }
    parts = family.layer_parts(config, dims.layers)
    in_layer = {own: dict(_layer_shapes(family, dims, config, own, experts)) for own in set(parts)}
    for layer, own in enumerate(parts):
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer[own].items()}
    return expected


def norm_sizes(family: Family, dims: Dims, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of features that each norm of a layer normalises, by the names of `Family.norms`."""
    counts = {"q": dims.heads, "k": dims.kv_heads}
    own = {"q_a": "q_lora_rank", "kv_a": "kv_lora_rank"}
    size = 0 if family.global_heads is None else family.global_heads(config).size
    return {
        name: dims.head_dim * (counts[name] if family.qk_norms == "whole" else 1)
        if name in counts
        else config.get(own[name]) or 0
        if name in own
        else size
        if name in ("global_q", "global_k")
        else dims.hidden
        for name in family.layer_norms(config)
    }


def _norm_tensors(family: Family, norm: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{norm}.weight", (size,)
    if family.norm_biases:
        yield f"{norm}.bias", (size,)


def _layer_shapes(
    family: Family, dims: Dims, config: Mapping[str, Any], parts: LayerParts, experts: Mapping[str, str] | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes, norms = role_shapes(family, dims, config), family.layer_norms(config)
    for name, size in norm_sizes(family, dims, config).items():
        if holds(parts, name):
            yield from _norm_tensors(family, norms[name], size)
    if family.experts is not None and holds(parts, "router"):
        yield from expert_shapes(family.experts, dims, config, experts or family.experts.layouts[0])
    for name, tensor in family.layer_tensors(config).items():
        if holds(parts, name):
            yield tensor.path, tensor.shape(dims, config)
    holders = {path: roles for path, roles in family.fused.items() if holds(parts, roles[0])}
    held = {role for roles in holders.values() for role in roles}
    holders |= {ROLE_PATHS[role]: (role,) for role in family.roles if role not in held and holds(parts, role)}
    biased = set(family.biased_roles(config))
    for path, roles in holders.items():
        rows = sum(shapes[role][0] for role in roles)
        yield f"{path}.weight", (rows, shapes[roles[0]][1])
        if biased.issuperset(roles):
            yield f"{path}.bias", (rows,)
    for name, usual in family.activation_tensors.items():
        if usual is None:
            yield name, (1,)


def check_tensors(family: Family, dims: Dims, config: Mapping[str, Any], store: TensorStore, ref: str) -> None:
    """Check that a checkpoint has the tensors that its configuration calls for.

    Raises:
        CheckpointError: missing or misshapen tensors; the message names the first few and counts the rest.
    """
    names = store.names()
    # Compared before any loop over layers: a hostile configuration may claim 2^30 of them.
    stored = {part for name in names if (part := layer_of(name)) is not None}
    extra = config.get(_MORE_LAYERS)
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
        expected = expected_shapes(family, dims, config, layout_of(family, store.names)) if stored else {}
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
