"""OLMo 2 and 3, OLMoE and OLMo Hybrid; and LFM2.

OLMo 2 and 3 have norms only after attention and MLP, and normalise queries and keys over all heads together. OLMo
Hybrid has the gated delta rule in three of four layers, and OLMo 3's attention in the others. Layers with the delta
rule have norms before mixer and MLP, layers with attention after them. Some published models have no positions.

LFM2 has short convolutions in most layers, attention in the others; one of its forms has experts in most layers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jcrosslora.architectures.architecture import Architecture, Layer, attention, mlp, usual_layers
from jcrosslora.architectures.blocks import ATTENTION, CONVOLUTION, DeltaRule, ShortConvolution
from jcrosslora.architectures.config import (
    FULL,
    LINEAR,
    Number,
    at_attention,
    check_multiple,
    layer_count,
    layer_kinds,
    refuse,
    size,
    words,
)
from jcrosslora.architectures.expert_rules import MERGED, ExpertRules, behind_first
from jcrosslora.architectures.family import (
    POST_NORMS,
    PRE_NORMS,
    QK_NORMS,
    Family,
    Gguf,
    Positions,
    StoredNames,
    Windows,
)
from jcrosslora.errors import CheckpointError

_olmo = partial(
    Family,
    norms=POST_NORMS | QK_NORMS,
    qk_norms="whole",
    bias_keys={"attention_bias": ATTENTION},
    eps=Number("rms_norm_eps", 1e-5),
)

OLMO2 = _olmo(name="olmo2", architectures=("Olmo2ForCausalLM",), gguf=Gguf("olmo2"))
OLMO3 = _olmo(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    gguf=Gguf("olmo2"),
    windows=Windows(period=4),
    # Its class reads `rope_theta` only for layers of full attention.
    positions=Positions(theta=500_000.0, local_theta=500_000.0),
)
OLMOE = _olmo(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    gguf=Gguf("olmoe", implied={"norm_topk_prob": False}),
    norms=PRE_NORMS | QK_NORMS,
    experts=ExpertRules(("num_experts", "num_local_experts"), width="intermediate_size", normalised="norm_topk_prob"),
    fixed={"clip_qkv": (None,)},
)
_PERIOD = 4


def _resolve_hybrid(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the kinds of layers; without positions, set only a `rope_theta` of null in `rope_parameters`."""
    kinds = layer_kinds(config, {LINEAR: LINEAR, FULL: FULL})
    if kinds is None:
        kinds = [LINEAR if (layer + 1) % _PERIOD else FULL for layer in range(layer_count(config))]
        kinds = kinds if FULL in kinds else [*kinds[:-1], FULL]
    found = {**config, "layer_types": kinds}
    _delta(found)  # whose sizes are checked
    ropes = config.get("rope_scaling") or config.get("rope_parameters")
    ropes = ropes if isinstance(ropes, Mapping) else {}
    stated = [settings["rope_theta"] for settings in (ropes, config) if "rope_theta" in settings]
    if not stated or stated[0] is not None:
        return found
    kept = {key: value for key, value in found.items() if key not in ("rope_theta", "rope_scaling")}
    return {**kept, "rope_parameters": {"rope_theta": None}}


def _rotated(config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    """Give all layers positions, or none if `rope_theta` is null."""
    stated = config.get("rope_parameters")
    still = isinstance(stated, Mapping) and "rope_theta" in stated and stated["rope_theta"] is None
    return [not still] * len(kinds)


def _hybrid_layers(model: Architecture) -> list[Layer]:
    made = {
        LINEAR: Layer(_delta(model.config), mlp(model), norms=("attn", "mlp")),
        FULL: Layer(attention(model), mlp(model), norms=("attn_post", "mlp_post")),
    }
    return [made[kind] for kind in model.config["layer_types"]]  # of `_resolve_hybrid`


def _delta(config: Mapping[str, Any]) -> DeltaRule:
    hidden, usual = size(config, "hidden_size"), size(config, "num_attention_heads")
    heads, groups = size(config, "linear_num_value_heads", usual), size(config, "linear_num_key_heads", usual)
    check_multiple("linear_num_value_heads", heads, "linear_num_key_heads", groups)
    key_size = size(config, "linear_key_head_dim", int(0.75 * hidden / groups))
    negative = config.get("linear_allow_neg_eigval", True)
    if not isinstance(negative, bool):
        refuse("linear_allow_neg_eigval", negative, "true or false")
    return DeltaRule(
        hidden,
        size(config, "linear_conv_kernel_dim", 4),
        heads=heads,
        groups=groups,
        key_size=key_size,
        value_size=size(config, "linear_value_head_dim", 2 * key_size),
        form="separate",
        beta_limit=2.0 if negative else 1.0,
        eps=1e-5,
    )


OLMO_HYBRID = Family(
    name="olmo_hybrid",
    architectures=("OlmoHybridForCausalLM",),
    fused={
        "linear_attn.g_proj": ("in_proj_z",),
        "linear_attn.b_proj": ("in_proj_b",),
        "linear_attn.a_proj": ("in_proj_a",),
        "linear_attn.o_proj": ("delta_out_proj",),
    },
    # Files use one name for the norm before the MLP and the one after attention, and split the convolution.
    stored=StoredNames(
        modules={
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
            **dict.fromkeys((f"linear_attn.{part}_conv1d" for part in "qkv"), "linear_attn.conv1d"),
        }
    ),
    resolve=_resolve_hybrid,
    layers=_hybrid_layers,
    blocks=(DeltaRule,),
    norms=PRE_NORMS | POST_NORMS | QK_NORMS,
    qk_norms="whole",
    bias_keys={"attention_bias": ATTENTION},
    positions=Positions(rotated=_rotated),
    # Some are only for initialisation.
    keys=words(
        "layer_types linear_a_log_max linear_a_log_min linear_allow_neg_eigval linear_conv_kernel_dim "
        "linear_dt_init_floor linear_dt_max linear_dt_min linear_key_head_dim linear_num_key_heads "
        "linear_num_value_heads linear_value_head_dim"
    ),
)


_CONV = "conv"


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the width of the MLP and the kinds of layers, which other keys imply."""
    width = size(config, "block_ff_dim") if config.get("block_ff_dim") is not None else config.get("intermediate_size")
    if config.get("block_auto_adjust_ff_dim", True):
        multiple = size(config, "block_multiple_of", 256)
        width = int(2 * size({"intermediate_size": width}, "intermediate_size") / 3)
        if (factor := config.get("block_ffn_dim_multiplier", 1.0)) is not None:
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e6:
                refuse("block_ffn_dim_multiplier", factor, "a positive number")
            width = multiple * -(-int(factor * width) // multiple)
    _taps(config)  # which is checked
    layers = layer_count(config)
    kinds = layer_kinds(config, {_CONV: _CONV, FULL: FULL})
    if kinds is None:
        full = config.get("full_attn_idxs")
        full = list(range(layers)) if full is None else full
        if not isinstance(full, list | tuple) or not all(type(layer) is int for layer in full):
            refuse("full_attn_idxs", full, "a list of layers")
        kinds = [FULL if layer in full else _CONV for layer in range(layers)]
    stated = {"intermediate_size": width, "block_auto_adjust_ff_dim": False, "layer_types": kinds}
    return {key: value for key, value in _tied(config).items() if key != "block_ff_dim"} | stated


def _resolve_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    _taps(config)  # which is checked
    kinds = layer_kinds(config, {_CONV: _CONV, FULL: FULL})
    if kinds is None:
        raise CheckpointError("config key 'layer_types' is missing, expected the kind of each layer")
    return _tied(config)


def _taps(config: Mapping[str, Any]) -> int:
    return size(config, "conv_L_cache", 3)


def _tied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the key `tie_embedding` to `tie_word_embeddings`; the default is true."""
    tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    return {key: value for key, value in config.items() if key != "tie_embedding"} | {"tie_word_embeddings": tied}


def _layers(model: Architecture) -> list[Layer]:
    config = model.config
    bias = bool(config.get("conv_bias", False))
    convolution, full = ShortConvolution(model.dims.hidden, _taps(config), conv_bias=bias), attention(model)
    # Of `_resolve`.
    return usual_layers(model, [convolution if kind == _CONV else full for kind in config["layer_types"]])


def _from_gguf(stated: Mapping[str, Any], _held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    return {"layer_types": at_attention(stated, FULL, _CONV), "block_auto_adjust_ff_dim": False}


_gguf = partial(
    Gguf,
    final_norm="token_embd_norm",
    tensors={f"shortconv.conv.{kind}": f"conv.conv.{kind}" for kind in ("weight", "bias")},
    settings=_from_gguf,
)
_CACHE = {"conv_L_cache": "shortconv.l_cache"}

_STORED = {"router": "feed_forward.gate.weight", "correction": "feed_forward.expert_bias"}
_PUBLISHED = _STORED | {
    "gate": "feed_forward.experts.{}.w1.weight",
    "up": "feed_forward.experts.{}.w3.weight",
    "down": "feed_forward.experts.{}.w2.weight",
}
_IN_MEMORY = _STORED | {name: f"feed_forward.experts.{name}_proj" for name in ("gate_up", "down")}

_lfm2 = partial(
    Family,
    layers=_layers,
    blocks=(ShortConvolution,),
    fused={
        "self_attn.out_proj": ("o_proj",),
        "feed_forward.w1": ("gate_proj",),
        "feed_forward.w3": ("up_proj",),
        "feed_forward.w2": ("down_proj",),
    },
    norms={"attn": "operator_norm", "mlp": "ffn_norm", "q": "self_attn.q_layernorm", "k": "self_attn.k_layernorm"},
    final_norm="model.embedding_norm",
    bias_keys={"conv_bias": CONVOLUTION},
    tied=True,
    eps=Number("norm_eps", 1e-5),
    positions=Positions(theta=1_000_000.0),
)
# Keys of published configurations. No class reads those of the last line; the one with experts reads no `block_` key.
_KEYS = words(
    "conv_L_cache layer_types tie_embedding block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim "
    "block_ff_dim full_attn_idxs block_mlp_init_scale block_out_init_scale block_use_xavier_init "
    "block_dim block_norm_eps conv_dim conv_dim_out conv_use_xavier_init num_heads theta"
)

LFM2 = _lfm2(
    name="lfm2",
    architectures=("Lfm2ForCausalLM",),
    gguf=_gguf("lfm2", counts=_CACHE),
    resolve=_resolve,
    keys=_KEYS,
    fixed={"block_use_swiglu": (True,), "use_pos_enc": (True,)},
)
LFM2_MOE = _lfm2(
    name="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    gguf=_gguf(
        "lfm2moe", counts=_CACHE | {"num_dense_layers": "leading_dense_block_count"}, implied={"norm_topk_prob": True}
    ),
    resolve=_resolve_moe,
    experts=ExpertRules(
        ("num_experts",),
        layouts=(_PUBLISHED, MERGED | _STORED, _IN_MEMORY),
        scores="sigmoid",
        normalised="norm_topk_prob",
        sum_eps=1e-6,
        scale=Number("routed_scaling_factor", 1.0),
        layers=behind_first("num_dense_layers"),
    ),
    keys=_KEYS | {"num_dense_layers"},
    # Without `use_expert_bias` there is no `expert_bias`.
    fixed={"use_expert_bias": (True,), "use_pos_enc": (True,)},
    defaults=dict(
        num_dense_layers=2, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=1792, norm_topk_prob=True
    ),
)
