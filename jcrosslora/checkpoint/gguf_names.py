"""Names of tensors in GGUF files and in the Hugging Face convention, by the families' own names."""

from functools import cache

from jcrosslora.checkpoint.families import EMBEDDING, FAMILIES, HEAD, HEAD_BIAS, ROLE_PATHS
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES

# Roles that a matrix holds -> its name in GGUF.
_MATRICES = {
    ("q_proj",): "attn_q",
    ("k_proj",): "attn_k",
    ("v_proj",): "attn_v",
    ("q_proj", "k_proj", "v_proj"): "attn_qkv",
    ("o_proj",): "attn_output",
    ("gate_proj",): "ffn_gate",
    ("up_proj",): "ffn_up",
    ("gate_proj", "up_proj"): "ffn_up",
    ("down_proj",): "ffn_down",
}
# Of experts -> their name in a layer, see `family.experts.MERGED`.
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
# Place of a norm in `Family.norms` -> its usual name in GGUF.
_NORMS = {
    "attn": "attn_norm",
    "attn_post": "post_attention_norm",
    "mlp": "ffn_norm",
    "mlp_post": "post_ffw_norm",
    "q": "attn_q_norm",
    "k": "attn_k_norm",
}


def architecture(family: str) -> str | None:
    """Return `general.architecture` of the GGUF files of a family, None if it has none or is not known."""
    form = FAMILIES[family].gguf if family in FAMILIES else None
    return None if form is None else form.architecture


def permutes_heads(arch: str) -> bool:
    """Whether rows of q and k are in the order of llama.cpp's rotation in files of an architecture."""
    form = FAMILIES[ARCHITECTURES[arch]].gguf if arch in ARCHITECTURES else None
    return form is not None and form.permuted


def hf_name(stored: str, arch: str) -> str | None:
    """Return the Hugging Face name of a tensor of a GGUF file, None if it is not known."""
    stem, _, kind = stored.rpartition(".")
    if (whole := _outside(arch).get(stored)) is not None:
        return whole
    parts, block = stem.split("."), _block(arch)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in block and kind in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{block[parts[2]]}.{kind}"
    return None


def gguf_name(name: str, arch: str) -> str | None:
    """Return the GGUF name of a tensor of a layer by its Hugging Face name, None if it is not known."""
    parts = name.split(".", 3)
    path, _, kind = parts[-1].rpartition(".")
    stems = {path: stem for stem, path in _block(arch).items()}
    if len(parts) != 4 or parts[:2] != ["model", "layers"] or path not in stems:
        return None
    return f"blk.{parts[2]}.{stems[path]}.{kind}"


@cache
def _outside(arch: str) -> dict[str, str]:
    """Return the names of tensors outside the layers."""
    norm = FAMILIES[ARCHITECTURES[arch]].final_norm
    names = {"token_embd.weight": EMBEDDING, "output.weight": HEAD, "output.bias": HEAD_BIAS}
    return names | {f"output_norm.{kind}": f"{norm}.{kind}" for kind in ("weight", "bias")}


@cache
def _block(arch: str) -> dict[str, str]:
    """Return the names of matrices and norms of a layer."""
    family = FAMILIES[ARCHITECTURES[arch]]
    assert family.gguf is not None
    held = {role for roles in family.fused.values() for role in roles}
    own = {ROLE_PATHS[role]: (role,) for role in family.roles if role not in held}
    matrices = {_MATRICES[roles]: path for path, roles in {**family.fused, **own}.items()}
    names = _NORMS | dict(family.gguf.names)
    same = (one for one in FAMILIES.values() if one.gguf is not None and one.gguf.architecture == arch)
    matrices |= _EXPERTS if any(one.experts is not None for one in same) else {}
    return matrices | {names[place]: norm for place, norm in family.norms.items()}
