"""A LoRA adapter in memory: one pair of factors for each module, as a pytree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import numpy as np

if TYPE_CHECKING:
    from jcrosslora.adapter.token_updates import TokenUpdate

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class LoRAFactors:
    """The update of one linear module with weight W of shape (O, I): dW = scale * b @ a.

    Attributes:
        a: (K, I), reads the input of the module.
        b: (O, K), writes its output.
        scale: a Python float: alpha / r, or alpha / sqrt(r) for rsLoRA. Static, not a leaf.
    """

    a: Array
    b: Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def rank(self) -> int:
        """K, the number of rows of `a`."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), the shape of the weight that the update is for."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, eq=False)
class AdapterInfo:
    """Where an adapter came from and what could not be read from it.

    Attributes:
        name: the path or hub id it was read from, or a name given by its maker.
        base_name: `base_model_name_or_path` as its file states it; never trusted, may be None.
        config: the raw `adapter_config.json`, or the metadata of a GGUF file.
        form: the format of its files, "PEFT", "MLX" or "GGUF"; None for an adapter made in memory.
        digest: "sha256:..." of the weights file, or None for an adapter made in memory.
        revision: hub commit of an adapter that was asked for by a hub id, else None.
        ignored: what the file holds beside LoRA factors, and why it does not move, one sentence each.
        kind: the kind of adapter that it was read from, such as "DoRA".
        read_as: how it was read and what that lost, one sentence without a full stop; None for a plain LoRA.
        lost: share of the update's squared Frobenius norm that reading it lost.
        rank_limit: the largest rank that was asked for when it was read, or None.
        invocation: tokens of its base from which on it acts (aLoRA); None for one that always does.
        invocation_target: the same text in tokens of the base that it is to be moved to, see `shifting.invocation`.
    """

    name: str = "memory"
    base_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    form: str | None = None
    digest: str | None = None
    revision: str | None = None
    ignored: tuple[str, ...] = ()
    kind: str = "LoRA"
    read_as: str | None = None
    lost: float = 0.0
    rank_limit: int | None = None
    invocation: tuple[int, ...] | None = None
    invocation_target: tuple[int, ...] | None = None


@flax.struct.dataclass
class Adapter:
    """A LoRA adapter.

    Attributes:
        modules: module name, as the base model spells it without any PEFT prefix
            (`model.layers.0.self_attn.q_proj`), to its factors.
        info: provenance, static.
        tokens: what it changes of the embedding and of the output head, static; only where it was read with its base.
    """

    modules: dict[str, LoRAFactors]
    info: AdapterInfo = flax.struct.field(pytree_node=False, default_factory=AdapterInfo)
    tokens: tuple[TokenUpdate, ...] = flax.struct.field(pytree_node=False, default=())
