"""The report of a transfer: settings, diagnostics of every module, and warnings. Plain data, no arrays."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jcrosslora.adapter.records import AdapterInfo
from jcrosslora.adapter.truncation import RankRule, Truncation
from jcrosslora.checkpoint.base_info import BaseInfo
from jcrosslora.evaluate.effect import Effect
from jcrosslora.maps.alignment.transport import AlignRecipe
from jcrosslora.maps.shifting.records import ModuleRow, TokenRow, UnmappedSource
from jcrosslora.methods import Method
from jcrosslora.utils import version

# The version of the JSON form. It is raised when a field changes its name or its meaning.
SCHEMA = 2
_LONGEST = 300  # characters of an example


@dataclass(frozen=True, eq=False)
class TransferReport:
    """The full account of a transfer.

    Attributes:
        method: the method that was used.
        recipe: the settings of the alignment.
        source: the base that the adapter came from.
        target: the base that it is now for.
        adapter: provenance of the adapter.
        calibration: "none" or "frobenius".
        scale: factor of every moved update.
        layers: for each target layer the source layer that feeds it, or None.
        rows: one for each moved module, in the target's order.
        unmapped_targets: target modules that no source module feeds.
        unmapped_sources: source modules whose update was not moved.
        energy: ||.||_F^2 of the whole source update, moved or not.
        warnings: one sentence each.
        out_rank: the rank that updates were truncated to, or the rule that chose it, or None.
        choice: why `auto` took this method; None where the user named it.
        effect: what the moved update changes on the target beside what the original changes on the source; None where
            it was not measured.
        fitted: what was fitted behind the maps, one sentence without a full stop; None where nothing was.
        curve: of a fit, completions used and the divergence from the teacher on held-out ones in nats, as it went.
        added: what was added to the moved update, one sentence without a full stop; None where nothing was.
        wrote_prompts: whether the fit was made on prompts that the source wrote, for want of any from the user.
        examples: some of the completions of the fit, if the source wrote their prompts itself; a user sees in them
            whether the adapter was understood. The user's own prompts are not shown.
        truncation: what the truncation to `out_rank` left; None where none was asked for.
        rank_before: the highest rank of the source adapter; None where it is not known.
        ranks: the rank of each module of the moved adapter.
        tokens: changes of the embedding and the output head that were moved.
        asked: settings by which the source was asked, where its weights were not read.
    """

    method: Method
    recipe: AlignRecipe
    source: BaseInfo
    target: BaseInfo
    adapter: AdapterInfo
    calibration: str
    scale: float
    layers: tuple[int | None, ...]
    rows: tuple[ModuleRow, ...]
    unmapped_targets: tuple[str, ...]
    unmapped_sources: tuple[UnmappedSource, ...]
    energy: float
    warnings: tuple[str, ...]
    out_rank: RankRule | None = None
    choice: str | None = None
    effect: Effect | None = None
    fitted: str | None = None
    curve: tuple[tuple[int, float], ...] = ()
    added: str | None = None
    wrote_prompts: bool = False
    examples: tuple[str, ...] = ()
    truncation: Truncation | None = None
    rank_before: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    tokens: tuple[TokenRow, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Return the share of the energy of the moved updates that the maps kept."""
        return weighted(self.rows, "kept")

    @property
    def left_behind(self) -> float:
        """Return the share of the source update's energy in unmapped modules."""
        return sum(item.share for item in self.unmapped_sources)

    @property
    def rank_sentence(self) -> str:
        """What the ranks became, in a sentence without a full stop."""
        by_rank: dict[int, list[str]] = {}
        for name, rank in self.ranks.items():
            roles = by_rank.setdefault(rank, [])
            roles += [role] if (role := name.rpartition(".")[2]) not in roles else []
        parts = [f"{rank} in {', '.join(roles)}" for rank, roles in sorted(by_rank.items(), reverse=True)]
        sentence = f"the moved update has rank {'; '.join(parts)}"
        sentence += "" if self.rank_before is None else f", where the adapter had {self.rank_before}"
        updated = {role for roles in by_rank.values() for role in roles}
        left = [role for role, _ in self.by_role() if role not in updated]
        if self.fitted and left:
            sentence += f"; the fit is of these modules alone, so {', '.join(left)} have no update"
        return sentence

    @property
    def totals(self) -> dict[str, float]:
        """Return the shares of the whole update's energy that were kept and left behind; NaN if undefined."""
        return {"kept": self.kept, "left_behind": self.left_behind}

    @property
    def figures(self) -> dict[str, float]:
        """Return what a log shows of a transfer: the totals, and the divergences that the adapters bring about."""
        effect = self.effect
        kl = {} if effect is None else {"effect_source": effect.source.kl, "effect_target": effect.target.kl}
        return self.totals | kl

    def by_role(self) -> Iterator[tuple[str, tuple[ModuleRow, ...]]]:
        """Yield the rows of each role, in the order in which roles first appear."""
        for role in dict.fromkeys(row.role for row in self.rows):
            yield role, tuple(row for row in self.rows if row.role == role)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data as docs/report.md describes it; figures that are not defined become null."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "method"}
        data = {name: _plain(value) for name, value in fields.items()}
        for side in ("source", "target"):
            for layout in ("shapes", "fused", "heads", "prefix"):
                data[side].pop(layout)
        for name in ("config", "chat_template", "prefix"):
            data["adapter"].pop(name)
        data["effect"] = None if self.effect is None else self.effect.to_json()
        data["totals"] = self.totals
        return _without_nan({"schema": SCHEMA, "version": version(), **data})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def spread(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """Take at most `count` texts, evenly spread, each cut to 300 characters."""
    places = sorted({round(place * (len(texts) - 1) / max(count - 1, 1)) for place in range(count)}) if texts else []
    return tuple(cut(texts[at]) for at in places)


def cut(text: str, most: int = _LONGEST) -> str:
    """Cut a text to so many characters, and say so."""
    return text if len(text) <= most else f"{text[:most]} ..."


def weighted(rows: tuple[ModuleRow, ...], field: str) -> float:
    """Return the mean of a field over rows, weighted by energy; NaN where no row has the figure."""
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
