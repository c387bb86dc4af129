"""Parse the names of tensors in a PEFT adapter file, and look up the ranks and scales that a configuration gives.

Names are `base_model.model.<module>.<part>`, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
Modules of a multimodal class get the names of its text model (see `checkpoint.wrapped`), so that an adapter fits the
base under either spelling.

`rank_pattern` and `alpha_pattern` set ranks and scales per module. The time to match a pattern is bounded, because a
malicious configuration could block the reader: Python's regular expressions take exponential time for patterns such as
`(a+)+`.

peft adapts some linear modules only if `target_parameters` names their weight, not their module. transformers 5 holds
all experts of a layer in one parameter. In the classes of `_TAKEN` peft applies every target called gate_proj, up_proj
or down_proj, even a full name, to that parameter, and the factors of dense layers and of shared experts are lost. The
factors have the same names and shapes in both forms, so other engines read either.

Source: peft 0.21, utils/transformers_weight_conversion.py, with transformers 5.24, conversion_mapping.py.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

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


class TensorName(NamedTuple):
    """The meaning of one tensor name.

    Attributes:
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
    if other := _OTHER.match(name) or _FACTOR.match(name):
        return TensorName(key, other[2], other[1])
    for kind, pattern in _PARTS:
        if match := pattern.match(name):
            return TensorName(key, kind, match[1])
    return TensorName(key, "full", name.removesuffix(".weight"))


def is_of_experts(module: str) -> bool:
    """Return whether a module of an adapter's file holds factors of experts."""
    name = text_module_name(module)
    return _ALL_EXPERTS.match(name) is not None or SINGLE_EXPERT.match(name) is not None


def holds_all_experts(module: str) -> bool:
    """Return whether a module of an adapter's file holds the factors of all experts of a layer together."""
    return _ALL_EXPERTS.match(text_module_name(module)) is not None


def is_router(module: str) -> bool:
    """Return whether a module of an adapter's file is the router of experts."""
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


# Families of bases with dense layers or shared experts.
_TAKEN = (
    *("cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hunyuan_v1_moe"),
    *("qwen3_moe", "qwen3_next"),
)
_TARGETS = ("gate_proj", "up_proj", "down_proj")


def is_taken(family: str | None, module: str) -> bool:
    """Return whether peft mistakes a linear module of a base of this family for part of the experts."""
    return family in _TAKEN and ending(module) in _TARGETS


def is_by_weight(config: Mapping[str, Any], module: str) -> bool:
    """Return whether `target_parameters` names a module's weight, as peft matches: whole, or its end after a dot."""
    stated, weight = config.get("target_parameters"), f"{module}.weight"
    named = stated if isinstance(stated, list) else ()
    return any(weight == name or weight.endswith(f".{name}") for name in named)


def by_weight(modules: Iterable[str], family: str | None, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the linear modules that peft must target by weight: by the base's family if known, else by `config`."""
    wanted = partial(is_by_weight, config) if family is None else partial(is_taken, family)
    return frozenset(filter(wanted, modules))


def matching_key(keys: Iterable[str], module: str) -> str | None:
    """Find the first key, in order, that PEFT applies to `module`; None if there is none.

    A key is a regular expression for the whole name or for its end from a dot on, so `layers.1.mlp` does not match
    in `layers.11.mlp`. A key that starts with `^` matches the whole name only.

    Source: peft.utils.other.get_pattern_key (peft 0.21).
    """
    return next((key for key in keys if _compiled(key).match(module)), None)


# Enough for a large model with a rank for each module: re itself caches 512 patterns and recompiles the others.
@lru_cache(maxsize=1 << 14)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _target_name(config: Mapping[str, Any], module: str) -> str:
    """Return what peft matches with the patterns: the module, or its weight if the configuration names that."""
    return f"{module}.weight" if is_by_weight(config, module) else module


def pattern_name(config: Mapping[str, Any], module: str) -> str:
    """Return the module name that the patterns match: as the file spells it, else as text models do."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    return module if matching_key(patterns, _target_name(config, module)) else text_module_name(module)


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that the configuration gives to a module, named without the PEFT prefix."""
    return _pattern_value(config, "rank_pattern", "r", module)


def module_alpha(config: Mapping[str, Any], module: str, default: str = "lora_alpha") -> float:
    """Return the alpha that the configuration gives to a module, named without the PEFT prefix."""
    return _pattern_value(config, "alpha_pattern", default, module)


def module_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732)."""
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def file_scale(config: Mapping[str, Any], module: str, rank: int | None = None) -> float:
    """Return the scale of a module as its file spells it; None takes the rank of the configuration."""
    name = pattern_name(config, module)
    return module_scale(config, name, module_rank(config, name) if rank is None else rank)


def exact_pattern(module: str, *, by_weight: bool = False) -> str:
    """Return a pattern for this module alone; with `by_weight` also for its weight, which peft then looks up."""
    return "^" + re.escape(module) + (r"(\.weight)?" if by_weight else "")


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return `r` and `rank_pattern` for modules of these ranks: the most common one, and the others by name."""
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    return {"r": common, "rank_pattern": {exact_pattern(name): rank for name, rank in ranks.items() if rank != common}}


def _pattern_value(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    table = config.get(patterns) or {}
    key = matching_key(table, _target_name(config, module))
    return config[default] if key is None else table[key]


_NAME = 64  # typical characters of a module's name
_BUDGET = 1 << 22  # ways to match; `.*\.layers\.(0|1|...|31)\.(q|k|v|o)_proj` has 2^13
_SINGLE = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # an escaped character, or a set of characters
_GROUP_MARK = re.compile(r"\(\?(?::|[=!]|<[=!]|P<\w+>)")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def is_matchable(pattern: str) -> bool:
    """Return whether a pattern is a regular expression without repeated groups, and with few ways to match.

    The number of ways is bounded by the product over its repeats, optional parts and alternatives.
    """
    try:
        re.compile(f"({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    plain = _GROUP_MARK.sub("(", _SINGLE.sub("x", pattern))
    repeats = sum(map(plain.count, "*+{"))
    if _REPEATED_GROUP.search(plain) or repeats > 4 or plain.count("?") > 16 or plain.count("(") > 16:
        return False
    ways = [1 + part.count("|") for part in re.split(r"[()]", plain)]
    return math.prod([*ways, _NAME**repeats, 2 ** plain.count("?")]) <= _BUDGET
