"""Base models: safetensors, GGUF, quantised formats, the hub, weights in memory, and the supported families."""

from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.config import Dims
from jcrosslora.checkpoint.families import FAMILIES, ROLES, Family
from jcrosslora.checkpoint.layout import Module
from jcrosslora.checkpoint.opening import open_base
from jcrosslora.checkpoint.vocabulary import Vocabulary

__all__ = ["FAMILIES", "ROLES", "BaseModel", "Dims", "Family", "Module", "Vocabulary", "open_base"]
