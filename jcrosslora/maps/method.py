"""The interface of transfer methods: the plan that they get, and their two base classes.

A method either fits an update to what the adapter does, or computes maps that are applied to the adapter's update.
"""

from __future__ import annotations

import hashlib
import inspect
import marshal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jcrosslora.adapter import Adapter, Carried
from jcrosslora.architectures.blocks import LINEARS
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.weight_stacks import bounded_groups
from jcrosslora.errors import MethodError, PairingError
from jcrosslora.evaluate.probes import ProbeBatch, Probes
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import RUNNING, Evidence, EvidenceKind, Maps
from jcrosslora.maps.groups import TransportGroup
from jcrosslora.maps.moved import Calibration, Moved
from jcrosslora.relation.pairing import Pair, Pairing
from jcrosslora.text import Completion, Prompt
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import begin
from jcrosslora.utils.settings import Settings

if TYPE_CHECKING:
    from jcrosslora.decoder import LoadedBases
    from jcrosslora.distill.sources import QueriedSource

Measure = Literal["vector ratio", "subspace similarity", "weight cosine", "activation cosine", "part cosine", "none"]
# The truncation rank of the Cross-LoRA paper, also used for methods whose papers state none.
DEFAULT_SVD_RANK = 320
FINISH = "finish"  # the name on the display of a step that a method does not name
_PACKAGE = Path(__file__).parent.parent
Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked transfer of an adapter, before anything is computed.

    Attributes:
        bases: the source and the target with the facts that stages share; None if the source can only be queried.
        adapter: the source adapter, with fused matrices split and without the changes that do not move. It is empty if
            the source can only be queried, and in the plan of an alignment that several adapters share.
        queried: a source that can only be queried, with its adapter; None if its weights are read.
        depth: the requested depth map, as reports state it.
        sources: the source modules that adapters have; None means all.
        pairing: which module feeds which, over all modules of the target; None if nothing is mapped.
        rank: R, the truncation rank; a module uses at most its short side.
        calibrate: "frobenius" restores the norm of each update after the maps; None leaves this to the method.
        scale: factor of each mapped update.
        given: the user's text; None if there is none.
        probes: the text that both bases are run on; None if there is none yet.
        batches: the same text as token batches for both bases.
        probe_count: number of texts that the source writes if text is needed and none is given.
        groups: the maps, if they are made already.
        reason: why `auto` chose the method; None if the user named it.
        mismatch_warnings: signs that the adapter was not trained on this source, one sentence each.
        shared: results that hold for all adapters of the pair; a method may add some.
        states: folder where a long fit saves its states, to continue after a stop; None saves none.
        loaded: gives the weights of both bases, divided over devices if they do not fit one; None if the bases are not
            run.
        apply_maps: aligns the modules and shifts the adapter, see `jcrosslora.maps.shift`; None if nothing is mapped.
    """

    method: Method
    target: BaseModel
    adapter: Adapter
    bases: BasePair | None = None
    queried: QueriedSource | None = None
    depth: str = ""
    seed: int = 0
    sources: frozenset[str] | None = None
    pairing: Pairing | None = None
    rank: int = 0
    calibrate: Calibration | None = None
    scale: float = 1.0
    given: Probes | None = None
    probes: Probes | None = None
    batches: tuple[ProbeBatch, ...] = ()
    probe_count: int = 0
    groups: tuple[TransportGroup, ...] | None = None
    reason: str | None = None
    mismatch_warnings: tuple[str, ...] = ()
    shared: dict[Any, Any] = field(default_factory=dict)
    states: Path | None = None
    loaded: LoadedBases | None = None
    apply_maps: Callable[[Plan], Moved] | None = None

    @property
    def pair(self) -> BasePair:
        """Both bases; raise MethodError if the source can only be queried."""
        if self.bases is None:
            raise no_weights(self.method)
        return self.bases

    @property
    def source(self) -> BaseModel | QueriedSource:
        """The source: a base whose weights can be read, or a source that can only be queried."""
        return self.pair.source if self.queried is None else self.queried

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The user's texts or conversations; empty if the source writes its own."""
        return () if self.given is None else self.given.prompts or self.given.texts

    @property
    def examples(self) -> Sequence[Completion]:
        """The user's prompts with right answers."""
        return () if self.given is None else self.given.examples

    @property
    def text_count(self) -> int:
        """The number of texts that both bases are run on, if they are run."""
        return (0 if self.given is None else len(set(self.given.texts))) or self.probe_count

    @property
    def mapped(self) -> Moved | None:
        """The adapter after the maps of the method's `map_method`, applied on first use; None without maps.

        Raises:
            PairingError: no update of the adapter is moved.
            CheckpointError: weights cannot be read or are not finite.
        """
        if self.apply_maps is not None and not self.is_mapped:
            self.keep(self.apply_maps(self))
        return vars(self).get("_mapped")

    @property
    def is_mapped(self) -> bool:
        """Whether no maps are left to apply."""
        return self.apply_maps is None or "_mapped" in vars(self)

    def keep(self, moved: Moved) -> None:
        """Set `mapped` to an adapter that was mapped already, together with others."""
        vars(self)["_mapped"] = moved

    @property
    def keeps_norm(self) -> bool:
        """Whether each update gets its source norm back after the maps; by default only a control's does."""
        if self.calibrate is None:
            return self.method.map_method is not None and self.method.map_method.is_control
        return self.calibrate == "frobenius"

    @property
    def modules(self) -> tuple[Pair, ...]:
        """The pairs to make maps for: those with a source module in `sources`; none for a method without maps.

        Raises PairingError if the source modules feed no module.
        """
        if self.method.map_method is None or self.pairing is None:
            return ()
        if self.sources is None:
            return self.pairing.pairs
        pairs = tuple(pair for pair in self.pairing.pairs if pair.source in self.sources)
        if not pairs:
            msg = f"none of the adapter's {len(self.sources)} modules feeds a module of the target under depth map "
            raise PairingError(msg + f"{self.pairing.depth_map!r}; choose another with --depth")
        return pairs

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The source layer that feeds each target layer, or None."""
        return (None,) * self.target.dims.layers if self.pairing is None else self.pairing.layers

    @property
    def kinds(self) -> frozenset[EvidenceKind]:
        """The kinds of evidence that the maps need."""
        return frozenset() if self.method.map_method is None else self.method.map_method.requires

    @property
    def single_vectors(self) -> bool:
        """Whether single singular vectors matter, not only the subspace that they span."""
        return self.method.map_method is not None and self.method.map_method.single_vectors

    @property
    def needs_text(self) -> bool:
        """Whether both bases are run on text, for maps that are not made yet or in the method's `move`."""
        aligns = EvidenceKind.ACTIVATIONS in self.method.requires and self.groups is None
        return aligns or EvidenceKind.PROBE_TEXTS in self.method.requires

    def shapes(self, pair: Pair) -> tuple[Shape, Shape]:
        """Return the shapes (O, I) of the source's and the target's module of a pair."""
        return self.pair.source.modules[pair.source].shape, self.pair.target.modules[pair.target].shape

    def chunks(self) -> Iterator[tuple[Pair, ...]]:
        """Yield groups of pairs that are aligned together: of equal shapes and bounded size."""

        def key(pair: Pair) -> tuple[object, ...]:
            return *self.shapes(pair), LINEARS[pair.role].stream

        def size(pair: Pair) -> int:
            return sum(4 * rows * columns for rows, columns in self.shapes(pair))

        yield from map(tuple, bounded_groups(self.modules, key, size))


def no_weights(method: Method) -> MethodError:
    """Return the error for a method that needs the weights of a source that can only be queried."""
    msg = f"method {method.name} needs the weights of the source, which can only be queried: use --method distill, or "
    return MethodError(msg + "give the weights with --source")


@dataclass(frozen=True)
class Method(Settings):
    """Base class of all methods. A subclass is a frozen dataclass; its fields are its hyper-parameters.

    Command-line flags, the keys of recipes and batch plans, and cache keys are derived from the fields. So a field
    needs a default, a type that TOML can hold, and a docstring below it. A direct subclass fits an update to what the
    adapter does; a method that chooses maps from both bases inherits from `MapMethod`.

    Attributes:
        when: when to use it, for `jcrosslora methods`, such as "for a base and a model cut from it".
        requires: the evidence to collect. A property may derive it from the fields.
        carries: the kinds of change that it moves. Changes of the embedding and the output head (`Carried.TOKENS`) move
            if the maps keep or select the coordinates of the residual stream. Updates of experts move by a fit, or by
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
        """Return the name of the method in errors."""
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
        """Count the work of `move` after the maps, for each step on the display; None if unknown."""
        del plan
        return {FINISH: None}

    def memory(self, target: BaseModel, free: int | None) -> int | None:
        """Return the bytes that `move` needs, without the weights of both bases; None if unknown.

        `free` is the number of bytes that the weights leave free, None if unknown.
        """
        del target, free
        return None

    @property
    def map_method(self) -> MapMethod | None:
        """Return the map method that makes `plan.mapped`, or None if nothing is mapped; a map method returns itself."""
        return None

    @property
    def truncates(self) -> bool:
        """Return whether the maps depend on a truncation rank."""
        return hasattr(self, "svd_rank")

    @property
    def runs_bases(self) -> bool:
        """Return whether both bases have to run on text."""
        return bool(self.requires & RUNNING)

    @property
    def fits_update(self) -> bool:
        """Return whether the whole update is fitted, so that the fit decides its size."""
        return True

    @property
    def holds_bases(self) -> bool:
        """Return whether `move` runs both bases by `plan.loaded`, which divides their weights over devices."""
        return self.fits_update and self.runs_bases

    @property
    def reads_source(self) -> bool:
        """Return whether the weights of the source are needed; a source that can only be queried has none."""
        return self.map_method is not None or bool(self.requires - {EvidenceKind.COMPLETIONS})

    @property
    def uses_examples(self) -> bool:
        """Return whether the update is fitted to answers, which may include labelled examples."""
        return EvidenceKind.COMPLETIONS in self.requires

    @property
    def needs(self) -> str:
        """Return the evidence that the method uses, in words."""
        parts = ["equal shapes"] if self.map_method is not None and self.map_method.equal_shapes else []
        always = {EvidenceKind.RANDOM_KEY, EvidenceKind.CHANNEL_SCALES}  # kinds that every pair of bases has
        parts += [kind.value for kind in EvidenceKind if kind in self.requires - always]
        return ", ".join(parts) or "nothing"

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def cache_key(self) -> Any:
        """Return everything that the maps depend on as a JSON value, with the code of a user's method."""
        return self.name, type(self).__qualname__, self._code_digest(), self.settings()

    @classmethod
    def source_file(cls) -> Path | None:
        """Return the file that defines the method; None without a file, as in a notebook."""
        try:
            return Path(inspect.getfile(cls))
        except (TypeError, OSError):
            return None

    @classmethod
    def spec(cls) -> str:
        """Return the method's name for `--method` and recipes; for a user's method "module:Class"."""
        if cls.__module__.startswith("jcrosslora."):
            return cls.name
        # `__main__` cannot be imported by name, but the file of the script can.
        file = cls.source_file() if cls.__module__ == "__main__" else None
        return f"{cls.__module__ if file is None else file.stem}:{cls.__qualname__}"

    @classmethod
    def _code_digest(cls) -> str:
        """Digest the file of a user's method, or its main function if it has no file; "" for other methods."""
        file = cls.source_file()
        if file is None:
            decides = cls.maps if issubclass(cls, MapMethod) else cls.move
            return hashlib.sha256(marshal.dumps(decides.__code__)).hexdigest()
        return "" if _PACKAGE in file.parents else hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class MapMethod(Method):
    """Base class of methods that choose two maps for each pair of modules: dW_tgt = P_out dW_src P_in'.

    All map methods share the alignment (`maps` over all pairs of modules) and the shift (the adapter through the maps).

    Attributes:
        measure: the diagnostic of whether the two bases agree in what the method relies on; "none" without one.
        is_control: whether no effect is expected, by design. The norm of a control's update is restored after the maps.
        equal_shapes: whether it is defined only for modules of equal shape.
        equal_modules: whether it is defined only for bases with the same modules, by name and shape.
        single_vectors: whether single singular vectors matter, not only the subspace that they span.
        takes_numpy: whether `maps` takes numpy arrays too; then nothing is compiled for it on a CPU.
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
        """Align the modules, shift the adapter, and return the mapped update; a method may override this to add more.

        Raises:
            PairingError: no update of the adapter is moved.
            CheckpointError: weights cannot be read or are not finite.
        """
        moved = plan.mapped
        assert moved is not None  # a map method has maps
        begin(FINISH)
        return moved

    def cost(self, plan: Plan) -> dict[str, Cost | None]:
        """Count nothing, unless `move` is overridden."""
        return {} if type(self).move is MapMethod.move else super().cost(plan)

    @property
    def map_method(self) -> MapMethod:
        """Return the method itself."""
        return self

    @property
    def fits_update(self) -> bool:
        """Return False: the update is mapped."""
        return False
