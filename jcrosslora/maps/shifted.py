"""A moved adapter, with the account of what the maps made of it."""

import dataclasses
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
        target: module of the target base.
        source: module of the source base whose update it received; "" where it was fitted and received none.
        energy: ||dW_src||_F^2.
        kept: ||P_out dW_src P_in'||_F^2 over `energy`: the share of the update's energy that the maps keep. Above 1
            if a map repeats rows (index-interp).
        norm_before: ||dW_src||_F.
        norm_after: ||dW_tgt||_F as written, after re-ranking and calibration.
    """

    target: str
    source: str
    role: str
    energy: float
    kept: float
    norm_before: float
    norm_after: float
    rank: int
    energy_src: float
    energy_tgt: float
    gap_src: float
    gap_tgt: float
    condition_src: float
    condition_tgt: float
    error_src: float
    error_tgt: float
    similarity_out: float
    similarity_in: float
    vector_ratio: float
    activation_cosine: float
    weight_cosine: float

    @classmethod
    def unmapped(cls, target: str, role: str, source: str = "", energy: float = 0.0) -> "ModuleRow":
        """Account for a module that no map leads to: of the source's update only the energy is known, if that.

        `source` is the module of the source base that lies at its depth, "" without one, and `energy` its
        ||dW_src||_F^2.
        """
        figures = {field.name: math.nan for field in dataclasses.fields(cls) if field.type is float}
        figures |= {"energy": energy, "norm_after": 0.0}
        figures |= {"norm_before": math.sqrt(energy)} if source else {}
        return cls(target=target, source=source, role=role, rank=0, **figures)


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
        rows: the number of rows (tokens) that it changes.
        moved: the number of these rows that the target has.
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
    """An adapter behind the maps, with the account of what they made of it.

    Attributes:
        adapter: of the target, float32; without modules where the method has no maps.
        original: the adapter before, with fused matrices split.
        rows: one for each moved module, in the target's order.
        tokens: changes of the embedding and the output head that were moved.
        unmapped: source modules whose update is not moved.
        energy: ||.||_F^2 of the whole update before.
        calibration: "none" or "frobenius".
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
