"""What follows the maps: the context that `Method.finalize` gets, and the update that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel

if TYPE_CHECKING:
    from jcrosslora.evidence.probes import ProbeBatch


@dataclass(frozen=True, eq=False)
class FinalizeContext:
    """What a method may use after the maps.

    Attributes:
        source: the base that the adapter is of.
        target: the base that it is moved to.
        adapter: the original adapter, with fused matrices taken apart.
        layers: for each target layer the source layer that feeds it, or None.
        prompts: the user's text; empty where the source is to write its own.
        batches: probe texts as both bases read them; for methods that require probe texts.
        rank: the truncation rank of the alignment.
        shared: results that hold for all adapters of the pair; a method may add its own.
        seed: of everything that is sampled.
        progress: whether to show progress.
    """

    source: BaseModel
    target: BaseModel
    adapter: Adapter
    layers: Sequence[int | None]
    prompts: Sequence[str] = ()
    batches: Sequence[ProbeBatch] = ()
    rank: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Update:
    """An update of the target.

    Attributes:
        adapter: the update.
        fitted: what was fitted behind the maps, one sentence without a full stop; None where nothing was. The update is
            then no longer what the maps made, and nothing of the source adapter counts as unmapped.
        added: what was added to the moved update, one sentence without a full stop; None where nothing was.
        texts: the texts that the source wrote for the fit.
        wrote_prompts: whether the source wrote the prompts of these texts as well.
    """

    adapter: Adapter
    fitted: str | None = None
    added: str | None = None
    texts: tuple[str, ...] = ()
    wrote_prompts: bool = False
