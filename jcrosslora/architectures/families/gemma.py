"""Gemma 1 to 4 (text): scaled embedding; norms after attention and MLP from Gemma 2 on; gains 1 + weight up to Gemma 3.

Gemma 4 has larger heads in layers of full attention, and its last layers reuse the keys and values of earlier ones. The
smaller models multiply the stream by a per-layer input; others use the keys of full attention as its values, or have
experts in addition to the MLP. The text model of the unified ones has neither per-layer inputs nor experts.

GGUF files of Gemma 4 store the head sizes of full attention under the usual keys, and those of layers with windows
under separate keys. Only the tensors show whether keys are used as values.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from jcrosslora.architectures.architecture import Architecture, Layer, attention, experts, mlp
from jcrosslora.architectures.blocks import ATTENTION, MlpAndExperts, PerLayerInput, SelfAttention
from jcrosslora.architectures.config import (
    FULL,
    SLIDING,
    Number,
    check_multiple,
    layer_count,
    layer_kinds,
    refuse,
    size,
    words,
)
from jcrosslora.architectures.expert_rules import ExpertRules
from jcrosslora.architectures.family import QK_NORMS, Family, Gguf, Positions, Windows
from jcrosslora.errors import CheckpointError

_NORMS = {
    "attn": "input_layernorm",
    "attn_post": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_post": "post_feedforward_layernorm",
}
_PERIOD_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")

_gemma = partial(
    Family,
    gain_offset=1.0,
    bias_keys={"attention_bias": ATTENTION},
    tied=True,
    activation="gelu_pytorch_tanh",
    embedding_scale=Number("hidden_size", power=0.5),
    fixed={"use_bidirectional_attention": (False, None)},
)
_scaled = partial(
    _gemma,
    norms=_NORMS,
    activation_key="hidden_activation",
    attn_scale=Number("query_pre_attn_scalar", 256, power=-0.5),
)


def _resolve_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace "gelu" by the tanh approximation, which the first releases mean by it and later ones state."""
    return {**config} | ({"hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else {})


GEMMA = _gemma(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    gguf=Gguf("gemma"),
    resolve=_resolve_first,
    fixed={"use_bidirectional_attention": (False, None), "hidden_activation": ("gelu_pytorch_tanh",)},
    defaults={"head_dim": 256},
)
GEMMA2 = _scaled(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    gguf=Gguf(
        "gemma2",
        numbers={key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
    ),
    attn_soft_cap=Number("attn_logit_softcapping", 50.0),
    final_soft_cap=Number("final_logit_softcapping", 30.0),
    windows=Windows(period=2, period_keys=_PERIOD_KEYS),
    defaults={"head_dim": 256},
)
GEMMA3 = _scaled(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf=Gguf("gemma3"),
    norms=_NORMS | QK_NORMS,
    # transformers ignores a soft cap of the attention scores in the configuration.
    final_soft_cap=Number("final_logit_softcapping"),
    windows=Windows(period=6, period_keys=_PERIOD_KEYS),
    positions=Positions(theta=1_000_000.0, local_theta=10_000.0, local_theta_key="rope_local_base_freq"),
    keys=words("attn_logit_softcapping rope_local_base_freq"),
    # Defaults of Gemma3TextConfig: the `text_config` of a multimodal checkpoint omits these keys.
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)


_PATTERN, _SHARED_LAYERS = "attention.sliding_window_pattern", "attention.shared_kv_layers"
_KV, _WIDTH = "attention.head_count_kv", "feed_forward_length"


def _from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the kinds of layers, their sizes, and how many of the last ones share keys and values."""
    layers = size(stated, "block_count")
    sliding = stated.get(_PATTERN)
    if not isinstance(sliding, list) or len(sliding) != layers or not all(type(one) is bool for one in sliding):
        msg = f"{_PATTERN} is {str(sliding)[:60]}, expected a list that says of {layers} layers which have windows"
        raise CheckpointError(msg)
    full = [layer for layer in range(layers) if not sliding[layer]]
    shared = stated.get(_SHARED_LAYERS, 0)
    if type(shared) is not int or not 0 <= shared < layers:
        raise CheckpointError(f"{_SHARED_LAYERS} is {str(shared)[:60]}, expected fewer than {layers} layers")
    counts, widths = (_of_layers(stated, key, layers) for key in (_KV, _WIDTH))
    first = layers - shared
    wide = widths[-1] != widths[0]
    if widths != [widths[0]] * first + [(1 + wide) * widths[0]] * shared:
        msg = f"{_WIDTH} is {str(widths)[:60]}, expected twice the width for the last {shared} layers, or one for all"
        raise CheckpointError(msg)
    own = {layer for layer in full if layer < first}
    return {
        "layer_types": [SLIDING if flag else FULL for flag in sliding],
        "head_dim": size(stated, "attention.key_length_swa"),
        "global_head_dim": size(stated, "attention.key_length"),
        "num_key_value_heads": next((counts[layer] for layer in range(layers) if sliding[layer]), counts[0]),
        "num_global_key_value_heads": counts[full[0]] if full else None,
        "attention_k_eq_v": bool(own) and not held.get("self_attn.v_proj.weight", frozenset()) & own,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": stated.get("embedding_length_per_layer_input", 0),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": wide,
        "enable_moe_block": "router.proj.weight" in held,
    }


def _of_layers(stated: Mapping[str, Any], key: str, layers: int) -> list[int]:
    """Return a number for each layer; files state it once if it is the same for all."""
    value = stated.get(key)
    found: list[Any] = value if isinstance(value, list) else [value] * layers
    if len(found) != layers or not all(type(one) is int and one > 0 for one in found):
        msg = f"{key} is {str(value)[:60]}, expected a positive integer, or one for each of {layers} layers"
        raise CheckpointError(msg)
    return found


_GGUF = Gguf(
    "gemma4",
    tensors={
        "layer_output_scale.weight": "layer_scalar",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
    # If it is missing, llama.cpp uses 30 and the class none; published models state it.
    numbers={"final_logit_softcapping": "final_logit_softcapping"},
    settings=_from_gguf,
)
_ROLES = tuple(linear.role for linear in SelfAttention.LINEARS if linear.role != "qg_proj")
_PERIOD = 6  # every sixth layer has full attention if the configuration lists no kinds
_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the kinds of layers, the last one with full attention, and the heads of full-attention layers."""
    layers = layer_count(config)
    stated = layer_kinds(config, {SLIDING: SLIDING, FULL: FULL})
    kinds = [FULL if (layer + 1) % _PERIOD == 0 else SLIDING for layer in range(layers)] if stated is None else stated
    kinds[-1] = FULL
    shared, vocab = _kv_shared(config), config.get("vocab_size_per_layer_input")
    if shared and (shared >= layers or set(kinds[-shared:]) - set(kinds[: layers - shared])):
        refuse("num_kv_shared_layers", shared, f"fewer than {layers} layers, with one of each kind before them")
    if _layer_inputs(config) and vocab is not None and vocab != config.get("vocab_size"):
        wanted = "that of vocab_size: a token without an input of the layers has no prediction"
        refuse("vocab_size_per_layer_input", vocab, wanted)
    found = {key: value for key, value in config.items() if key != "per_layer_config"}
    found |= {"layer_types": kinds} | _stated_heads(config, kinds)
    heads, (keys, _) = size(found, "num_attention_heads"), _global_heads(found)
    check_multiple("num_attention_heads", heads, "num_global_key_value_heads", keys)
    return found


def _stated_heads(config: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Return the heads of full-attention layers, which transformers 5 writes once per layer."""
    usual = {"head_dim": config.get("head_dim"), "num_key_value_heads": config.get("num_key_value_heads")}
    own = usual | {"head_dim": config.get("global_head_dim") or 512}
    if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads") is not None:
        own["num_key_value_heads"] = config["num_global_key_value_heads"]
    if (stated := config.get("per_layer_config")) is not None:
        places = [str(layer) for layer, kind in enumerate(kinds) if kind == FULL]
        each = {_number(layer): one for layer, one in stated.items()} if isinstance(stated, Mapping) else {}
        first = each.get(places[0])
        alike = isinstance(stated, Mapping) and len(each) == len(stated) and each == dict.fromkeys(places, first)
        if not alike or not isinstance(first, Mapping) or set(first) - set(usual):
            wanted = "the same head_dim and num_key_value_heads for layers of full attention, and nothing for others"
            refuse("per_layer_config", stated, wanted)
        own = {**usual, **first}
    return {"global_head_dim": own["head_dim"], "num_global_key_value_heads": own["num_key_value_heads"]}


def _number(layer: Any) -> str:
    """Strip the leading zeros that transformers writes from the number of a layer."""
    return str(layer).lstrip("0") or "0"


def _kv_shared(config: Mapping[str, Any]) -> int:
    return size(config, "num_kv_shared_layers") if config.get("num_kv_shared_layers") else 0


def _global_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of key-value heads of full-attention layers, and their size."""
    return size(config, "num_global_key_value_heads"), size(config, "global_head_dim")


def _layer_inputs(config: Mapping[str, Any]) -> int:
    return size(config, "hidden_size_per_layer_input") if config.get("hidden_size_per_layer_input") else 0


def _layers(model: Architecture) -> list[Layer]:
    config, dims = model.config, model.dims
    first_shared, features = dims.layers - _kv_shared(config), _layer_inputs(config)
    kv_heads, head_dim = _global_heads(config)
    last = PerLayerInput(dims.hidden, features) if features else None

    def layer(kind: str, shares: bool) -> Layer:
        mixer = attention(model, value_norm=True, shares_keys=shares)
        if kind == FULL:
            equal = bool(config.get("attention_k_eq_v"))
            mixer = replace(mixer, kv_heads=kv_heads, size=head_dim, group="global_", keys_are_values=equal)
        inner = mlp(model)
        if shares and config.get("use_double_wide_mlp"):
            inner = replace(inner, width=2 * inner.width, group="wide_")
        if config.get("enable_moe_block"):
            inner = MlpAndExperts(inner, experts(model), apart=True)
        return Layer(mixer, inner, last, scaled=True)

    made = {key: layer(*key) for key in ((kind, shares) for kind in (SLIDING, FULL) for shares in (False, True))}
    return [made[kind, number >= first_shared] for number, kind in enumerate(config["layer_types"])]  # of `_resolve`


GEMMA4 = Family(
    name="gemma4_text",
    architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    layers=_layers,
    blocks=(PerLayerInput, MlpAndExperts),
    resolve=_resolve,
    experts=ExpertRules(
        ("num_experts",),
        used="top_k_experts",
        layouts=({"router": "router.proj.weight", "gate_up": "experts.gate_up_proj", "down": "experts.down_proj"},),
    ),
    norms={
        **_NORMS,
        "mlp_alone": "post_feedforward_layernorm_1",
        "experts_in": "pre_feedforward_layernorm_2",
        "experts_out": "post_feedforward_layernorm_2",
        "per_layer_out": "post_per_layer_input_norm",
        **QK_NORMS,
    },
    bias_keys={"attention_bias": _ROLES},
    tied=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    attn_scale=Number("", 1.0),
    embedding_scale=Number("hidden_size", power=0.5),
    final_soft_cap=Number("final_logit_softcapping"),
    windows=Windows(size=512),
    positions=Positions(settings=_ROPES, types=("proportional",)),
    gguf=_GGUF,
    keys=words(
        "attention_k_eq_v enable_moe_block global_head_dim hidden_size_per_layer_input num_global_key_value_heads "
        "num_kv_shared_layers per_layer_config use_double_wide_mlp vocab_size_per_layer_input"
    ),
    # "vision" lets the tokens of an image see each other, which changes nothing in a text.
    fixed={"use_bidirectional_attention": (False, "vision")},
    # Defaults of Gemma4TextConfig: the `text_config` of a multimodal checkpoint may omit these keys.
    defaults={
        "vocab_size": 262_144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "tie_word_embeddings": True,
    },
)
GEMMA4_UNIFIED = replace(
    GEMMA4,
    name="gemma4_unified_text",
    architectures=("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
    blocks=(),
    experts=None,
    gguf=replace(_GGUF, read_as_other=True),
    keys=words(
        "attention_k_eq_v global_head_dim moe_intermediate_size num_experts num_global_key_value_heads "
        "num_kv_shared_layers per_layer_config top_k_experts use_double_wide_mlp vocab_size_per_layer_input"
    ),
    fixed={**GEMMA4.fixed, "hidden_size_per_layer_input": (0,), "enable_moe_block": (False,)},
    defaults={key: value for key, value in GEMMA4.defaults.items() if key != "hidden_size_per_layer_input"}
    | {"max_position_embeddings": 262_144, "sliding_window": 1024},
)
