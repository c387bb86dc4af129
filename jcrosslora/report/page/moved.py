"""What the page takes from `transfer_report.json`, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from jcrosslora.errors import UsageError
from jcrosslora.report.record import SCHEMA

# A damaged number must not become a picture of a billion layers, or one that cannot be drawn.
_LAYER = re.compile(r"model\.layers\.(\d{1,3})\.")
_Layer = Annotated[int, msgspec.Meta(ge=0, le=999)]
_Size = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_Number = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
_Role = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.]{1,40}$")]
_AGAIN = "move the adapter again, or run the version of jcrosslora that wrote it"


class Verdict(msgspec.Struct, frozen=True):
    """What the transfer expects, see `jcrosslora.report.verdict`."""

    level: str
    text: str


class Recipe(msgspec.Struct, frozen=True):
    """The method, and the text that the bases were run on."""

    method: str
    probes: str


class Base(msgspec.Struct, frozen=True):
    """A base model; `name` is None where it is not known."""

    name: str | None
    revision: str | None
    digest: str | None


class Row(msgspec.Struct, frozen=True):
    """The update of one module; norms and energy as in `maps.shifting.records.ModuleRow`, None if not known."""

    target: str
    source: str
    role: _Role
    energy: _Size | None
    norm_before: _Size | None
    norm_after: _Size | None


class Unmapped(msgspec.Struct, frozen=True):
    """A source module whose update went nowhere, and its share of the whole update's energy."""

    source: str
    share: _Size


class Moved(msgspec.Struct, frozen=True):
    """A moved adapter; the fields are those of `TransferReport`."""

    version: str
    verdict: Verdict
    recipe_toml: str
    recipe: Recipe
    source: Base
    target: Base
    adapter: Base
    layers: list[_Layer | None]
    rows: list[Row]
    unmapped_targets: list[str]
    unmapped_sources: list[Unmapped]
    energy: _Size | None
    warnings: list[str]
    choice: str | None
    fitted: str | None
    added: str | None
    curve: list[tuple[int, _Number | None]]
    wrote_prompts: bool
    examples: list[str]
    effect: dict[str, Any] | None
    ranks: dict[str, int]

    def norms(self) -> dict[str, dict[int, float]]:
        """Role to target layer to the norm of the moved update; over several modules of a role, such as experts."""
        squares: dict[str, dict[int, float]] = {}
        for row in self.rows:
            of_role = squares.setdefault(row.role, {})
            layer = layer_of(row.target)
            of_role[layer] = of_role.get(layer, 0.0) + (row.norm_after or 0.0) ** 2
        return {role: {layer: math.sqrt(value) for layer, value in sorted(of.items())} for role, of in squares.items()}

    def target_shares(self) -> dict[int, float]:
        """Target layer to its share of the moved update's squared norm."""
        return _shares((layer_of(row.target), (row.norm_after or 0.0) ** 2) for row in self.rows)

    def source_shares(self) -> dict[int, float]:
        """Source layer to its share of the original update's squared norm; empty where that is not known."""
        if not self.energy:
            return {}
        # A source module may feed several of the target.
        found = {row.source: row.energy / self.energy for row in self.rows if row.source and row.energy is not None}
        found |= {one.source: one.share for one in self.unmapped_sources}
        shares: dict[int, float] = {}
        for name, share in found.items():
            shares[layer_of(name)] = shares.get(layer_of(name), 0.0) + share
        return shares

    def left_behind(self) -> dict[int, float]:
        """Source layer to the share of the original update that it held and that was not moved."""
        shares: dict[int, float] = {}
        for one in self.unmapped_sources:
            shares[layer_of(one.source)] = shares.get(layer_of(one.source), 0.0) + one.share
        return shares


def parse_moved(content: bytes, place: str) -> Moved:
    """Read the content of a `transfer_report.json`.

    Args:
        content: of the file.
        place: names the file in errors.

    Raises:
        UsageError: it is damaged, or of another schema.
    """
    try:
        found = msgspec.json.decode(content)
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            msg = f"{place}: has schema {ascii(schema)[:20]}, wanted {SCHEMA}: {_AGAIN}"
            raise UsageError(msg)
        moved = msgspec.convert(found, Moved)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"{place}: is damaged ({error}): {_AGAIN}"
        raise UsageError(msg) from error
    names = [row.target for row in moved.rows] + [row.source for row in moved.rows if row.source]
    for name in (*names, *(one.source for one in moved.unmapped_sources)):
        if _LAYER.match(name) is None:
            msg = f"{place}: is damaged (module {ascii(name)[:60]}, wanted model.layers.N and so on): {_AGAIN}"
            raise UsageError(msg)
    return moved


def layer_of(name: str) -> int:
    """Return the number of the layer in a module's name."""
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1])


def _shares(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    sums: dict[int, float] = {}
    for layer, value in pairs:
        sums[layer] = sums.get(layer, 0.0) + value
    total = sum(sums.values())
    return {layer: value / total for layer, value in sums.items()} if total > 0 else {}
