"""Names and shapes of the tensors of a model, and the place of each linear module in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jcrosslora.checkpoint.config import Dims
from jcrosslora.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, ROLE_PATHS, ROLES, Family
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError

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


def role_shapes(dims: Dims) -> dict[str, tuple[int, int]]:
    """Return the shape (O, I) of each role."""
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return {
        "q_proj": (queries, dims.hidden),
        "k_proj": (keys, dims.hidden),
        "v_proj": (keys, dims.hidden),
        "o_proj": (dims.hidden, queries),
        "gate_proj": (dims.intermediate, dims.hidden),
        "up_proj": (dims.intermediate, dims.hidden),
        "down_proj": (dims.hidden, dims.intermediate),
    }


def fused_rows(family: Family, dims: Dims, layer: int) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """List the fused modules of a layer: name -> (logical name, first row, last row exclusive) in row order."""
    shapes, result = role_shapes(dims), {}
    for path, roles in family.fused.items():
        parts, start = [], 0
        for role in roles:
            parts.append((f"model.layers.{layer}.{ROLE_PATHS[role]}", start, start + shapes[role][0]))
            start += shapes[role][0]
        result[f"model.layers.{layer}.{path}"] = tuple(parts)
    return result


def build_modules(family: Family, dims: Dims, store: TensorStore) -> dict[str, Module]:
    """List the logical modules, by layer, then in the order of `families.ROLES`."""
    modules = {}
    shapes = role_shapes(dims)
    for layer in range(dims.layers):
        places = {
            part: (fused, (start, stop))
            for fused, parts in fused_rows(family, dims, layer).items()
            for part, start, stop in parts
        }
        for role in ROLES:
            name = f"model.layers.{layer}.{ROLE_PATHS[role]}"
            holder, rows = places.get(name, (name, None))
            tensor = f"{holder}.weight"
            modules[name] = Module(name, layer, role, shapes[role], tensor, rows, store.dtype(tensor))
    return modules


def expected_shapes(family: Family, dims: Dims, config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that the model must have."""
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (dims.vocab, dims.hidden), FINAL_NORM: (dims.hidden,)}
    if not family.is_tied(config):
        expected[HEAD] = (dims.vocab, dims.hidden)
    in_layer = dict(_layer_shapes(family, dims, config))
    for layer in range(dims.layers):
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    return expected


def _layer_shapes(family: Family, dims: Dims, config: Mapping[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = role_shapes(dims)
    for norm in family.norms:
        yield f"{norm}.weight", (dims.hidden,)
    for norm in family.head_norms:
        yield f"{norm}.weight", (dims.head_dim,)
    held_in_fused = {role for roles in family.fused.values() for role in roles}
    for path, roles in family.fused.items():
        yield f"{path}.weight", (sum(shapes[role][0] for role in roles), dims.hidden)
    for role in ROLES:
        if role not in held_in_fused:
            yield f"{ROLE_PATHS[role]}.weight", shapes[role]
    for role in family.biased_roles(config):
        yield f"{ROLE_PATHS[role]}.bias", (shapes[role][0],)


def check_tensors(family: Family, dims: Dims, config: Mapping[str, object], store: TensorStore, ref: str) -> None:
    """Check that a checkpoint has the tensors that its configuration calls for.

    Raises:
        CheckpointError: missing or misshapen tensors; the message names the first few and counts the rest.
    """
    names = store.names()
    # Compared before any loop over layers: a hostile configuration may claim 2^30 of them.
    stored = {part for name in names if (part := _layer_of(name)) is not None}
    if stored and (dims.layers > len(stored) or max(stored) >= dims.layers):
        msg = (
            f"{ref}: config says {dims.layers} layers, the weights hold {len(stored)} (up to layer {max(stored)}): "
            "config.json and weights do not belong together, or the download is incomplete"
        )
        raise CheckpointError(msg)
    known = set(names)
    problems = [] if stored else ["no tensor is named model.layers.*"]
    for name, shape in expected_shapes(family, dims, config).items() if stored else ():
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


def _layer_of(name: str) -> int | None:
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[2].isdecimal() and len(parts[2]) < 10:
        return int(parts[2])
    return None
