"""Parse the names of tensors in a PEFT adapter file.

Names are `base_model.model.<module>.<part>`, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
Modules of a multimodal class are called as those of its text model, see `checkpoint.wrapped`, so that an adapter of any
spelling fits any base.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jcrosslora.checkpoint.wrapped import text_module_name

PREFIX = "base_model.model."

_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("embedding", re.compile(r"^(.+)\.lora_embedding_[AB]$")),
    ("lora_bias", re.compile(r"^(.+)\.lora_[AB]\.bias$")),
    ("dora", re.compile(r"^(.+)\.(?:lora_magnitude_vector|dora_scale)(?:\.weight)?$")),
    ("kasa", re.compile(r"^(.+)\.lora_diag(?:\.weight)?$")),
    # peft writes `q_proj_lora_latent_mapping`, because it removes ".default" from every name.
    ("latent", re.compile(r"^(.+?)(?:\.default)?_lora_latent_mapping\.weight$")),
    ("tokens", re.compile(r"^(.+?)\.(?:token_adapter\.)?trainable_tokens_(?:delta|original).*$")),
    ("copy", re.compile(r"^(.+)\.base_layer\.weight$")),
    ("bias", re.compile(r"^(.+?)(?:\.base_layer)?\.bias$")),
)
_FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.weight)?$")
# Parts of other kinds of adapter, which keep their name in the file.
_OTHER = re.compile(
    r"^(.+)\.(lora_E|ranknum|lora_gate|vera_lambda_[bd]|vblora_logits_[AB](?:_topk_(?:indices|weights))?|"
    r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|unilora_(?:indices|scales)_[AB])(?:\.weight)?$"
)
# Parts that all modules of such a kind share.
_SHARED = re.compile(r"^base_model\.(vera_[AB]|vblora_vector_bank|unilora_theta_d)$")

_BLOCK = r"^model\.layers\.(\d+)\.(?:(?:mlp|block_sparse_moe|feed_forward|mixer)\.)?"
# peft nests the wrappers of two parameters of one module.
_ALL_EXPERTS = re.compile(_BLOCK + r"experts(?:\.base_layer)*$")
SINGLE_EXPERT = re.compile(_BLOCK + r"experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
_ROUTER = re.compile(_BLOCK + r"(?:gate|gate\.wg|router|router\.(?:layer|proj))$")


@dataclass(frozen=True)
class TensorName:
    """The meaning of one tensor name.

    Attributes:
        key: the name in the file.
        kind: "A" or "B" for a LoRA factor; "embedding", "lora_bias", "dora", "kasa", "latent" (LoRA-XS), "tokens",
            "copy" (a copy of a base weight), "bias" or "full" (a whole tensor that replaces the base's); else the name
            of the part in the file, such as "hada_w1_a".
        module: its module, without the PEFT prefix, as the file spells it; "" if all modules share it.
    """

    key: str
    kind: str
    module: str


def parse_tensor_name(key: str) -> TensorName:
    """Parse a tensor name of an adapter file; the PEFT prefix may be absent."""
    if shared := _SHARED.match(key):
        return TensorName(key, shared[1], "")
    name = key.removeprefix(PREFIX)
    if other := _OTHER.match(name):
        return TensorName(key, other[2], other[1])
    if factor := _FACTOR.match(name):
        return TensorName(key, factor[2], factor[1])
    for kind, pattern in _PARTS:
        if match := pattern.match(name):
            return TensorName(key, kind, match[1])
    return TensorName(key, "full", name.removesuffix(".weight"))


def is_of_experts(module: str) -> bool:
    """Whether a module of an adapter's file holds factors of experts."""
    name = text_module_name(module)
    return _ALL_EXPERTS.match(name) is not None or SINGLE_EXPERT.match(name) is not None


def is_router(module: str) -> bool:
    """Whether a module of an adapter's file is the router of experts."""
    return _ROUTER.match(text_module_name(module)) is not None


def by_module(tensors: Sequence[TensorName]) -> list[list[TensorName]]:
    """Group tensors by module, in the order in which modules first occur."""
    groups: dict[str, list[TensorName]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.module, []).append(tensor)
    return list(groups.values())


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 11."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))


def ending(module: str) -> str:
    """Return the last part of a module's name, its role in text models."""
    return module.rpartition(".")[2]
