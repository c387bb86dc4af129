"""The contents of an adapter file to write, whatever the format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.file_factors import FileDtype
from jcrosslora.adapter.token_updates import TokenUpdate


@dataclass(frozen=True, eq=False)
class Contents:
    """An adapter to write.

    Attributes:
        modules: updates by the names under which the base stores its modules (fused ones merged), in natural order.
        dtype: number format of the file.
        base_name: the base model that it is for, an id or a path.
        base_revision: its revision.
        exclude: modules of the base that have the ending of one in `modules`, but no update.
        family: the base's family ("llama", "qwen2", ...), if a format needs it.
        heads: (query heads, key heads) of the base, likewise.
        metadata: provenance, pairs of strings.
        invocation: token ids from which on it is active (aLoRA); None if it is always active.
        frozen: a (K, I) and b (O, K) of each module for profile lora-xs, see `write_lora_xs`.
        magnitudes: float32 (O,) of each module if the adapter is a DoRA and `modules` its s B A; else None.
        tokens: changes of the embedding and the output head, for the one format that stores them.
    """

    modules: Mapping[str, LoRAFactors]
    dtype: FileDtype = "float32"
    base_name: str | None = None
    base_revision: str | None = None
    exclude: tuple[str, ...] = ()
    family: str | None = None
    heads: tuple[int, int] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    invocation: Sequence[int] | None = None
    frozen: Mapping[str, LoRAFactors] | None = None
    magnitudes: Mapping[str, np.ndarray] | None = None
    tokens: tuple[TokenUpdate, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(factors.rank for factors in self.modules.values())
