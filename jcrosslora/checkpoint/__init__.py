"""Base models: safetensors, GGUF, quantised formats, the hub, weights in memory, and the supported families."""

from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.base_info import BaseInfo, describe_base
from jcrosslora.checkpoint.config import Dims, ModelConfig, check_config, read_dims
from jcrosslora.checkpoint.families import FAMILIES, ROLE_PATHS, ROLES, Family
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.checkpoint.layout import Module, expected_shapes
from jcrosslora.checkpoint.mapped import MappedFile
from jcrosslora.checkpoint.opening import open_base
from jcrosslora.checkpoint.safetensors import DTYPES, SafetensorsFile
from jcrosslora.checkpoint.shards import ShardedStore
from jcrosslora.checkpoint.shared_tokens import shared_ids
from jcrosslora.checkpoint.tokenizer import Encoded, Tokenizer, load_tokenizer, pad_right
from jcrosslora.checkpoint.vocabulary import Vocabulary

__all__ = [
    "DTYPES",
    "FAMILIES",
    "ROLES",
    "ROLE_PATHS",
    "BaseInfo",
    "BaseModel",
    "Dims",
    "Encoded",
    "Family",
    "MappedFile",
    "ModelConfig",
    "Module",
    "SafetensorsFile",
    "ShardedStore",
    "Tokenizer",
    "Vocabulary",
    "check_config",
    "describe_base",
    "expected_shapes",
    "is_hub_id",
    "load_tokenizer",
    "open_base",
    "pad_right",
    "read_dims",
    "shared_ids",
]
