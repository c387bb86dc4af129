"""The blocks that layers are made of, and the lists of all their modules and tensors."""

from collections.abc import Collection, Iterable, Mapping

from jcrosslora.architectures.blocks.attention import HeadNorms as HeadNorms
from jcrosslora.architectures.blocks.attention import LatentAttention as LatentAttention
from jcrosslora.architectures.blocks.attention import SelfAttention as SelfAttention
from jcrosslora.architectures.blocks.block import Block as Block
from jcrosslora.architectures.blocks.block import LayerInputWeights as LayerInputWeights
from jcrosslora.architectures.blocks.block import Linear as Linear
from jcrosslora.architectures.blocks.block import Link as Link
from jcrosslora.architectures.blocks.block import Mlp as Mlp
from jcrosslora.architectures.blocks.block import Norm as Norm
from jcrosslora.architectures.blocks.block import Parallel as Parallel
from jcrosslora.architectures.blocks.block import PerLayerInput as PerLayerInput
from jcrosslora.architectures.blocks.block import Tensor as Tensor
from jcrosslora.architectures.blocks.block import layer_inputs as layer_inputs
from jcrosslora.architectures.blocks.experts import Experts as Experts
from jcrosslora.architectures.blocks.experts import MlpAndExperts as MlpAndExperts
from jcrosslora.architectures.blocks.experts import Routing as Routing
from jcrosslora.architectures.blocks.experts import Scores as Scores
from jcrosslora.architectures.blocks.recurrences import DeltaRule as DeltaRule
from jcrosslora.architectures.blocks.recurrences import Mamba2 as Mamba2
from jcrosslora.architectures.blocks.recurrent import RecurrentBlock as RecurrentBlock
from jcrosslora.architectures.blocks.recurrent import ShortConvolution as ShortConvolution
from jcrosslora.errors import UsageError, suggestion

# The classes that have linear modules, in listing order.
BLOCKS: tuple[type[Block], ...] = (
    SelfAttention,
    LatentAttention,
    ShortConvolution,
    DeltaRule,
    Mamba2,
    Mlp,
    Experts,
    PerLayerInput,
)
LINEARS: Mapping[str, Linear] = {one.role: one for block in BLOCKS for one in block.LINEARS}
ROLES = tuple(LINEARS)
# Logical name of each role in a layer, the same in every family.
ROLE_PATHS: Mapping[str, str] = {role: one.path for role, one in LINEARS.items()}
# What each role reads. All roles of a site are in the same layers.
INPUT_SITES: Mapping[str, str] = {role: one.site for role, one in LINEARS.items()}
# Roles that write to the residual stream, and that read it; the others do neither.
WRITERS = tuple(role for role, one in LINEARS.items() if one.stream == "writes")
READERS = tuple(role for role, one in LINEARS.items() if one.stream == "reads")

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
# In "qg_proj", the rows of queries and of their gates alternate head by head.
GATED_ATTENTION = ("qg_proj", *ATTENTION[1:])
MLP = ("gate_proj", "up_proj", "down_proj")
UNGATED_MLP = ("up_proj", "down_proj")
DENSE_ROLES = (*ATTENTION, *MLP)
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
CONVOLUTION = ("conv_in_proj", "conv_out_proj")
MAMBA = ("mamba_in_proj", "mamba_out_proj")
SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")  # experts that all tokens go through
# From the stream to the small latent that experts read, and back from their output.
EXPERT_LATENT = ("expert_in_proj", "expert_out_proj")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
# For per-layer inputs: an embedding of (V, layers * features), a projection of the stream before the first layer, and
# the norm of its output.
LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
LAYER_INPUT_PROJECTION = "model.per_layer_model_projection.weight"
LAYER_INPUT_NORM = "model.per_layer_projection_norm.weight"


def module_name(layer: int, role: str) -> str:
    """Return the logical name of a module, such as "model.layers.0.self_attn.q_proj"."""
    return f"model.layers.{layer}.{ROLE_PATHS[role]}"


def roles_named(given: Collection[str] | None, present: Collection[str]) -> list[str]:
    """Return the roles of a base that the user asked for; None asks for all.

    A name selects all modules of attention or of the dense MLP with that name: q_proj also selects `qg_proj`, and the
    `global_q_proj` of some layers. Raises UsageError if there is none.
    """
    paths = {ROLE_PATHS[name] for name in given or () if ROLE_PATHS[name].endswith(f".{name}")}
    found = [role for role in present if given is None or role in given or ROLE_PATHS[role] in paths]
    if not found:
        raise UsageError(f"modules {', '.join(given or ())}: there are none of these, only {', '.join(present)}")
    return found


def wanted_roles(given: Iterable[str] | None) -> str:
    """Describe the roles for an error about an unknown one; the full list would be too long."""
    near = next((suggestion(one, ROLES) for one in given or () if one not in ROLES), "")
    return f"different roles of linear modules{near}, such as {', '.join(DENSE_ROLES)}"
