"""Names of tensors in GGUF files and in the Hugging Face convention, by the families' own names."""

from collections.abc import Mapping
from functools import cache

from jcrosslora.checkpoint.families import EMBEDDING, FAMILIES, HEAD, HEAD_BIAS, ROLE_PATHS, ROLES, Family
from jcrosslora.checkpoint.family.experts import Experts
from jcrosslora.checkpoint.family.names import (
    DENSE_ROLES,
    LAYER_EMBEDDING,
    LAYER_INPUT_NORM,
    LAYER_INPUT_PROJECTION,
    PER_LAYER,
)
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES

# Roles that a matrix holds -> its name in GGUF.
_MATRICES: dict[tuple[str, ...], str] = {
    ("q_proj",): "attn_q",
    ("k_proj",): "attn_k",
    ("v_proj",): "attn_v",
    ("q_proj", "k_proj", "v_proj"): "attn_qkv",
    ("o_proj",): "attn_output",
    ("qg_proj",): "attn_q",
    ("q_a_proj",): "attn_q_a",
    ("q_b_proj",): "attn_q_b",
    ("kv_a_proj_with_mqa",): "attn_kv_a_mqa",
    ("kv_b_proj",): "attn_kv_b",
    ("conv_in_proj",): "shortconv.in_proj",
    ("conv_out_proj",): "shortconv.out_proj",
    ("in_proj_qkv",): "attn_qkv",
    ("in_proj_z",): "attn_gate",
    ("in_proj_b",): "ssm_beta",
    ("in_proj_a",): "ssm_alpha",
    ("in_proj_ba",): "ssm_ba",
    ("delta_out_proj",): "ssm_out",
    ("mamba_in_proj",): "ssm_in",
    ("mamba_out_proj",): "ssm_out",
    ("gate_proj",): "ffn_gate",
    ("up_proj",): "ffn_up",
    ("gate_proj", "up_proj"): "ffn_up",
    ("down_proj",): "ffn_down",
    ("shared_gate_proj",): "ffn_gate_shexp",
    ("shared_up_proj",): "ffn_up_shexp",
    ("shared_down_proj",): "ffn_down_shexp",
    ("shared_expert_gate",): "ffn_gate_inp_shexp",
    ("expert_in_proj",): "ffn_latent_down",
    ("expert_out_proj",): "ffn_latent_up",
    ("per_layer_input_gate",): "inp_gate",
    ("per_layer_projection",): "proj",
}
# The same of roles that only layers of one kind have, and that stand where another role does in other layers.
_MATRICES |= {
    (role,): _MATRICES[(usual,)]
    for usual in DENSE_ROLES
    for role in ROLES
    if role != usual and ROLE_PATHS[role] == ROLE_PATHS[usual] and (role,) not in _MATRICES
}
# Tensor of experts -> its name in a layout of `Experts.layouts`.
_EXPERTS = {
    "ffn_gate_inp.weight": "router",
    "ffn_gate_inp.bias": "router_bias",
    "exp_probs_b.bias": "correction",
    **{f"ffn_{part}_exps.weight": part for part in ("gate", "up", "gate_up", "down")},
    **{f"ffn_{part}_exps.bias": f"{part}_bias" for part in ("gate", "up", "down")},
}
# Place of a norm in `Family.norms` -> its usual name in GGUF.
_NORMS = {
    "attn": "attn_norm",
    "attn_post": "post_attention_norm",
    "mlp": "ffn_norm",
    "mlp_post": "post_ffw_norm",
    "q": "attn_q_norm",
    "k": "attn_k_norm",
    "q_a": "attn_q_a_norm",
    "kv_a": "attn_kv_a_norm",
    "global_q": "attn_q_norm",
    "global_k": "attn_k_norm",
    "mlp_alone": "post_ffw_norm_1",
    "experts_in": "pre_ffw_norm_2",
    "experts_out": "post_ffw_norm_2",
    "per_layer_out": "post_norm",
}
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
    return names | (_LAYER_INPUTS if set(PER_LAYER) & set(family.roles) else {})


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
    held = {role for roles in family.fused.values() for role in roles}
    own = {ROLE_PATHS[role]: (role,) for role in family.roles if role not in held}
    matrices = {_MATRICES[roles]: path for path, roles in {**family.fused, **own}.items() if roles in _MATRICES}
    places = _NORMS | dict(family.gguf.names)
    stems = matrices | {places[place]: norm for place, norm in family.norms.items()}
    usual = {f"{stem}.{kind}": f"{path}.{kind}" for stem, path in stems.items() for kind in ("weight", "bias")}
    if family.experts is not None:
        layout = _gguf_layout(family.experts)
        usual |= {stored: layout[name] for stored, name in _EXPERTS.items() if name in layout}
    first = dict(family.gguf.tensors)
    return first | {stored: path for stored, path in usual.items() if stored not in first}


def _gguf_layout(experts: Experts) -> Mapping[str, str]:
    """Return the layout with one tensor of all experts for each of gate, up and down, or else for both of the first."""
    merged = (one for one in experts.layouts if "gate" in one and "{}" not in one["gate"])
    layout = next(merged, experts.layouts[-1])
    return layout if experts.gated else {**layout, "up": layout["gate_up"]}  # which holds nothing else
