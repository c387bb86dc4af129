"""The base class of transfer methods: a frozen dataclass of hyper-parameters with one function for the maths."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import marshal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jcrosslora.adapter import Adapter
from jcrosslora.evidence.records import FITTING, RUNNING, Evidence, EvidenceKind, Maps
from jcrosslora.methods.coordinates import zero_maps
from jcrosslora.methods.update import FinalizeContext, Update

Measure = Literal[
    "vector ratio", "subspace similarity", "weight cosine", "activation cosine", "head cosine", "part cosine", "none"
]
# The truncation rank of the Cross-LoRA paper, also used for methods whose papers state none.
DEFAULT_SVD_RANK = 320
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Method:
    """Base class of all methods. A subclass is a frozen dataclass; its fields are its hyper-parameters.

    The flags of the command line, the keys of recipes and batch plans, and the cache keys are derived from the fields:
    a field needs a default, a type that TOML can hold, and a docstring line beneath it.

    Attributes:
        name: as given to `--method`.
        summary: one line.
        reference: where it is published.
        requires: the evidence that has to be collected. A property may derive it from the fields.
        measure: the diagnostic that says whether the two bases agree in what the method relies on.
        equal_shapes: whether it is defined only for modules of equal shape.
        single_vectors: whether single singular vectors matter, or only the subspace that they span.
        preserves_residual_basis: whether the maps keep the coordinates of the residual stream, or select among them.
            Changes of the embedding and the output head then move as well.
        carries_experts: whether updates of experts move too where the target is a copy of the source or of its parts.
        keeps_norm: whether the norm of the update is restored after the maps, as a control needs.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset()
    measure: ClassVar[Measure] = "weight cosine"
    equal_shapes: ClassVar[bool] = False
    single_vectors: ClassVar[bool] = False
    preserves_residual_basis: ClassVar[bool] = False
    carries_experts: ClassVar[bool] = False
    keeps_norm: ClassVar[bool] = False

    def maps(self, evidence: Evidence) -> Maps:
        """Choose the maps of one pair of modules. Pure, traceable and unbatched; the default maps are zero."""
        return zero_maps(evidence)

    def finalize(self, context: FinalizeContext, moved: Adapter) -> Update:
        """Run the stages after the maps. The default returns the moved adapter."""
        del context
        return Update(moved)

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
        """Tell whether an update is fitted to the source's behaviour with the adapter."""
        return bool(self.requires & FITTING)

    @property
    def has_finalize(self) -> bool:
        """Tell whether a stage follows the maps."""
        return type(self).finalize is not Method.finalize

    @property
    def needs(self) -> str:
        """Return the evidence that the method uses, in words."""
        parts = ["equal shapes"] if self.equal_shapes else []
        parts += [kind.value for kind in EvidenceKind if kind in self.requires and kind != EvidenceKind.RANDOM_KEY]
        return ", ".join(parts) or "nothing"

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def cache_key(self) -> Any:
        """Return what the maps depend on, as a JSON value; for a user's method this includes its code."""
        return self.name, type(self).__qualname__, self._code_digest(), self.settings()

    @classmethod
    def source_file(cls) -> Path | None:
        """Return the file that defines the method; None where there is none, as in a notebook."""
        try:
            return Path(inspect.getfile(cls))
        except (TypeError, OSError):
            return None

    @classmethod
    def _code_digest(cls) -> str:
        file = cls.source_file()
        if file is None:
            return hashlib.sha256(marshal.dumps(cls.maps.__code__)).hexdigest()
        return "" if _PACKAGE in file.parents else hashlib.sha256(file.read_bytes()).hexdigest()
