"""A moved adapter, with an account of what the maps did to it."""

import math
from dataclasses import dataclass
from typing import Literal

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.records import describe_change

Calibration = Literal["none", "frobenius"]


@dataclass(frozen=True)
class ModuleRow:
    """The update of one target module; the fields from `rank` on are those of `Agreement`.

    Attributes:
        source: module of the source base whose update it received; "" if it was fitted and received none.
        energy: ||dW_src||_F^2.
        kept: ||P_out dW_src P_in'||_F^2 over `energy`: the share of the update's energy that the maps keep. Above 1
            if a map repeats rows (index-interp).
        norm_before: ||dW_src||_F; `norm_after` is ||dW_tgt||_F as written, after re-ranking and calibration.
    """

    target: str
    source: str
    role: str
    energy: float
    kept: float = math.nan
    norm_before: float = math.nan
    norm_after: float = 0.0
    rank: int = 0
    energy_src: float = math.nan
    energy_tgt: float = math.nan
    gap_src: float = math.nan
    gap_tgt: float = math.nan
    condition_src: float = math.nan
    condition_tgt: float = math.nan
    error_src: float = math.nan
    error_tgt: float = math.nan
    similarity_out: float = math.nan
    similarity_in: float = math.nan
    vector_ratio: float = math.nan
    activation_cosine: float = math.nan
    weight_cosine: float = math.nan

    @classmethod
    def unmapped(cls, target: str, role: str, source: str = "", energy: float = 0.0) -> "ModuleRow":
        """Account for a module that no map leads to; `source` lies at its depth, and is "" where none does."""
        return cls(target, source, role, energy, norm_before=math.sqrt(energy) if source else math.nan)


@dataclass(frozen=True)
class UnmappedSource:
    """A source module whose update is not moved, and its share of the whole update's ||.||_F^2."""

    source: str
    share: float


@dataclass(frozen=True)
class TokenRow:
    """A moved change of the embedding or the output head.

    Attributes:
        modules: the changed modules; both, if the source ties them.
        kind: the form it was read from, a key of `jcrosslora.adapter.ignored.CHANGES`.
        rows: the number of rows (tokens) that it changes; the target has `moved` of them.
        share: ||.||_F^2 of the change over that of the whole adapter.
        kept: the share of the change's own ||.||_F^2 in the moved rows.
    """

    modules: tuple[str, ...]
    kind: str
    rows: int
    moved: int
    share: float
    kept: float

    @property
    def sentence(self) -> str:
        """Return the figures in words, without a full stop."""
        what = describe_change(self.kind, self.modules, self.share)
        return f"{what}: {self.moved:,} of {self.rows:,} rows moved, which hold {self.kept:.1%} of it"


@dataclass(frozen=True, eq=False)
class Shifted:
    """An adapter after the maps, with an account of what they did to it.

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
