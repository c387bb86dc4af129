"""Model families and their blocks: derive layers, modules, names, shapes and the forward pass from a configuration."""

from jcrosslora.architectures.architecture import Architecture as Architecture
from jcrosslora.architectures.architecture import Layer as Layer
from jcrosslora.architectures.architecture import attention as attention
from jcrosslora.architectures.architecture import experts as experts
from jcrosslora.architectures.architecture import mlp as mlp
from jcrosslora.architectures.architecture import usual_layers as usual_layers
from jcrosslora.architectures.blocks import ATTENTION as ATTENTION
from jcrosslora.architectures.blocks import DENSE_ROLES as DENSE_ROLES
from jcrosslora.architectures.blocks import EMBEDDING as EMBEDDING
from jcrosslora.architectures.blocks import LATENT as LATENT
from jcrosslora.architectures.blocks import LAYER_EMBEDDING as LAYER_EMBEDDING
from jcrosslora.architectures.blocks import MLP as MLP
from jcrosslora.architectures.blocks import QKV as QKV
from jcrosslora.architectures.blocks import ROLE_PATHS as ROLE_PATHS
from jcrosslora.architectures.blocks import ROLES as ROLES
from jcrosslora.architectures.blocks import module_name as module_name
from jcrosslora.architectures.config import Dims as Dims
from jcrosslora.architectures.config import Number as Number
from jcrosslora.architectures.config import words as words
from jcrosslora.architectures.expert_rules import ExpertRules as ExpertRules
from jcrosslora.architectures.families import FAMILIES as FAMILIES
from jcrosslora.architectures.family import Family as Family
from jcrosslora.architectures.family import Gguf as Gguf
from jcrosslora.architectures.family import Positions as Positions
from jcrosslora.architectures.family import Windows as Windows
