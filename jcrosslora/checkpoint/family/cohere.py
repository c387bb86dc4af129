"""Cohere 1 and 2 (Command R, Aya, Command R7B, Command A): parallel blocks with one norm.

In Cohere 2 layers of full attention have no positions. The norms of queries and keys that Command R+ has are not known.
"""

from functools import partial

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions, Windows

_LOGIT_SCALE = {"logit_scale": "logit_scale"}

_cohere = partial(
    Family,
    norms={"attn": "input_layernorm"},
    norm="layer",
    parallel=True,
    bias_keys={"attention_bias": ATTENTION},
    tied=True,
    eps=Number("layer_norm_eps", 1e-5),
    logit_scale=Number("logit_scale", 0.0625),
)

COHERE = _cohere(
    name="cohere",
    architectures=("CohereForCausalLM",),
    gguf=Gguf("command-r", numbers=_LOGIT_SCALE),
    positions=Positions(theta=500_000.0, interleaved=True),
    keys=words("attention_bias layer_norm_eps logit_scale"),
    fixed={"use_qk_norm": (False,)},
)
COHERE2 = _cohere(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    gguf=Gguf("cohere2", numbers=_LOGIT_SCALE),
    windows=Windows(period=4, period_keys=("sliding_window_pattern", "_sliding_window_pattern")),
    positions=Positions(interleaved=True, unrotated="full"),
    keys=words(
        "attention_bias layer_norm_eps logit_scale sliding_window sliding_window_pattern _sliding_window_pattern "
        "layer_types"
    ),
    # Published configurations state what the class always does.
    fixed={
        "layer_switch": (4,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (False, True),
        "use_qk_norm": (False,),
    },
)
