"""Llama, Mistral and close relatives.

Arcee (AFM), Nemotron 3 and 4 and Minitron have a squared ReLU instead of a gate; the latter two also have layer norms
with gain 1 + weight, and rotate half of each head. Seed-OSS has more biases. Every fourth layer of SmolLM3 has no
positions. StarCoder2 has layer norms, biases, and an MLP without a gate. The MLP of Apertus has no gate either, and the
activation xIELU (arXiv 2411.13010) with trained parameters in each layer. Granite, dense or with experts, multiplies
the embedding, the outputs of blocks, the attention scores and the logits by constants. Mistral and Ministral 3 have
sliding windows in all layers, Ministral 3 scales queries up with the position, and Mixtral has experts.

Llama 4 (text) has attention in chunks; layers without positions, which scale queries up with the position; and experts
whose input is multiplied by their score, with one shared expert. The layers without experts may have an MLP of another
width.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from jcrosslora.architectures.blocks import ATTENTION, MLP, QKV, SHARED, UNGATED_MLP
from jcrosslora.architectures.config import Number, listed_rotated, refuse, size, words
from jcrosslora.architectures.expert_rules import FUSED, MERGED, ExpertRules
from jcrosslora.architectures.family import QK_NORMS, Family, Gguf, Positions, Windows, yarn
from jcrosslora.errors import CheckpointError

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
    fixed={"pretraining_tp": (1,), "rope_interleaved": (False,)},
)
ARCEE = Family(
    name="arcee",
    architectures=("ArceeForCausalLM",),
    gguf=Gguf("arcee", permuted=True),
    gated=False,
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": UNGATED_MLP},
    activation="relu2",
    eps=Number("rms_norm_eps", 1e-5),
)
SEED_OSS = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    gguf=Gguf("seed_oss", names={"mlp": "post_attention_norm"}),
    bias_keys={"attention_bias": QKV, "attention_out_bias": ("o_proj",), "mlp_bias": MLP},
    keys=words("residual_dropout"),
    fixed={"pretraining_tp": (1,)},
    defaults={"head_dim": 128, "attention_bias": True},
)
SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    gguf=Gguf("smollm3", permuted=True),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
    tied=True,
    windows=Windows(size=None, switch="use_sliding_window", which="unrotated"),
    positions=Positions(theta=2_000_000.0, rotated=lambda config, kinds: listed_rotated(config, len(kinds))),
    # Its class has no `pretraining_tp`, which published configurations keep.
    keys=words("no_rope_layers no_rope_layer_interval pretraining_tp"),
)
STARCODER2 = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    gguf=Gguf("starcoder2"),
    gated=False,
    fused={"mlp.c_fc": ("up_proj",), "mlp.c_proj": ("down_proj",)},
    norm="layer",
    norm_biases=True,
    bias_keys={"use_bias": (*ATTENTION, *UNGATED_MLP)},
    tied=True,
    activation="gelu_pytorch_tanh",
    eps=Number("norm_epsilon", 1e-5),
    windows=Windows(size=None, listed=False),
    keys=words("embedding_dropout residual_dropout"),
    fixed={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    defaults={"use_bias": True},
)
NEMOTRON = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    gguf=Gguf("nemotron"),
    gated=False,
    norm="layer",
    norm_biases=True,
    gain_offset=1.0,
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": UNGATED_MLP},
    activation="relu2",
    eps=Number("norm_eps", 1e-5),
    positions=Positions(share=0.5),
)
APERTUS = Family(
    name="apertus",
    architectures=("ApertusForCausalLM",),
    gguf=Gguf(
        "apertus", arrays={f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}
    ),
    gated=False,
    norms={"attn": "attention_layernorm", "mlp": "feedforward_layernorm", **QK_NORMS},
    bias_keys={"attention_bias": ATTENTION},
    activation="xielu",
    activation_tensors={
        "mlp.act_fn.alpha_p": None,
        "mlp.act_fn.alpha_n": None,
        "mlp.act_fn.beta": 0.5,
        "mlp.act_fn.eps": -1e-6,
    },
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(
        theta=12_000_000.0,
        settings={
            "rope_type": "llama3",
            "rope_theta": 12_000_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    fixed={"qk_norm": (True,), "post_norm": (False,), "mlp_bias": (False,)},
)

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    windows=Windows(listed=False),
)
MINISTRAL3 = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    gguf=Gguf("mistral3", permuted=True),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(
        grows=True, settings=yarn(16.0, 16_384, 1_000_000.0, mscale_all_dim=1.0, mscale=1.0, llama_4_scaling_beta=0.1)
    ),
    defaults={"head_dim": 128},
)
_SPARSE_BLOCK = "block_sparse_moe"
MIXTRAL_EXPERTS = {
    "router": f"{_SPARSE_BLOCK}.gate.weight",
    "gate": f"{_SPARSE_BLOCK}.experts.{{}}.w1.weight",
    "up": f"{_SPARSE_BLOCK}.experts.{{}}.w3.weight",
    "down": f"{_SPARSE_BLOCK}.experts.{{}}.w2.weight",
}

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    experts=ExpertRules(
        ("num_local_experts", "num_experts"), width="intermediate_size", layouts=(MIXTRAL_EXPERTS, MERGED, FUSED)
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(theta=1_000_000.0),
    keys=words("router_jitter_noise"),
)

_GRANITE_PUBLISHED = {
    "router": f"{_SPARSE_BLOCK}.router.layer.weight",
    "gate_up": f"{_SPARSE_BLOCK}.input_linear.weight",
    "down": f"{_SPARSE_BLOCK}.output_linear.weight",
}
_GRANITE_IN_MEMORY = {
    "router": f"{_SPARSE_BLOCK}.router.weight",
    "gate_up": f"{_SPARSE_BLOCK}.experts.gate_up_proj",
    "down": f"{_SPARSE_BLOCK}.experts.down_proj",
}
GRANITE_EXPERTS = ExpertRules(
    ("num_local_experts",), layouts=(_GRANITE_PUBLISHED, MERGED, _GRANITE_IN_MEMORY), scores="chosen"
)
# Configuration key -> metadata key of each factor.
GRANITE_FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}

granite = partial(
    Family,
    embedding_scale=Number("embedding_multiplier", 1.0),
    attn_scale=Number("attention_multiplier", 1.0),
    residual_scale=Number("residual_multiplier", 1.0),
    logit_scale=Number("logits_scaling", 1.0, power=-1.0),
)

GRANITE = granite(
    name="granite",
    architectures=("GraniteForCausalLM",),
    gguf=Gguf("granite", permuted=True, numbers=GRANITE_FACTORS),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
)
GRANITEMOE = granite(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    gguf=Gguf("granitemoe", permuted=True, numbers=GRANITE_FACTORS),
    bias_keys={"attention_bias": ATTENTION},
    experts=replace(GRANITE_EXPERTS, width="intermediate_size"),
)


_EXPERTS = "feed_forward.experts."
_ROUTER = {"router": "feed_forward.router.weight"}
_STORED = _ROUTER | {"gate_up": f"{_EXPERTS}gate_up_proj", "down": f"{_EXPERTS}down_proj"}
# The layout in GGUF.
_MERGED = _ROUTER | {part: f"{_EXPERTS}{part}_proj.weight" for part in ("gate", "up", "down")}

# Settings of the published models, which llama.cpp implies and files do not state.
_CHUNK, _PERIOD = 8192, 4
_IMPLIED = {
    "attention_chunk_size": _CHUNK,
    "no_rope_layer_interval": _PERIOD,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
}
_WITHOUT_NORMS = 128  # llama.cpp does not normalise queries and keys of models with this many experts, such as Maverick


def _sparse(config: Mapping[str, Any], layers: int) -> list[bool]:
    listed = config.get("moe_layers")
    if listed is None:
        step = size(config, "interleave_moe_layer_step", 1)
        listed = range(step - 1, layers, step)
    elif not isinstance(listed, list | tuple) or not all(type(layer) is int for layer in listed):
        refuse("moe_layers", listed, "a list of layers")
    return [layer in listed for layer in range(layers)]


def _from_gguf(stated: Mapping[str, Any], _held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the widths, and whether queries and keys are normalised: like llama.cpp, by the number of experts."""
    theta = stated.get("rope.freq_base")
    wanted = {
        "attention.sliding_window": _CHUNK,
        "attention.sliding_window_pattern": _PERIOD,
        "rope.freq_base_swa": theta,
    }
    for key, value in wanted.items():
        if stated.get(key, value) != value:
            msg = f"llama4.{key} is {str(stated[key])[:60]}, expected {value} or nothing: use the safetensors"
            raise CheckpointError(msg)
    return {
        "intermediate_size": stated.get("expert_feed_forward_length"),
        "intermediate_size_mlp": stated.get("feed_forward_length"),
        "use_qk_norm": stated.get("expert_count") != _WITHOUT_NORMS,
    }


LLAMA4 = Family(
    name="llama4_text",
    architectures=("Llama4ForCausalLM",),
    gguf=Gguf(
        "llama4",
        counts={"interleave_moe_layer_step": "interleave_moe_layer_step"},
        implied=_IMPLIED,
        settings=_from_gguf,
    ),
    fused={f"feed_forward.{role}": (role,) for role in MLP}
    | {f"feed_forward.shared_expert.{role.removeprefix('shared_')}": (role,) for role in SHARED},
    width_key="intermediate_size_mlp",
    experts=ExpertRules(
        ("num_local_experts",),
        width="intermediate_size",
        layouts=(_STORED, _MERGED, _STORED),
        scores="chosen sigmoid",
        normalised=False,
        scaled_inputs=True,
        transposed=frozenset({_STORED["gate_up"], _STORED["down"]}),
        stores_transposes=True,
        layers=_sparse,
        shared=lambda config: size(config, "intermediate_size"),
    ),
    qk_norms="unit",
    qk_norm_key="use_qk_norm",
    bias_keys={"attention_bias": ATTENTION},
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=8192, size_key="attention_chunk_size", chunked=True, which="rotated"),
    positions=Positions(
        theta=500_000.0,
        interleaved=True,
        rotated=lambda config, kinds: listed_rotated(config, len(kinds)),
        scales_unrotated=True,
    ),
    keys=words(
        "attn_scale attn_temperature_tuning floor_scale for_llm_compressor interleave_moe_layer_step moe_layers "
        "no_rope_layer_interval no_rope_layers router_jitter_noise"
    ),
    # Defaults of Llama4TextConfig: the `text_config` of a multimodal checkpoint may omit these keys.
    defaults={
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
    },
)
