"""The tensors of a model in a GGUF file: find them by name, and undo the changes of llama.cpp's converter.

The converter reorders the rows of q and k in Llama and similar families for its rotary layout, and the tensors that
Qwen3.5 and Qwen3-Next store by groups of heads. It stores gains as 1 + weight, and A instead of its logarithm. Source:
the `conversion` folder of llama.cpp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np

from jcrosslora.architectures import FAMILIES, ROLE_PATHS, Architecture, ExpertRules, Family
from jcrosslora.architectures.architecture import GGUF_NORMS
from jcrosslora.architectures.blocks import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    LAYER_EMBEDDING,
    LAYER_INPUT_NORM,
    LAYER_INPUT_PROJECTION,
    LINEARS,
    QKV,
    DeltaRule,
    Experts,
    LatentAttention,
    PerLayerInput,
)
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES
from jcrosslora.checkpoint.layout import holder_of

Shape = tuple[int, ...]
_DELTA = "linear_attn."
_GROUPED_NORMS = ("mamba.norm.weight", "mixer.norm.weight")  # files have a row of each group
# Matrices of several roles -> their names in GGUF.
_FUSED = {QKV: "attn_qkv", ("gate_proj", "up_proj"): "ffn_up"}
# Tensors of the per-layer inputs.
_LAYER_INPUTS = {
    "per_layer_token_embd.weight": LAYER_EMBEDDING,
    "per_layer_model_proj.weight": LAYER_INPUT_PROJECTION,
    "per_layer_proj_norm.weight": LAYER_INPUT_NORM,
}


@dataclass(frozen=True)
class Source:
    """Where a tensor of a model is in a file.

    Attributes:
        stored: names of tensors in the file, whose rows stand one after another.
        rows: (rows,) row of the stored ones for each row of the tensor; None if they are in order.
        columns: the same for columns.
        offset: number that the file adds to a norm.
        form: "log" if the file holds -exp(tensor); "latent" if it holds keys (H, R, N) and values (H, P, R) of heads
            that a matrix (H (N + P), R) has; else None.
    """

    stored: tuple[str, ...]
    shape: Shape
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    offset: float = 0.0
    form: Literal["log", "latent"] | None = None


def find_sources(
    names: Mapping[str, Sequence[str]], shapes: Mapping[str, Shape], model: Architecture
) -> dict[str, Source]:
    """Find the source of every tensor.

    `names` maps a Hugging Face name to those in the file, `shapes` a name in the file to its shape.
    """
    family, delta = model.family, None
    if DeltaRule in family.blocks:  # Of other models no layer is looked at before the tensors are.
        delta = next((layer.mixer for layer in model.stack if isinstance(layer.mixer, DeltaRule)), None)
    offset = {f"{norm}.weight" for norm in family.norms.values()} if family.gain_offset else frozenset()
    found = {}
    for name, stored in names.items():
        path = name.split(".", 3)[-1] if name.startswith("model.layers.") else name
        parts = [shapes[one] for one in stored]
        if len(parts) == 2 and path.endswith("kv_b_proj.weight"):
            found[name] = Source(tuple(stored), _latent_shape(parts, family), form="latent")
            continue
        found[name] = Source(
            tuple(stored),
            _shape(path, parts),
            *_orders(path, sum(shape[0] for shape in parts if shape), model, delta),
            offset=family.gain_offset if path in offset or name == f"{family.final_norm}.weight" else 0.0,
            form="log" if path.endswith(".A_log") else None,
        )
    return found


def unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """Return the row of the GGUF file for each row in Hugging Face order, (rows,) integers.

    Within a head of size D, Hugging Face pairs row j with row j + D/2 for the rotation; GGUF stores each pair at rows
    2j and 2j + 1. `rows` is a multiple of 2 * heads.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def untiled_heads(delta: DeltaRule, size: int) -> np.ndarray:
    """Return the index in the file of each feature of H value heads of this size, (H size,) integers.

    The file stores the first heads of all groups, then the second ones, and so on.
    """
    return np.arange(delta.heads * size).reshape(-1, delta.groups, size).swapaxes(0, 1).reshape(-1)


def grouped_rows(delta: DeltaRule) -> np.ndarray:
    """Return the row of queries, keys, values and gates, stored one after another, for each row sorted by group."""
    starts = np.cumsum([0, *[delta.groups * delta.key_size] * 2, delta.inner, delta.inner])
    parts = [np.arange(*ends).reshape(delta.groups, -1) for ends in pairwise(starts)]
    return np.concatenate(parts, axis=1).reshape(-1)


def architecture(family: str, has_experts: bool) -> str | None:
    """Return `general.architecture` of a family's GGUF files; None if there is none or the family is unknown."""
    form = FAMILIES[family].gguf if family in FAMILIES else None
    return None if form is None else form.architectures[-1 if has_experts else 0]


def permutes_heads(arch: str) -> bool:
    """Tell whether files of an architecture store q and k rows in llama.cpp's rotation order."""
    form = FAMILIES[ARCHITECTURES[arch]].gguf if arch in ARCHITECTURES else None
    return form is not None and form.permuted


def hf_name(stored: str, arch: str) -> str | None:
    """Return the Hugging Face name of a tensor of a GGUF file, None if it is unknown.

    The file may store a tensor's rows in several tensors and in another order: see `gguf_tensors`.
    """
    if (whole := _outside(arch).get(stored)) is not None:
        return whole
    parts, block = stored.split(".", 2), block_names(arch)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in block:
        return f"model.layers.{parts[1]}.{block[parts[2]]}"
    return None


def gguf_name(name: str, arch: str) -> str | None:
    """Return the GGUF name of a layer's tensor by its Hugging Face name.

    None if no single tensor holds its rows and columns in their order (except within the heads of q and k).
    """
    parts = name.split(".", 3)
    form = FAMILIES[ARCHITECTURES[arch]].gguf
    assert form is not None
    if len(parts) != 4 or parts[:2] != ["model", "layers"] or (form.tiled and parts[3].startswith("linear_attn.")):
        return None
    found = [stored for stored, path in block_names(arch).items() if path == parts[3]]
    return f"blk.{parts[2]}.{found[0]}" if len(found) == 1 else None


@cache
def block_names(arch: str) -> dict[str, str]:
    """Map tensor names of a layer in files to names in the model; the parts of one tensor come in row order."""
    names: dict[str, str] = {}
    for family in FAMILIES.values():
        if family.gguf is not None and arch in family.gguf.architectures:
            names |= _names_of(family)
    return names


def _shape(path: str, parts: Sequence[Shape]) -> Shape:
    """Return the shape of a tensor of the model from the shapes of the stored tensors that hold its rows."""
    whole = (sum(shape[0] for shape in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
    if path.endswith((".conv1d.weight", "conv.conv.weight")):
        return (*whole[:-1], 1, *whole[-1:])
    if path.endswith((".A_log", ".D")) or path in _GROUPED_NORMS:
        return (int(np.prod(whole)),)
    return whole


def _latent_shape(parts: Sequence[Shape], family: Family) -> Shape:
    keys, values = parts
    stacks = LatentAttention in family.blocks and len(keys) == len(values) == 3
    if not stacks or (keys[0], keys[1]) != (values[0], values[2]):
        return ()  # no matrix has this shape, so the tensor is refused
    return (keys[0] * (keys[2] + values[1]), keys[1])


def _orders(
    path: str, rows: int, model: Architecture, delta: DeltaRule | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the stored order of a tensor's rows and columns, None for the usual order."""
    family = model.family
    assert family.gguf is not None
    module = path.rpartition(".")[0]
    if family.gguf.permuted and module in (holder_of(family, "q_proj"), holder_of(family, "k_proj")):
        key = "num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"
        return unpermuted_rows(rows, model.config[key]), None
    if delta is not None and module == "linear_attn.in_proj_qkvz":
        return grouped_rows(delta), None
    if delta is None or not family.gguf.tiled or not path.startswith(_DELTA):
        return None, None
    first = 2 * delta.groups * delta.key_size
    match path.removeprefix(_DELTA).removesuffix(".weight"):
        case "in_proj_qkv" | "conv1d":
            return np.concatenate([np.arange(first), first + untiled_heads(delta, delta.value_size)]), None
        case "in_proj_z":
            return untiled_heads(delta, delta.value_size), None
        case "in_proj_b" | "in_proj_a" | "A_log" | "dt_bias":
            return untiled_heads(delta, 1), None
        case "out_proj":
            return None, untiled_heads(delta, delta.value_size)
    return None, None


@cache
def _outside(arch: str) -> dict[str, str]:
    """Return the names of tensors outside the layers."""
    family = FAMILIES[ARCHITECTURES[arch]]
    assert family.gguf is not None
    names = {"token_embd.weight": EMBEDDING, "output.weight": HEAD, "output.bias": HEAD_BIAS}
    names |= {f"{family.gguf.final_norm}.{kind}": f"{family.final_norm}.{kind}" for kind in ("weight", "bias")}
    return names | (_LAYER_INPUTS if PerLayerInput in family.blocks else {})


def _names_of(family: Family) -> dict[str, str]:
    assert family.gguf is not None
    linears = [linear for block in family.all_blocks for linear in block.LINEARS]
    held = {ROLE_PATHS[role] for roles in family.fused.values() for role in roles}
    own = {linear.path: (linear.role,) for linear in linears if linear.path not in held}
    named = _FUSED | {(role,): linear.gguf for role, linear in LINEARS.items()}
    stems = {name: path for path, roles in {**family.fused, **own}.items() if (name := named.get(roles)) is not None}
    places = GGUF_NORMS | {place: name for block in family.all_blocks for place, name in block.GGUF_NORMS.items()}
    places |= dict(family.gguf.names)
    stems |= {places[place]: norm for place, norm in family.norms.items() if place in places}
    usual = {f"{stem}.{kind}": f"{path}.{kind}" for stem, path in stems.items() for kind in ("weight", "bias")}
    if family.experts is not None:
        layout = _gguf_layout(family.experts)
        usual |= {stored: layout[name] for stored, name in Experts.GGUF_TENSORS.items() if name in layout}
    first = dict(family.gguf.tensors)
    return first | {stored: path for stored, path in usual.items() if stored not in first}


def _gguf_layout(experts: ExpertRules) -> Mapping[str, str]:
    """Return the layout that stores all experts in one gate, one up and one down tensor, or with gate and up merged."""
    merged = (one for one in experts.layouts if "gate" in one and "{}" not in one["gate"])
    layout = next(merged, experts.layouts[-1])
    return layout if experts.gated else {**layout, "up": layout["gate_up"]}  # which holds nothing else
