"""The contract of transfer methods: their result, and their two base classes.

A method either fits an update to what the adapter does, or computes maps that are applied to the adapter's update.
"""

from __future__ import annotations

import hashlib
import inspect
import marshal
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jcrosslora.adapter import Adapter, Carried
from jcrosslora.checkpoint import BaseModel
from jcrosslora.maps.evidence import RUNNING, Evidence, EvidenceKind, Maps
from jcrosslora.maps.shifted import ModuleRow, TokenRow, UnmappedSource
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import begin
from jcrosslora.utils.settings import Settings

if TYPE_CHECKING:
    from jcrosslora.distill.facts import FitFacts
    from jcrosslora.maps.plan import Plan

Measure = Literal["vector ratio", "subspace similarity", "weight cosine", "activation cosine", "part cosine", "none"]
# The truncation rank of the Cross-LoRA paper, also used for methods whose papers state none.
DEFAULT_SVD_RANK = 320
FINISH = "finish"  # the step of a method that does not name itself on the display
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, eq=False)
class Moved:
    """An update of the target, with an account of how it came about.

    A method that changes what the maps made returns `dataclasses.replace(plan.mapped, adapter=...)`, which keeps the
    account of the maps.

    Attributes:
        adapter: all of it is written, and nothing else. Its `info` is filled in by the transfer.
        rows: the account of each module that the maps moved.
        tokens: that of each change of the embedding and the output head.
        unmapped: the source modules that feed no target module.
        kernels: which kernels decomposed the matrices of both bases.
        fit: the facts of a fit, `FitFacts()` if none are known; None without a fit. A fitted update uses the whole
            source adapter, so no source module counts as unmapped.
        added: description of what was added to the mapped update, one sentence without a full stop; None if nothing
            was.
        curve: of a fit, completions used and the divergence from the teacher on held-out ones, as it went.
        completions: that the source wrote for the fit.
        wrote_prompts: whether the source wrote their prompts as well.
        chat_template: Jinja source by which the target read conversations in the fit; None if it read none.
        warnings: what the user has to know, one sentence each.
    """

    adapter: Adapter
    rows: tuple[ModuleRow, ...] = ()
    tokens: tuple[TokenRow, ...] = ()
    unmapped: tuple[UnmappedSource, ...] = ()
    kernels: tuple[str, ...] = ()
    fit: FitFacts | None = None
    added: str | None = None
    curve: Sequence[tuple[int, float]] = ()
    completions: tuple[Completion, ...] = ()
    wrote_prompts: bool = False
    chat_template: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method(Settings):
    """Base class of all methods. A subclass is a frozen dataclass; its fields are its hyper-parameters.

    The flags of the command line, the keys of recipes and batch plans, and the cache keys are derived from the fields:
    a field needs a default, a type that TOML can hold, and a docstring line beneath it. A direct subclass fits an
    update to what the adapter does; one that chooses maps from the weights of both bases inherits from `MapMethod`.

    Attributes:
        when: when to use it, for `jcrosslora methods`, such as "for a base and a model cut from it".
        requires: the evidence that has to be collected. A property may derive it from the fields.
        carries: the kinds of change that it moves. Changes of the embedding and the output head (`Carried.TOKENS`) move
            if the maps keep (or permute) the coordinates of the residual stream; updates of experts by a fit, or by
            maps if the target is a copy of the source or of its parts.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    when: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset()
    carries: ClassVar[Carried] = Carried.LINEAR | Carried.EXPERTS

    @classmethod
    def called(cls) -> str:
        """Return what errors call it."""
        return f"method {cls.name}"

    def move(self, plan: Plan) -> Moved:
        """Return the update of the target."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        self.check()

    def check(self) -> None:
        """Raise `UsageError` for hyper-parameters out of range, before anything is computed."""

    def cost(self, plan: Plan) -> dict[str, Cost | None]:
        """Count what `move` takes after the maps, by its steps on the display; None if it is not known."""
        del plan
        return {FINISH: None}

    def memory(self, target: BaseModel, free: int | None) -> int | None:
        """Return the bytes that `move` takes beside the weights of both bases, which leave `free`; None if unknown."""
        del target, free
        return None

    @property
    def map_method(self) -> MapMethod | None:
        """The map method that makes `plan.mapped`: a map method itself, None if nothing is mapped."""
        return None

    @property
    def truncates(self) -> bool:
        """Tell whether the maps depend on a truncation rank."""
        return hasattr(self, "svd_rank")

    @property
    def runs_bases(self) -> bool:
        """Tell whether both bases have to run on text."""
        return bool(self.requires & RUNNING)

    @property
    def fits_update(self) -> bool:
        """Tell whether the whole update is fitted, so that its size follows from the fit."""
        return True

    @property
    def holds_bases(self) -> bool:
        """Tell whether `move` runs both bases by `plan.loaded`, which divides their weights over devices."""
        return self.fits_update and self.runs_bases

    @property
    def reads_source(self) -> bool:
        """Tell whether the weights of the source are needed; a source that can only be queried has none."""
        return self.map_method is not None or bool(self.requires - {EvidenceKind.COMPLETIONS})

    @property
    def uses_examples(self) -> bool:
        """Tell whether the update is fitted to answers, among which labelled examples can be."""
        return EvidenceKind.COMPLETIONS in self.requires

    @property
    def needs(self) -> str:
        """Return the evidence that the method uses, in words."""
        parts = ["equal shapes"] if self.map_method is not None and self.map_method.equal_shapes else []
        always = {EvidenceKind.RANDOM_KEY, EvidenceKind.CHANNEL_SCALES}  # that any pair of bases has
        parts += [kind.value for kind in EvidenceKind if kind in self.requires - always]
        return ", ".join(parts) or "nothing"

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def cache_key(self) -> Any:
        """Return everything that the maps depend on, as a JSON value; for a user's method this includes its code."""
        return self.name, type(self).__qualname__, self._code_digest(), self.settings()

    @classmethod
    def source_file(cls) -> Path | None:
        """Return the file that defines the method; None if there is none, as in a notebook."""
        try:
            return Path(inspect.getfile(cls))
        except (TypeError, OSError):
            return None

    @classmethod
    def spec(cls) -> str:
        """Return how `--method` and recipes refer to it: by its name, or as "module:Class" for a user's own."""
        if cls.__module__.startswith("jcrosslora."):
            return cls.name
        # `__main__` cannot be imported by name, but the file of the script can.
        file = cls.source_file() if cls.__module__ == "__main__" else None
        return f"{cls.__module__ if file is None else file.stem}:{cls.__qualname__}"

    @classmethod
    def _code_digest(cls) -> str:
        """Digest the file of a user's method; without a file, its main function."""
        file = cls.source_file()
        if file is None:
            decides = cls.maps if issubclass(cls, MapMethod) else cls.move
            return hashlib.sha256(marshal.dumps(decides.__code__)).hexdigest()
        return "" if _PACKAGE in file.parents else hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class MapMethod(Method):
    """Base class of methods that choose two maps for each pair of modules: dW_tgt = P_out dW_src P_in'.

    The alignment (`maps` over all pairs of modules) and the shift (the adapter through the maps) are the same for all.

    Attributes:
        measure: the diagnostic that says whether the two bases agree in what the method relies on; "none" without one.
        is_control: whether no effect is expected, by design. The norm of a control's update is restored after the maps.
        equal_shapes: whether it is defined only for modules of equal shape.
        equal_modules: whether it is defined only for bases with the same modules, by name and shape.
        single_vectors: whether single singular vectors matter, or only the subspace that they span.
        takes_numpy: whether `maps` takes arrays of numpy as well; then nothing is compiled for it on a CPU.
    """

    measure: ClassVar[Measure] = "none"
    is_control: ClassVar[bool] = False
    equal_shapes: ClassVar[bool] = False
    equal_modules: ClassVar[bool] = False
    single_vectors: ClassVar[bool] = False
    takes_numpy: ClassVar[bool] = False
    carries: ClassVar[Carried] = Carried.LINEAR

    def maps(self, evidence: Evidence) -> Maps:
        """Choose the maps of one pair of modules. Pure, traceable and unbatched."""
        raise NotImplementedError

    def move(self, plan: Plan) -> Moved:
        """Align the modules, shift the adapter, and return the mapped update; a method may override this to add to it.

        Raises:
            PairingError: no update of the adapter is moved.
            CheckpointError: weights cannot be read or are not finite.
        """
        moved = plan.mapped
        assert moved is not None  # a map method has maps
        begin(FINISH)
        return moved

    def cost(self, plan: Plan) -> dict[str, Cost | None]:
        """Count nothing for an update that stays unchanged."""
        return {} if type(self).move is MapMethod.move else super().cost(plan)

    @property
    def map_method(self) -> MapMethod:
        """Return the method itself."""
        return self

    @property
    def fits_update(self) -> bool:
        """Return False: the update is mapped."""
        return False
