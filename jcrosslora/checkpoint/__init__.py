"""Base models: safetensors, GGUF, quantised formats, the hub, weights in memory, and the supported families."""

from jcrosslora.architectures.blocks import ROLE_PATHS, ROLES, wanted_roles
from jcrosslora.architectures.config import Dims
from jcrosslora.architectures.families import FAMILIES
from jcrosslora.architectures.family import Family
from jcrosslora.checkpoint.base import BaseInfo, BaseModel, describe_base
from jcrosslora.checkpoint.config import ModelConfig, check_config, read_dims
from jcrosslora.checkpoint.experts import expert_tensors
from jcrosslora.checkpoint.gguf_tensors import architecture, gguf_name
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.checkpoint.layout import Module, expected_shapes, holder_of
from jcrosslora.checkpoint.opening import open_base
from jcrosslora.checkpoint.safetensors import DTYPES, SafetensorsFile, ShardedStore
from jcrosslora.checkpoint.store import MappedFile
from jcrosslora.checkpoint.tokenizer import Encoded, Tokenizer, load_tokenizer, pad_right
from jcrosslora.checkpoint.vocabulary import Vocabulary, shared_ids
from jcrosslora.checkpoint.wrapped import class_module_name, text_module_name

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
    "architecture",
    "check_config",
    "class_module_name",
    "describe_base",
    "expected_shapes",
    "expert_tensors",
    "gguf_name",
    "holder_of",
    "is_hub_id",
    "load_tokenizer",
    "open_base",
    "pad_right",
    "read_dims",
    "shared_ids",
    "text_module_name",
    "wanted_roles",
]
