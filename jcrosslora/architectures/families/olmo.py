"""OLMo 2 and 3, OLMoE and OLMo Hybrid.

OLMo 2 and 3 have norms after attention and MLP alone, and of all heads of queries and keys together. OLMo Hybrid has
the gated delta rule in three of four layers, and attention as in OLMo 3 in the others. Layers of the delta rule have
norms before mixer and MLP, those of attention after both. Some published models have no positions.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jcrosslora.architectures.architecture import Architecture, Layer, attention, mlp
from jcrosslora.architectures.blocks import ATTENTION, DeltaRule
from jcrosslora.architectures.config import FULL, LINEAR, Number, check_multiple, layer_count, layer_kinds, size, words
from jcrosslora.architectures.expert_rules import ExpertRules
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
    # Its class reads `rope_theta` for the layers of full attention alone.
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


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the kinds of the layers, and a `rope_theta` of null in `rope_parameters` if there are no positions."""
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


def _layers(model: Architecture) -> list[Layer]:
    made = {
        LINEAR: Layer(_delta(model.config), mlp(model), norms=("attn", "mlp")),
        FULL: Layer(attention(model), mlp(model), norms=("attn_post", "mlp_post")),
    }
    return [made[kind] for kind in model.config["layer_types"]]  # of `_resolve`


def _delta(config: Mapping[str, Any]) -> DeltaRule:
    hidden, usual = size(config, "hidden_size"), size(config, "num_attention_heads")
    heads, groups = size(config, "linear_num_value_heads", usual), size(config, "linear_num_key_heads", usual)
    check_multiple("linear_num_value_heads", heads, "linear_num_key_heads", groups)
    key_size = size(config, "linear_key_head_dim", int(0.75 * hidden / groups))
    negative = config.get("linear_allow_neg_eigval", True)
    if not isinstance(negative, bool):
        msg = f"config key 'linear_allow_neg_eigval' is {repr(negative)[:60]}, wanted true or false"
        raise CheckpointError(msg)
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
    # Files call the norm before the MLP and the one after attention the same, and hold the convolution in parts.
    stored=StoredNames(
        modules={
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
            **dict.fromkeys((f"linear_attn.{part}_conv1d" for part in "qkv"), "linear_attn.conv1d"),
        }
    ),
    resolve=_resolve,
    layers=_layers,
    blocks=(DeltaRule,),
    norms=PRE_NORMS | POST_NORMS | QK_NORMS,
    qk_norms="whole",
    bias_keys={"attention_bias": ATTENTION},
    positions=Positions(rotated=_rotated),
    # Some are settings of the initialisation.
    keys=words(
        "layer_types linear_a_log_max linear_a_log_min linear_allow_neg_eigval linear_conv_kernel_dim "
        "linear_dt_init_floor linear_dt_max linear_dt_min linear_key_head_dim linear_num_key_heads "
        "linear_num_value_heads linear_value_head_dim"
    ),
)
