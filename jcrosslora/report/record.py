"""The account of a transfer: what was done, what survived, what was left behind. Plain data, no arrays."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jcrosslora.adapter.ignored import describe_change
from jcrosslora.adapter.records import AdapterInfo
from jcrosslora.adapter.truncation import RankRule, Truncation
from jcrosslora.alignment.transport import AlignRecipe, BaseInfo
from jcrosslora.evaluate.effect import Effect


@dataclass(frozen=True)
class ModuleRow:
    """What became of the update of one target module; the fields from `rank` on are those of `Agreement`.

    Attributes:
        target: module of the target base.
        source: module of the source base whose update it received.
        role: q_proj and so on.
        energy: ||dW_src||_F^2.
        kept: ||P_out dW_src P_in'||_F^2 over `energy`: the share of the update's energy that the maps kept. Above 1
            where a map repeats rows (index-interp).
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


@dataclass(frozen=True)
class UnmappedSource:
    """A source module whose update goes nowhere, and the share of the whole update's ||.||_F^2 that it held."""

    source: str
    share: float


@dataclass(frozen=True)
class TokenRow:
    """What became of a change of the embedding or the output head.

    Attributes:
        modules: what it is of; both, where the source has one matrix for them.
        sort: what it was read from, a key of `jcrosslora.adapter.ignored.SORTS`.
        rows: how many tokens' rows it changes.
        moved: how many of these the target has.
        share: ||.||_F^2 of the change over that of the whole adapter.
        kept: share of the change's own ||.||_F^2 in what was moved.
    """

    modules: tuple[str, ...]
    sort: str
    rows: int
    moved: int
    share: float
    kept: float

    @property
    def sentence(self) -> str:
        """The figures in words, without a full stop."""
        what = describe_change(self.sort, self.modules, self.share)
        return f"{what}: {self.moved:,} of {self.rows:,} rows moved, which hold {self.kept:.1%} of it"


@dataclass(frozen=True, eq=False)
class TransferReport:
    """All that is known of a transfer.

    Attributes:
        recipe: the settings of the alignment.
        source: the base that the adapter came from.
        target: the base that it is now for.
        adapter: provenance of the adapter.
        calibration: "none" or "frobenius".
        scale: what every moved update was multiplied by.
        out_rank: the rank that updates were cut to, or the rule that chose it, or None.
        layers: for each target layer the source layer that feeds it, or None.
        rows: one for each moved module, in the target's order.
        unmapped_targets: target modules that no source module feeds.
        unmapped_sources: source modules whose update went nowhere.
        energy: ||.||_F^2 of the whole source update, moved or not.
        warnings: one sentence each.
        choice: why `--method auto` took this method; None where the user named it.
        effect: what the moved update changes on the target beside what the original changes on the source; None where
            it was not measured.
        fitted: what was fitted behind the maps, one sentence without a full stop; None where nothing was.
        added: what goes with the update that the maps do not make, one sentence without a full stop; None where
            nothing does.
        interpolation: the share of the source interpolation to the source's weights that goes with it; None where none was asked for.
        completions: how many prompts with answers were asked for, where predictions were fitted.
        cut: what cutting to `out_rank` left; None where nothing was asked for.
        tokens: changes of the embedding and the output head that were moved.
    """

    recipe: AlignRecipe
    source: BaseInfo
    target: BaseInfo
    adapter: AdapterInfo
    calibration: str
    scale: float
    out_rank: RankRule | None
    layers: tuple[int | None, ...]
    rows: tuple[ModuleRow, ...]
    unmapped_targets: tuple[str, ...]
    unmapped_sources: tuple[UnmappedSource, ...]
    energy: float
    warnings: tuple[str, ...]
    choice: str | None = None
    effect: Effect | None = None
    fitted: str | None = None
    added: str | None = None
    interpolation: float | None = None
    completions: int | None = None
    cut: Truncation | None = None
    tokens: tuple[TokenRow, ...] = ()

    @property
    def kept(self) -> float:
        """Share of the energy that the maps kept, of the updates that they were given."""
        return weighted(self.rows, "kept")

    @property
    def left_behind(self) -> float:
        """Share of the source update's energy in modules that feed nothing."""
        return sum(item.share for item in self.unmapped_sources)

    def by_role(self) -> Iterator[tuple[str, tuple[ModuleRow, ...]]]:
        """The rows of each role, in the order in which roles first appear."""
        for role in dict.fromkeys(row.role for row in self.rows):
            yield role, tuple(row for row in self.rows if row.role == role)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; figures that are not defined become null."""
        data = dataclasses.asdict(dataclasses.replace(self, adapter=_plain(self.adapter)))
        for side in ("source", "target"):
            for layout in ("shapes", "fused", "heads"):
                data[side].pop(layout)
        data["adapter"].pop("config")
        data["version"] = importlib.metadata.version("jcrosslora")
        data["effect"] = None if self.effect is None else self.effect.to_json()
        data["totals"] = {"kept": self.kept, "left_behind": self.left_behind}
        return _without_nan(data)


def _plain(info: AdapterInfo) -> AdapterInfo:
    return dataclasses.replace(info, config={})


def weighted(rows: tuple[ModuleRow, ...], field: str) -> float:
    """Mean of a field over rows, weighted by the energy of their updates; NaN where no row has the figure."""
    pairs = [(getattr(row, field), row.energy) for row in rows if not math.isnan(getattr(row, field))]
    total = sum(weight for _, weight in pairs)
    if not pairs:
        return math.nan
    if total == 0:
        return sum(value for value, _ in pairs) / len(pairs)
    return sum(value * weight for value, weight in pairs) / total


def _without_nan(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
