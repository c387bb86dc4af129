"""Names of tensors in GGUF files and in the Hugging Face convention, by the families' own names."""

from collections.abc import Mapping
from functools import cache

from jcrosslora.architectures.blocks import LINEARS, ROLE_PATHS, Experts, PerLayerInput
from jcrosslora.architectures.expert_rules import ExpertRules
from jcrosslora.architectures.families import FAMILIES
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.layer import GGUF_NORMS
from jcrosslora.architectures.names import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    LAYER_EMBEDDING,
    LAYER_INPUT_NORM,
    LAYER_INPUT_PROJECTION,
    QKV,
)
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES

# Matrices of several roles -> their names in GGUF.
_FUSED = {QKV: "attn_qkv", ("gate_proj", "up_proj"): "ffn_up"}
# Of what makes the inputs that each layer has beside the stream.
_LAYER_INPUTS = {
    "per_layer_token_embd.weight": LAYER_EMBEDDING,
    "per_layer_model_proj.weight": LAYER_INPUT_PROJECTION,
    "per_layer_proj_norm.weight": LAYER_INPUT_NORM,
}


def architecture(family: str, has_experts: bool) -> str | None:
    """Return `general.architecture` of the GGUF files of a family, None if it has none or is not known.

    Args:
        family: its name.
        has_experts: whether a layer of the model has experts.
    """
    form = FAMILIES[family].gguf if family in FAMILIES else None
    return None if form is None else form.architectures[-1 if has_experts else 0]


def permutes_heads(arch: str) -> bool:
    """Whether rows of q and k are in the order of llama.cpp's rotation in files of an architecture."""
    form = FAMILIES[ARCHITECTURES[arch]].gguf if arch in ARCHITECTURES else None
    return form is not None and form.permuted


def hf_name(stored: str, arch: str) -> str | None:
    """Return the Hugging Face name of a tensor of a GGUF file, None if it is not known.

    The rows of a tensor may be in several of the file, and may be in another order there: see `gguf_tensors`.
    """
    if (whole := _outside(arch).get(stored)) is not None:
        return whole
    parts, block = stored.split(".", 2), block_names(arch)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in block:
        return f"model.layers.{parts[1]}.{block[parts[2]]}"
    return None


def gguf_name(name: str, arch: str) -> str | None:
    """Return the GGUF name of a tensor of a layer by its Hugging Face name.

    None if no tensor holds its rows and columns, in their order but for that of the heads of q and k.
    """
    parts = name.split(".", 3)
    form = FAMILIES[ARCHITECTURES[arch]].gguf
    assert form is not None
    if len(parts) != 4 or parts[:2] != ["model", "layers"] or (form.tiled and parts[3].startswith("linear_attn.")):
        return None
    found = [stored for stored, path in block_names(arch).items() if path == parts[3]]
    return f"blk.{parts[2]}.{found[0]}" if len(found) == 1 else None


@cache
def _outside(arch: str) -> dict[str, str]:
    """Return the names of tensors outside the layers."""
    family = FAMILIES[ARCHITECTURES[arch]]
    assert family.gguf is not None
    names = {"token_embd.weight": EMBEDDING, "output.weight": HEAD, "output.bias": HEAD_BIAS}
    names |= {f"{family.gguf.final_norm}.{kind}": f"{family.final_norm}.{kind}" for kind in ("weight", "bias")}
    return names | (_LAYER_INPUTS if PerLayerInput in family.blocks else {})


@cache
def block_names(arch: str) -> dict[str, str]:
    """Return the names of the tensors of a layer, in files and in the model; rows of one are in order of the names."""
    names: dict[str, str] = {}
    for family in FAMILIES.values():
        if family.gguf is not None and arch in family.gguf.architectures:
            names |= _names_of(family)
    return names


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
    """Return the layout with one tensor of all experts for each of gate, up and down, or else for both of the first."""
    merged = (one for one in experts.layouts if "gate" in one and "{}" not in one["gate"])
    layout = next(merged, experts.layouts[-1])
    return layout if experts.gated else {**layout, "up": layout["gate_up"]}  # which holds nothing else
