"""A moved adapter, with figures of what the maps kept of it."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.records import describe_change
from jcrosslora.maps.transport import Agreement

Calibration = Literal["none", "frobenius"]
# What is read from a report is bounded: a damaged number must not become a picture that cannot be drawn.
Size = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Role = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.]{1,40}$")]


def defined(value: float) -> float | None:
    """Return a figure as rows and reports have it: None in place of NaN."""
    return None if math.isnan(value) else value


class ModuleRow(Agreement, frozen=True):
    """The update of one target module, with the agreement of the pair. None where a figure is not defined.

    Attributes:
        source: module of the source base whose update it received; "" if it was fitted and received none.
        energy: ||dW_src||_F^2.
        kept: ||P_out dW_src P_in'||_F^2 over `energy`: the share of the update's energy that the maps keep. Above 1
            if a map repeats rows.
        norm_before: ||dW_src||_F; `norm_after` is ||dW_tgt||_F as written, after re-ranking and calibration.
    """

    target: str
    source: str
    role: Role
    energy: Size | None
    kept: float | None = None
    norm_before: Size | None = None
    norm_after: Size | None = 0.0

    @classmethod
    def unmapped(cls, target: str, role: str, source: str = "", energy: float = 0.0) -> "ModuleRow":
        """Account for a module that no map leads to; `source` lies at its depth, and is "" where none does."""
        return cls(target, source, role, energy, norm_before=math.sqrt(energy) if source else None)


@dataclass(frozen=True)
class UnmappedSource:
    """A source module whose update is not moved, and its share of the whole update's ||.||_F^2."""

    source: str
    share: Size


@dataclass(frozen=True)
class TokenRow:
    """A change of the embedding or the output head of the target, which the maps carried or the method made.

    Attributes:
        modules: the changed modules; both, if the source ties them.
        kind: the form it was read from, a key of `jcrosslora.adapter.records.CHANGES`.
        rows: the number of rows (tokens) that it changes; the target has `moved` of them.
        share: ||.||_F^2 of the change over that of the whole adapter; None if the method made it, as for `kept`.
        kept: the share of the change's own ||.||_F^2 in the moved rows.
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
class Shifted:
    """An adapter after the maps, with figures of what they kept.

    Attributes:
        adapter: of the target, float32; without modules if the method has no maps.
        original: the adapter before, with fused matrices split.
        rows: one for each moved module, in the target's order.
        energy: ||.||_F^2 of the whole update before.
        scale: what every moved update was multiplied by.
        notes: what the user has to know, one sentence each.
    """

    adapter: Adapter
    original: Adapter
    rows: tuple[ModuleRow, ...]
    tokens: tuple[TokenRow, ...]
    unmapped: tuple[UnmappedSource, ...]
    energy: float
    calibration: Calibration
    scale: float
    notes: tuple[str, ...]
