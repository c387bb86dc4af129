"""Names of tensors in GGUF files and in the Hugging Face convention."""

from collections.abc import Mapping

from jcrosslora.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, ROLE_PATHS
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES

_GLOBAL = {"token_embd": EMBEDDING, "output_norm": FINAL_NORM, "output": HEAD}
_BLOCK = {
    "attn_q": ROLE_PATHS["q_proj"],
    "attn_k": ROLE_PATHS["k_proj"],
    "attn_v": ROLE_PATHS["v_proj"],
    "attn_output": ROLE_PATHS["o_proj"],
    "ffn_gate": ROLE_PATHS["gate_proj"],
    "ffn_up": ROLE_PATHS["up_proj"],
    "ffn_down": ROLE_PATHS["down_proj"],
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Differences from `_BLOCK` by architecture.
_BLOCK_CHANGES: Mapping[str, Mapping[str, str]] = {
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
_BY_FAMILY = {family: arch for arch, family in ARCHITECTURES.items()} | {"mistral": "llama"}


def architecture(family: str) -> str | None:
    """Return `general.architecture` of the GGUF files of a family, None if the family is not known."""
    return _BY_FAMILY.get(family)


def hf_name(stored: str, arch: str) -> str | None:
    """Return the Hugging Face name of a tensor of a GGUF file, None if it is not known."""
    stem, _, kind = stored.rpartition(".")
    if stem in _GLOBAL and kind == "weight":
        return _GLOBAL[stem]
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


def _block(arch: str) -> dict[str, str]:
    return {**_BLOCK, **_BLOCK_CHANGES.get(arch, {})}
