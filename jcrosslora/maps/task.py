"""What a method is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError
from jcrosslora.text import Completion, Prompt

if TYPE_CHECKING:
    from jcrosslora.decoder.loaded import LoadedBases
    from jcrosslora.distill.sources.protocol import Source
    from jcrosslora.evaluate.probes import ProbeBatch


@dataclass(frozen=True, eq=False)
class Task:
    """One adapter that is to be moved between two bases.

    Attributes:
        source: the base that the adapter was trained on; or a source that can only be queried, with its adapter.
        target: the base that it is moved to.
        adapter: the original adapter, with fused matrices split; empty where the source can only be queried.
        start: the adapter behind the maps of the method's `start`; None where nothing is mapped.
        layers: for each target layer the source layer that feeds it, or None.
        prompts: the user's texts or conversations; empty if the source writes its own.
        batches: probe texts, tokenised for both bases, for methods that require probe texts.
        rank: the truncation rank of the alignment; 0 without one.
        shared: results that hold for all adapters of the pair; a method may add its own.
        seed: for everything that is sampled.
        states: folder in which a long fit keeps its states, from which it continues after a stop; None keeps none.
        loaded: gives the weights of both bases, divided over devices if one is too small; None if they do not run.
    """

    source: BaseModel | Source
    target: BaseModel
    adapter: Adapter
    start: Adapter | None = None
    layers: Sequence[int | None] = ()
    prompts: Sequence[Prompt] = ()
    batches: Sequence[ProbeBatch] = ()
    rank: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)
    seed: int = 0
    states: Path | None = None
    loaded: LoadedBases | None = None

    @property
    def base(self) -> BaseModel:
        """Return the source, whose weights the method reads.

        Raises:
            MethodError: the source can only be queried.
        """
        if not isinstance(self.source, BaseModel):
            msg = f"this method reads the weights of the source, and {self.source.name} can only be queried: use "
            raise MethodError(msg + "--method distill, or give the weights with --source")
        return self.source

    @property
    def mapped(self) -> Adapter:
        """Return the adapter behind the maps, which a map method always has."""
        assert self.start is not None
        return self.start


@dataclass(frozen=True, eq=False)
class Sizes:
    """What is known of a task before any adapter is moved.

    Attributes:
        target: the base that adapters are moved to.
        prompts: how many the user gave.
        probes: how many probe texts are read.
        rank: the truncation rank of the alignment; 0 without one.
    """

    target: BaseModel
    prompts: int
    probes: int
    rank: int


@dataclass(frozen=True, eq=False)
class Moved:
    """An update of the target, with an account of how it came about.

    Attributes:
        adapter: the update.
        fitted: description of a fit, one sentence without a full stop; None without a fit. A fitted update uses the
            whole source adapter, so no source module counts as unmapped.
        added: description of what was added to the mapped update, in the same form; None if nothing was.
        curve: of a fit, completions used and the divergence from the teacher on held-out ones, as it went.
        completions: that the source wrote for the fit.
        wrote_prompts: whether the source wrote their prompts as well.
        chat_template: Jinja source by which the target read conversations in the fit; None if it read none.
    """

    adapter: Adapter
    fitted: str | None = None
    added: str | None = None
    curve: Sequence[tuple[int, float]] = ()
    completions: tuple[Completion, ...] = ()
    wrote_prompts: bool = False
    chat_template: str | None = None
