"""Gemma 4 (text): larger heads in layers of full attention, the last layers with the keys and values of layers before.

The smaller models multiply the stream with an input of each layer; others take the keys of full attention for its
values, or have experts beside the MLP. The text model of the unified ones has neither inputs of layers nor experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jcrosslora.checkpoint.family.experts import Experts
from jcrosslora.checkpoint.family.gemma4_gguf import GGUF
from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, GLOBAL_ATTENTION, MLP, PER_LAYER, WIDE_MLP
from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.checkpoint.family.record import QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import HeadSizes, LayerTensor, Number, Positions, Windows
from jcrosslora.checkpoint.family.sizes import check_multiple, layer_count, layer_kinds, size
from jcrosslora.errors import CheckpointError

_FULL, _SLIDING = "full_attention", "sliding_attention"
_ATTENTION = (
    *("q_proj", "kv_shared_q_proj", *ATTENTION[1:]),
    *("global_q_proj", "global_kv_shared_q_proj", *GLOBAL_ATTENTION[1:]),
)
_PERIOD = 6  # every sixth layer has full attention where the configuration lists no kinds
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the kinds of the layers, the last of which has full attention, and the heads of these."""
    layers = layer_count(config)
    stated = layer_kinds(config, {_SLIDING: _SLIDING, _FULL: _FULL})
    kinds = [_FULL if (layer + 1) % _PERIOD == 0 else _SLIDING for layer in range(layers)] if stated is None else stated
    kinds[-1] = _FULL
    shared, vocab = _kv_shared(config), config.get("vocab_size_per_layer_input")
    if shared and (shared >= layers or set(kinds[-shared:]) - set(kinds[: layers - shared])):
        msg = f"config key 'num_kv_shared_layers' is {shared}, wanted fewer than {layers} layers, with one of each kind"
        raise CheckpointError(msg + " before them")
    if _layer_inputs(config) and vocab is not None and vocab != config.get("vocab_size"):
        msg = f"config key 'vocab_size_per_layer_input' is {vocab!r}, wanted that of vocab_size"
        raise CheckpointError(msg + ": a token without an input of the layers has no prediction")
    found = {key: value for key, value in config.items() if key != "per_layer_config"}
    found |= {"layer_types": kinds} | _stated_heads(config, kinds)
    heads, keys = size(found, "num_attention_heads"), _global_heads(found).kv_heads
    check_multiple("num_attention_heads", heads, "num_global_key_value_heads", keys)
    return found


def _stated_heads(config: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Return the heads of layers of full attention, which transformers 5 writes for each of them."""
    usual = {"head_dim": config.get("head_dim"), "num_key_value_heads": config.get("num_key_value_heads")}
    own = usual | {"head_dim": config.get("global_head_dim") or 512}
    if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads") is not None:
        own["num_key_value_heads"] = config["num_global_key_value_heads"]
    if (stated := config.get("per_layer_config")) is not None:
        places = [str(layer) for layer, kind in enumerate(kinds) if kind == _FULL]
        each = {str(layer): one for layer, one in stated.items()} if isinstance(stated, Mapping) else {}
        first = each.get(places[0])
        if each != dict.fromkeys(places, first) or not isinstance(first, Mapping) or set(first) - set(usual):
            msg = f"config key 'per_layer_config' is {str(stated)[:60]}, wanted the same head_dim and "
            raise CheckpointError(msg + "num_key_value_heads for all layers of full attention, and nothing for others")
        own = {**usual, **first}
    return {"global_head_dim": own["head_dim"], "num_global_key_value_heads": own["num_key_value_heads"]}


def _kv_shared(config: Mapping[str, Any]) -> int:
    return size(config, "num_kv_shared_layers") if config.get("num_kv_shared_layers") else 0


def _global_heads(config: Mapping[str, Any]) -> HeadSizes:
    return HeadSizes(size(config, "num_global_key_value_heads"), size(config, "global_head_dim"))


def _layer_inputs(config: Mapping[str, Any]) -> int:
    return size(config, "hidden_size_per_layer_input") if config.get("hidden_size_per_layer_input") else 0


def _parts(config: Mapping[str, Any], layers: int) -> list[LayerParts]:
    first_shared = layers - _kv_shared(config)
    full = "global_key_attention" if config.get("attention_k_eq_v") else "global_attention"
    beside = " beside experts" if config.get("enable_moe_block") else ""
    last = "per_layer_input" if _layer_inputs(config) else "nothing"
    found = []
    for layer, kind in enumerate(config["layer_types"]):  # of `_resolve`
        shares = layer >= first_shared
        own = full if kind == _FULL else "attention"
        mixer = ("global_" if kind == _FULL else "") + "kv_shared_attention" if shares else own
        mlp = "wide" if shares and config.get("use_double_wide_mlp") else "dense"
        found.append(LayerParts(mixer, mlp + beside, last))
    return found


GEMMA4 = Family(
    name="gemma4_text",
    architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    roles=(*_ATTENTION, *MLP, *WIDE_MLP, *PER_LAYER),
    parts=_parts,
    resolve=_resolve,
    global_heads=_global_heads,
    value_norm=True,
    layer_inputs=_layer_inputs,
    experts=Experts(
        ("num_experts",),
        used="top_k_experts",
        layouts=(
            {
                "router": "router.proj.weight",
                "gate_up": "experts.gate_up_proj",
                "down": "experts.down_proj",
            },
        ),
    ),
    tensors={
        "layer_scale": LayerTensor("layer_scalar", lambda *_: (1,)),
        "router_scale": LayerTensor("router.scale", lambda sizes, _: (sizes.hidden,)),
        "expert_scale": LayerTensor("router.per_expert_scale", lambda _, config: (size(config, "num_experts"),)),
    },
    norms={
        "attn": "input_layernorm",
        "attn_post": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "mlp_post": "post_feedforward_layernorm",
        "mlp_alone": "post_feedforward_layernorm_1",
        "experts_in": "pre_feedforward_layernorm_2",
        "experts_out": "post_feedforward_layernorm_2",
        "per_layer_out": "post_per_layer_input_norm",
        **QK_NORMS,
        **{f"global_{name}": norm for name, norm in QK_NORMS.items()},
    },
    bias_keys={"attention_bias": _ATTENTION},
    tied=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    attn_scale=Number("", 1.0),
    embedding_scale=Number("hidden_size", power=0.5),
    final_soft_cap=Number("final_logit_softcapping"),
    windows=Windows(size=512),
    positions=Positions(settings=_ROPES, types=("proportional",)),
    gguf=GGUF,
    keys=words(
        "attention_bias attention_k_eq_v enable_moe_block final_logit_softcapping global_head_dim hidden_activation "
        "hidden_size_per_layer_input layer_types moe_intermediate_size num_experts num_global_key_value_heads "
        "num_kv_shared_layers per_layer_config sliding_window top_k_experts use_double_wide_mlp "
        "vocab_size_per_layer_input"
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
    roles=(*_ATTENTION, *MLP, *WIDE_MLP),
    layer_inputs=lambda _: 0,
    experts=None,
    tensors={"layer_scale": GEMMA4.tensors["layer_scale"]},
    gguf=replace(GGUF, read_as_other=True),
    keys=GEMMA4.keys - {"hidden_size_per_layer_input", "enable_moe_block"},
    fixed={**GEMMA4.fixed, "hidden_size_per_layer_input": (0,), "enable_moe_block": (False,)},
    defaults={key: value for key, value in GEMMA4.defaults.items() if key != "hidden_size_per_layer_input"}
    | {"max_position_embeddings": 262_144, "sliding_window": 1024},
)
