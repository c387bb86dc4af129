"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: each layer is Mamba 2, attention without positions, an MLP or experts."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.architectures.architecture import Architecture, Layer, attention, experts, mlp
from jcrosslora.architectures.blocks import ATTENTION, EXPERT_LATENT, UNGATED_MLP, Mamba2
from jcrosslora.architectures.config import MOST_LAYERS, Number, check_multiple, layer_kinds, size, words
from jcrosslora.architectures.expert_rules import ExpertRules
from jcrosslora.architectures.families.mamba2 import gguf_tensors, step_limits
from jcrosslora.architectures.family import Family, Gguf, Positions, StoredNames, windowed
from jcrosslora.errors import CheckpointError

_MAMBA, _ATTENTION, _MLP, _EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
_NAMES = {"mamba": _MAMBA, "attention": _ATTENTION} | {name: name for name in (_MAMBA, _ATTENTION, _MLP, _EXPERTS)}
_LETTERS = {"M": _MAMBA, "*": _ATTENTION, "-": _MLP, "E": _EXPERTS}
_UNGATED_SHARED = ("shared_up_proj", "shared_down_proj")
_SHARED_WIDTH = "moe_shared_expert_intermediate_size"


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Normalise the kind of each layer to one name, and set the number of layers."""
    stated = config.get("layers_block_type")
    stated = config.get("layer_types") if stated is None else stated
    pattern = config.get("hybrid_override_pattern")
    if stated is None and isinstance(pattern, str) and set(pattern) <= set(_LETTERS):
        stated = [_LETTERS[letter] for letter in pattern]
    if not isinstance(stated, list | tuple) or not 0 < len(stated) <= MOST_LAYERS:
        msg = f"layers_block_type is {str(stated)[:60]} and hybrid_override_pattern {str(pattern)[:60]!r}, expected a "
        raise CheckpointError(msg + f"list of kinds, or a pattern of {' '.join(_LETTERS)}, with one for each layer")
    kinds = layer_kinds({"layer_types": stated}, _NAMES, len(stated))
    _mamba(config)  # whose sizes are checked
    return {**config, "layers_block_type": kinds, "num_hidden_layers": len(stated)}


def _layers(model: Architecture) -> list[Layer]:
    kinds = model.config["layers_block_type"]  # of `_resolve`
    alone = {
        _MAMBA: Layer(_mamba(model.config)),
        _ATTENTION: Layer(attention(model)),
        _MLP: Layer(None, mlp(model)),
        _EXPERTS: Layer(None, experts(model) if _EXPERTS in kinds else None),
    }
    return [alone[kind] for kind in kinds]


def _mamba(config: Mapping[str, Any]) -> Mamba2:
    heads, groups = size(config, "mamba_num_heads", 128), size(config, "n_groups", 8)
    check_multiple("mamba_num_heads", heads, "n_groups", groups)
    return Mamba2(
        size(config, "hidden_size"),
        size(config, "conv_kernel", 4),
        heads=heads,
        groups=groups,
        key_size=size(config, "ssm_state_size", 128),
        value_size=size(config, "mamba_head_dim", 64),
        conv_bias=bool(config.get("use_conv_bias", True)),
        norm="behind the gate",
        step_limits=step_limits(config),
        open_output=False,
        output_bias=bool(config.get("use_bias", False)),
        activation="silu",
        holder="mixer",
    )


def _shared_width(config: Mapping[str, Any]) -> int:
    return size(config, _SHARED_WIDTH, 7688)


def _from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the kinds of layers, from two lists, and settings that files state differently."""
    epsilons = [stated.get(f"attention.layer_norm_{name}") for name in ("rms_epsilon", "epsilon")]
    if len({repr(one) for one in epsilons} - {"None"}) != 1:
        msg = f"attention.layer_norm_rms_epsilon and layer_norm_epsilon are {str(epsilons)[:60]}, expected one number"
        raise CheckpointError(msg)
    keys = "attention.head_count_kv", "feed_forward_length"
    lists = [stated.get(key) for key in keys]
    for key, one in zip(keys, lists, strict=True):
        if not isinstance(one, list) or len(one) != stated.get("block_count"):
            msg = f"{key} is {str(one)[:60]}, expected a list with an entry for each of block_count layers"
            raise CheckpointError(msg)
    mlp = _EXPERTS if stated.get("expert_count") else _MLP
    kinds = [mlp if width else _ATTENTION if heads else _MAMBA for heads, width in zip(*lists, strict=True)]
    inner, heads = size(stated, "ssm.inner_size"), size(stated, "ssm.time_step_rank")
    return {
        # Drop the layers at the end that predict further tokens.
        "layers_block_type": kinds[: len(kinds) - stated.get("nextn_predict_layers", 0)],
        "mamba_head_dim": max(inner // heads, 1),
        "use_conv_bias": "mixer.conv1d.bias" in held,
    }


_ROUTER = {"router": "mixer.gate.weight", "correction": "mixer.gate.e_score_correction_bias"}

NEMOTRON_H = Family(
    name="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    gguf=Gguf(
        "nemotron_h",
        expert_architecture="nemotron_h_moe",
        permuted=True,  # although no layer has positions
        names={"mlp": "attn_norm"},
        tensors=gguf_tensors("mixer")
        | {"ssm_out.weight": "mixer.out_proj.weight", "ssm_out.bias": "mixer.out_proj.bias"},
        counts={
            "conv_kernel": "ssm.conv_kernel",
            "ssm_state_size": "ssm.state_size",
            "n_groups": "ssm.group_count",
            "mamba_num_heads": "ssm.time_step_rank",
            _SHARED_WIDTH: "expert_shared_feed_forward_length",
            "moe_latent_size": "moe_latent_size",
        },
        settings=_from_gguf,
    ),
    stored=StoredNames("model.embeddings", prefixes={"backbone.": "model."}),
    resolve=_resolve,
    layers=_layers,
    blocks=(Mamba2,),
    gated=False,
    experts=ExpertRules(
        ("n_routed_experts", "num_local_experts"),
        layouts=(
            _ROUTER | {name: f"mixer.experts.{{}}.{name}_proj.weight" for name in ("up", "down")},
            _ROUTER | {"gate_up": "mixer.experts.up_proj", "down": "mixer.experts.down_proj"},
        ),
        scores="sigmoid",
        normalised="norm_topk_prob",
        scale=Number("routed_scaling_factor", 1.0),
        groups=("n_group", "topk_group"),
        gated=False,
        latent="moe_latent_size",
        shared=_shared_width,
    ),
    fused={
        **{f"mixer.{role}": (role,) for role in (*ATTENTION, *UNGATED_MLP)},
        "mixer.in_proj": ("mamba_in_proj",),
        "mixer.shared_experts.up_proj": ("shared_up_proj",),
        "mixer.shared_experts.down_proj": ("shared_down_proj",),
        "mixer.fc1_latent_proj": ("expert_in_proj",),
        "mixer.fc2_latent_proj": ("expert_out_proj",),
    },
    norms={"attn": "norm", "mlp": "norm"},
    final_norm="model.norm_f",
    bias_keys={"mlp_bias": (*UNGATED_MLP, *_UNGATED_SHARED, *EXPERT_LATENT), "use_bias": ("mamba_in_proj",)},
    activation="relu2",
    activation_key="mlp_hidden_act",
    eps=Number("layer_norm_epsilon", 1e-5),
    positions=Positions(rotated=windowed),
    # The class does not read some of them, such as the initial limits of the time step.
    keys=words(
        "layers_block_type layer_types hybrid_override_pattern mamba_num_heads mamba_head_dim n_groups ssm_state_size "
        "conv_kernel use_conv_bias time_step_min moe_shared_expert_intermediate_size n_shared_experts "
        "moe_shared_expert_overlap expand chunk_size time_step_max time_step_floor time_step_limit time_step_rank "
        "mamba_proj_bias mamba_ssm_cache_dtype use_mamba_kernels num_logits_to_keep residual_in_fp32 "
        "rescale_prenorm_residual norm_eps partial_rotary_factor num_nextn_predict_layers mtp_layers_block_type "
        "mtp_hybrid_override_pattern"
    ),
    fixed={"mamba_hidden_act": ("silu",), "attention_bias": (False,), "attention_head_dim": (128,)},
    # Defaults of the class, which configurations may omit.
    defaults=dict(
        head_dim=128, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=7688, norm_topk_prob=True
    ),
)
