"""A moved adapter, with an account of what the maps kept of each module and of changes of embedding and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.records import describe_change
from jcrosslora.text import Completion

if TYPE_CHECKING:
    from jcrosslora.distill.facts import FitFacts

Calibration = Literal["none", "frobenius"]
# Bounds on figures in reports, so that a damaged report is refused and not shown.
Size = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_LAYER = r"^model\.layers\.\d{1,3}\."
Module = Annotated[str, msgspec.Meta(pattern=_LAYER)]
Role = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.]{1,40}$")]


def none_if_nan(value: float) -> float | None:
    """Return a figure as rows and reports have it: None instead of NaN."""
    return None if math.isnan(value) else value


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Diagnostics of one pair of modules; None if a figure is undefined or not required.

    An alignment computes them as scalar arrays with these names, and NaN for None.

    Attributes:
        rank: R, the truncation rank of this pair.
        energy_src: share of ||W_src||_F^2 in its top R singular pairs. The figures ending in `_tgt` are for the target.
        gap_src: (s_R - s_{R+1}) / s_R; a small gap makes the subspace arbitrary. `condition_src` is s_1 / s_R.
        error_src: estimated error (radians) of the singular vectors or subspaces that the method uses.
        similarity_out: ||U_s' U_t||_F^2 / R over its expectation for random subspaces of the same size, R / O; 1
            is chance. Defined for equal O and proper subspaces. For unequal O on the residual stream's side it is
            measured through the shared vocabulary, see `jcrosslora.maps.groups`. `similarity_in` is the same for the
            right singular vectors and I.
        weight_cosine: cosine of W_src with W_tgt; for a method with this measure, of the mapped W_src with W_tgt.
            `Maps` explains `vector_ratio`, `activation_cosine` and `part_cosine`.
    """

    rank: int = 0
    energy_src: float | None = None
    energy_tgt: float | None = None
    gap_src: float | None = None
    gap_tgt: float | None = None
    condition_src: float | None = None
    condition_tgt: float | None = None
    error_src: float | None = None
    error_tgt: float | None = None
    similarity_out: float | None = None
    similarity_in: float | None = None
    vector_ratio: float | None = None
    activation_cosine: float | None = None
    weight_cosine: float | None = None
    part_cosine: float | None = None


class ModuleRow(Agreement, frozen=True):
    """The update of one target module, with the agreement of the pair. An undefined figure is None.

    Attributes:
        source: module of the source base whose update it received; "" if a fit alone made its update.
        energy: ||dW_src||_F^2.
        kept: ||P_out dW_src P_in'||_F^2 over `energy`: the share of the update's energy that the maps keep; above 1 if
            a map repeats rows.
        norm_before: ||dW_src||_F; `norm_after` is ||dW_tgt||_F as written, after re-ranking and calibration.
    """

    target: Module
    source: Annotated[str, msgspec.Meta(pattern=rf"{_LAYER}|^$")]
    role: Role
    energy: Size | None
    kept: float | None = None
    norm_before: Size | None = None
    norm_after: Size | None = 0.0

    @classmethod
    def fitted(cls, target: str, role: str) -> ModuleRow:
        """Return the row of a module that a fit updates and that no map feeds."""
        return cls(target, "", role, 0.0)


@dataclass(frozen=True)
class UnmappedSource:
    """A source module whose update is not moved, and its share of the whole update's ||.||_F^2."""

    source: Module
    share: Size


@dataclass(frozen=True)
class TokenRow:
    """A change of the target's embedding or output head, which was moved or which the method made.

    Attributes:
        modules: the changed modules; both, if the source ties them.
        kind: the form it was read from, a key of `jcrosslora.adapter.records.CHANGES`.
        rows: the number of rows (tokens) that it changes; `moved` of them are moved.
        share: share of ||.||_F^2 of the whole adapter that is in the change; None if the method made it.
        kept: share of ||.||_F^2 of the change that is in the moved rows; None if the method made it.
    """

    modules: tuple[str, ...]
    kind: str
    rows: int
    moved: int
    share: float | None = None
    kept: float | None = None

    @property
    def sentence(self) -> str:
        """Return the figures in words, without a full stop."""
        what = describe_change(self.kind, self.modules, self.share)
        if self.kept is None:
            return f"{what}: {self.moved:,} rows, made by the method"
        return f"{what}: {self.moved:,} of {self.rows:,} rows moved, which hold {self.kept:.1%} of it"


@dataclass(frozen=True, eq=False)
class Moved:
    """An update of the target, with an account of how it was made.

    A method that changes a mapped update returns `dataclasses.replace(plan.mapped, adapter=...)`, which keeps the
    account of the maps.

    Attributes:
        adapter: the update, written as it is. The transfer fills in its `info`.
        rows: an account of each module that the maps moved.
        tokens: an account of each change of the embedding and the output head.
        unmapped: the source modules that feed no target module.
        kernels: the kernels that decomposed the matrices of both bases.
        fit: the facts of a fit, `FitFacts()` if none are known; None without a fit. A fitted update uses the whole
            source adapter, so no source module counts as unmapped.
        added: description of what was added to the mapped update, one sentence without a full stop; None if nothing
            was.
        curve: points of the fit: completions used, and the divergence from the teacher on held-out ones in nats.
        completions: the completions that the source wrote for the fit.
        wrote_prompts: whether the source wrote their prompts too.
        chat_template: Jinja source of the template for conversations in the fit; None if there were none.
        warnings: one sentence each.
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
