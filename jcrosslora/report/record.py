"""The report of a transfer: one record without arrays, whose JSON is `transfer_report.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from jcrosslora.adapter.folder import REPORT as REPORT
from jcrosslora.adapter.records import AdapterOrigin
from jcrosslora.adapter.truncation import RankRule, Truncation
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.distill.facts import FitFacts
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Effect
from jcrosslora.maps.moved import ModuleRow, Size, TokenRow, UnmappedSource
from jcrosslora.maps.transport import AlignRecipe
from jcrosslora.utils.files import read_small
from jcrosslora.utils.texts import html_table

# The version of the JSON form, raised when a field changes its name or meaning.
SCHEMA = 4
AGAIN = "move the adapter again, or run the version of jcrosslora that wrote it"
_LONGEST = 300  # characters of an example

# Bounded like `Size`, so that a damaged report is refused.
Layer = Annotated[int, msgspec.Meta(ge=0, le=999)]
Number = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
T = TypeVar("T")
_OfFits = Literal["works", "partly", "unusable"]
_OfMaps = Literal["aligned", "weak", "chance", "lost", "control"]
Level = _OfFits | _OfMaps | Literal["unknown", "ineffective", "destructive"]
# Levels that expect no effect, or harm. A control is not among them: it is meant to have no effect.
USELESS: frozenset[Level] = frozenset({"unusable", "chance", "lost", "ineffective", "destructive"})


class Verdict(msgspec.Struct, frozen=True):
    """What to expect of a moved adapter.

    Attributes:
        level: for a fit, "works", "partly" or "unusable", by the share of the source's answers that it reproduces. For
            maps, "aligned" (expect an effect), "weak", "chance" (expect no effect), "lost" (the maps removed nearly all
            of the update) or "control" (no effect is intended). For both, "unknown" (too little was measured), and
            "ineffective" or "destructive" by the measured effect on text.
    """

    level: Level
    text: str


class Base(msgspec.Struct, frozen=True):
    """A base model; `BaseInfo` explains the fields."""

    name: str | None = None
    ref: str | None = None
    revision: str | None = None
    digest: str | None = None
    family: str = ""
    has_experts: bool = False


class Totals(msgspec.Struct, frozen=True):
    """The shares of the whole update's energy that the maps kept, and that unmapped modules left behind."""

    kept: float | None = None
    left_behind: float | None = None


class TransferReport(msgspec.Struct, frozen=True, kw_only=True):
    """The full account of a transfer. An undefined figure is None, and null in JSON.

    Attributes:
        recipe_toml: what `jcrosslora transfer --recipe` reads; hyper-parameters only if they differ from the defaults.
        scale: factor of every moved update.
        layers: the source layer that feeds each target layer, or None.
        rows: one for each moved module, in the target's order.
        unmapped_targets: target modules that no source module feeds.
        energy: ||.||_F^2 of the whole source update, moved or not.
        out_rank: the rank that updates were truncated to, or the rule that chose it; None without truncation.
        choice: why `auto` took this method; None if the user named it.
        effect: what the original changes on the source, and the moved update on the target; None if not measured.
        fit: the facts of a fit; None if nothing was fitted.
        curve: points of the fit: completions used, and the divergence from the teacher on held-out ones in nats.
        added: what was added to the moved update, one sentence without a full stop; None if nothing was.
        wrote_prompts: whether the source wrote the prompts of the fit.
        examples: some completions of the fit, if the source wrote their prompts; the user's prompts are not shown.
        truncation: what the truncation to `out_rank` kept; None without one.
        rank_before: the highest rank of the source adapter; None if unknown.
        ranks: the rank of each module of the moved adapter.
        tokens: changes of the embedding and the output head that were moved.
        asked: the settings for querying the source, if its weights were not read.
    """

    verdict: Verdict = Verdict("unknown", "")
    recipe_toml: str = ""
    schema: int = SCHEMA
    version: str
    recipe: AlignRecipe
    source: Base
    target: Base
    adapter: AdapterOrigin
    calibration: str = "none"  # or "frobenius"
    scale: float = 1.0
    layers: tuple[Layer | None, ...]
    rows: tuple[ModuleRow, ...]
    unmapped_targets: tuple[str, ...]
    unmapped_sources: tuple[UnmappedSource, ...]
    energy: Size | None
    warnings: tuple[str, ...]
    out_rank: RankRule | None = None
    choice: str | None = None
    effect: Effect | None = None
    fit: FitFacts | None = None
    curve: tuple[tuple[int, Number | None], ...] = ()
    added: str | None = None
    wrote_prompts: bool = False
    examples: tuple[str, ...] = ()
    truncation: Truncation | None = None
    rank_before: int | None = None
    ranks: dict[str, int] = {}
    tokens: tuple[TokenRow, ...] = ()
    asked: dict[str, Any] = {}
    totals: Totals = Totals()

    @property
    def kept(self) -> float:
        """Return the share of the energy of the moved updates that the maps kept; NaN if undefined."""
        return weighted(self.rows, "kept")

    @property
    def left_behind(self) -> float:
        """Return the share of the source update's energy in unmapped modules."""
        return sum(item.share for item in self.unmapped_sources)

    @property
    def mapped(self) -> bool:
        """Return whether maps moved the update; a fit alone has no layer map and no diagnostics."""
        return any(row.kept is not None for row in self.rows)

    @property
    def figures(self) -> dict[str, float]:
        """Return figures for a log: the totals, and the divergence that each adapter causes (NaN if undefined)."""
        ends = {} if self.effect is None else {"effect_source": self.effect.source, "effect_target": self.effect.target}
        kl = {name: math.nan if one.kl is None else one.kl for name, one in ends.items()}
        return {"kept": self.kept, "left_behind": self.left_behind} | kl

    @property
    def rank_sentence(self) -> str:
        """Return the ranks before and after in a sentence without a full stop."""
        by_rank: dict[int, list[str]] = {}
        for name, rank in self.ranks.items():
            roles = by_rank.setdefault(rank, [])
            roles += [role] if (role := name.rpartition(".")[2]) not in roles else []
        parts = [f"{rank} in {', '.join(roles)}" for rank, roles in sorted(by_rank.items(), reverse=True)]
        sentence = f"the moved update has rank {'; '.join(parts)}"
        return sentence + ("" if self.rank_before is None else f", where the adapter had {self.rank_before}")

    def __repr__(self) -> str:
        """Return one line: method, bases, and the verdict."""
        source, target = self._names
        return f"TransferReport({self.recipe.method}, {source} -> {target}: {self.verdict.text})"

    @property
    def reproduced(self) -> str:
        """Return how many of the source's held-out answers a fitted update reproduces; "" if not measured."""
        fit = self.fit
        return "" if fit is None or not fit.held_out else f"{fit.agreed:,} of {fit.held_out:,} answers"

    def _repr_html_(self) -> str:
        """Return the verdict and the main figures as a table."""
        curve = [found for _, found in self.curve if found is not None]
        shown = {
            "verdict": f"{self.verdict.level}: {self.verdict.text}",
            "method": self.recipe.method,
            "modules": f"{len(self.ranks):,} of rank {' to '.join(map(str, self.rank_range))}" if self.ranks else "0",
            "kept by the maps": f"{self.kept:.1%}" if self.mapped else "",
            "left behind": f"{self.left_behind:.1%}" if self.left_behind else "",
            "reproduced of the source's": self.reproduced,
            "divergence, before and after the fit": f"{curve[0]:.3g} to {min(curve):.3g} nats" if curve else "",
            "effect on text": self.effect.sentence if self.effect is not None else "",
        }
        ends = " to ".join(self._names)
        return html_table([{"": title, ends: text} for title, text in shown.items() if text])

    @property
    def _names(self) -> tuple[str, str]:
        source, target = (public_name(base.name) or "another model" for base in (self.source, self.target))
        return source, target

    @property
    def rank_range(self) -> tuple[int, ...]:
        """Return the lowest and the highest rank of the moved adapter; one number if equal, () without ranks."""
        ranks = self.ranks.values()
        return tuple(dict.fromkeys((min(ranks), max(ranks)))) if ranks else ()

    def by_role(self) -> Iterator[tuple[str, tuple[ModuleRow, ...]]]:
        """Yield the rows of each role, in the order in which roles first appear."""
        for role in dict.fromkeys(row.role for row in self.rows):
            yield role, tuple(row for row in self.rows if row.role == role)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data as docs/report.md describes it."""
        return msgspec.json.decode(msgspec.json.encode(self, enc_hook=float))  # numpy numbers become floats


def read_report(path: Path) -> TransferReport:
    """Read a `transfer_report.json`.

    Raises UsageError if the file cannot be read, is damaged, or has another schema.
    """
    content = read_bytes(path)
    try:
        found = msgspec.json.decode(content)
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema == SCHEMA:
            return msgspec.convert(found, TransferReport)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is damaged ({error}): {AGAIN}") from error
    raise UsageError(f"{path}: has schema {ascii(schema)[:20]}, expected {SCHEMA}: {AGAIN}")


def read_bytes(path: Path) -> bytes:
    """Read a file that a report is made from, or raise UsageError."""
    try:
        return read_small(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): give a folder or file that can be") from error


def copy_fields(kind: type[T], given: Any) -> T:
    """Make a part of the report from an object that has the same fields."""
    return kind(**{name: getattr(given, name) for name in kind.__annotations__})


def weighted(rows: Sequence[ModuleRow], field: str) -> float:
    """Return the energy-weighted mean of a field over the rows that have it; NaN if there are none.

    The mean is not weighted if all energies are 0, and NaN if one is unknown.
    """
    found = [row for row in rows if getattr(row, field) is not None]
    values = [getattr(row, field) for row in found]
    weights = [math.nan if row.energy is None else row.energy for row in found]
    if not values:
        return math.nan
    if (total := sum(weights)) == 0:
        return sum(values) / len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total


def shorten(text: str, most: int = _LONGEST) -> str:
    """Cut a text to a number of characters, and end it with " ..." if something was cut off."""
    return text if len(text) <= most else f"{text[:most]} ..."
