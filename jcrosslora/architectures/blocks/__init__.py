"""The blocks that layers are made of, and what all of them together have."""

from collections.abc import Mapping

from jcrosslora.architectures.blocks.block import Block as Block
from jcrosslora.architectures.blocks.block import Linear as Linear
from jcrosslora.architectures.blocks.block import Mlp as Mlp
from jcrosslora.architectures.blocks.block import Norm as Norm
from jcrosslora.architectures.blocks.block import Parallel as Parallel
from jcrosslora.architectures.blocks.block import Tensor as Tensor
from jcrosslora.architectures.blocks.delta_rule import DeltaRule as DeltaRule
from jcrosslora.architectures.blocks.experts import Experts as Experts
from jcrosslora.architectures.blocks.experts import MlpAndExperts as MlpAndExperts
from jcrosslora.architectures.blocks.experts import Routing as Routing
from jcrosslora.architectures.blocks.latent_attention import LatentAttention as LatentAttention
from jcrosslora.architectures.blocks.mamba2 import Mamba2 as Mamba2
from jcrosslora.architectures.blocks.per_layer_input import PerLayerInput as PerLayerInput
from jcrosslora.architectures.blocks.recurrent import RecurrentBlock as RecurrentBlock
from jcrosslora.architectures.blocks.recurrent import ShortConvolution as ShortConvolution
from jcrosslora.architectures.blocks.self_attention import SelfAttention as SelfAttention

# The classes that have linear modules, in the order in which these are listed.
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
