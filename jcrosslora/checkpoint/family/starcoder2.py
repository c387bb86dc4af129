"""StarCoder2: layer norms, biases, and an MLP without a gate."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, UNGATED_MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Windows

STARCODER2 = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    gguf=Gguf("starcoder2"),
    roles=(*ATTENTION, *UNGATED_MLP),
    fused={"mlp.c_fc": ("up_proj",), "mlp.c_proj": ("down_proj",)},
    norm="layer",
    norm_biases=True,
    bias_keys={"use_bias": (*ATTENTION, *UNGATED_MLP)},
    tied=True,
    activation="gelu_pytorch_tanh",
    eps=Number("norm_epsilon", 1e-5),
    windows=Windows(size=None, listed=False),
    keys=words("use_bias norm_epsilon sliding_window layer_types embedding_dropout residual_dropout"),
    fixed={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    defaults={"use_bias": True},
)
