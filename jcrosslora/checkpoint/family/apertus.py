"""Apertus: an MLP without a gate, whose activation xIELU (arXiv 2411.13010) has trained parameters in each layer."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, UNGATED_MLP
from jcrosslora.checkpoint.family.record import QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions

APERTUS = Family(
    name="apertus",
    architectures=("ApertusForCausalLM",),
    gguf=Gguf(
        "apertus", arrays={f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}
    ),
    roles=(*ATTENTION, *UNGATED_MLP),
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
    keys=words("attention_bias"),
    fixed={"qk_norm": (True,), "post_norm": (False,), "mlp_bias": (False,)},
)
