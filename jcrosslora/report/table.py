"""Judge a moved adapter in one sentence, and show the diagnostics of a transfer in a terminal."""

import math
import re
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from jcrosslora.evaluate import Effect
from jcrosslora.maps.moved import ModuleRow
from jcrosslora.methods import MapMethod, Method
from jcrosslora.relation import DEPTH_MAPS
from jcrosslora.report.fit import fit_sentences, fit_verdict
from jcrosslora.report.record import Level, TransferReport, Verdict, shorten, weighted
from jcrosslora.utils.terminal import say

TableKind = Literal["role", "full", "module"]
# Figures of the decompositions, left out of short tables: they describe how a map was made, not how well it fits.
_DETAILS = ("energy src/tgt", "gap src/tgt", "cond src/tgt")
# Below the first limit there is no effect, below the second a weak one. Ratios are to chance: independently trained
# models have 1.0 to 1.3, related ones tens or hundreds. Cosines compare the weights: unrelated models have less than
# 0.02, a base and its further-trained version more than 0.9.
_RATIOS, _COSINES = (1.5, 5.0), (0.1, 0.5)
_SAME_COSINE = 0.98
_LOST = 0.005  # an update that keeps less than this share of its energy has no visible effect in any direction
_NOTHING = "expect no effect; for other ways see `jcrosslora methods`"
_LITTLE = "expect little effect; measure before use"
_MEASURE = "measure the effect with `jcrosslora evaluate`"
_SOME = "it will probably work; measure it"


def diagnostics_title(report: TransferReport) -> str:
    """Return the title of the table of `role_rows`; for a fit alone the table has norms only."""
    return "Diagnostics" if report.mapped else "Size of the update"


def role_rows(report: TransferReport, *, full: bool = True) -> list[dict[str, str]]:
    """Return a row of texts for each role and one for all, with figures weighted by the energy of the updates.

    Unless `full`, figures that describe how a map was made are left out.
    """
    rows = [_cells(role, members) for role, members in report.by_role()]
    left_out = () if full else _DETAILS
    found = _without_empty([*rows, _cells("all", report.rows)])
    return [{name: text for name, text in row.items() if name not in left_out} for row in found]


def module_rows(report: TransferReport) -> list[dict[str, str]]:
    """Return a row of texts for each module and one for all."""
    rows = [_cells(f"{row.source} to {row.target}" if row.source else row.target, (row,)) for row in report.rows]
    return _without_empty([*rows, _cells("all", report.rows)])


def print_report(report: TransferReport, console: Console, *, table: TableKind = "role") -> None:
    """Print the table, the unmapped modules, the warnings, and the verdict last.

    The table is "role" (a row for each role, with the most important figures, in 80 columns), "full" (with all
    figures) or "module" (all figures, a row for each module).
    """
    rows = module_rows(report) if table == "module" else role_rows(report, full=table == "full")
    _print_table(report, rows, console)
    for line in _notes(report):
        say(console, line)
    say(console, f"verdict: {report.verdict.text}", style="bold")


def effect_rows(effect: Effect) -> list[dict[str, str]]:
    """Return a row of texts for each base."""
    return [
        {
            "base": name,
            "KL (nats a position)": f"{_figure(one.kl)} ± {_figure(one.kl_spread)}",
            "NLL without": _figure(one.nll),
            "NLL with the adapter": _figure(one.nll_adapted),
        }
        for name, one in (("source", effect.source), ("target", effect.target))
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _print_table(report: TransferReport, rows: list[dict[str, str]], console: Console) -> None:
    recipe = report.recipe
    # The recipe has the hyper-parameters that differ from the defaults.
    stated = [name for name in re.findall(r"(?m)^(\w+) = ", report.recipe_toml) if name in recipe.settings]
    settings = "".join(f", {name} {recipe.settings[name]}" for name in stated)
    depth = recipe.depth if recipe.depth in DEPTH_MAPS else "explicit"
    table = Table(title=f"{recipe.method}{settings}, depth {depth}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "module" else "right", no_wrap=name == "module")
    for row in rows[:-1]:
        table.add_row(*row.values())
    table.add_section()
    table.add_row(*rows[-1].values())
    console.print(table)


def _notes(report: TransferReport) -> list[str]:
    recipe, adapter, left = report.recipe, report.adapter, report.unmapped_sources
    effects = [] if report.effect is None else effect_rows(report.effect)
    signs = f"fixed by the embeddings of {recipe.shared_tokens:,} shared tokens"
    lines = [
        ("method", report.choice and f"{recipe.method}, because {report.choice}"),
        ("adapter", None if adapter.lost else adapter.read_as),
        *(("fit", sentence) for sentence in (fit_sentences(report.fit) if report.fit is not None else ())),
        *(("written", shorten(" ".join(text.split()))) for text in report.examples),
        ("rank", report.rank_sentence if report.fit is not None or report.added else None),
        ("added", report.added),
        ("truncation", report.truncation and report.truncation.sentence),
        ("probes", recipe.probes if recipe.probes != "none" else None),
        ("signs", signs if recipe.signs == "vocabulary" else None),
        ("SVDs", recipe.svd if recipe.svd != "not needed" else None),
        ("not moved", left and _left(report)),
        *(("moved", row.sentence) for row in report.tokens),
        ("without an update", report.unmapped_targets and f"{len(report.unmapped_targets)} target modules"),
        *(("effect", ", ".join(map(" ".join, row.items()))) for row in effects),
        *(("warning", sentence) for sentence in report.warnings),
    ]
    return [f"{name}: {text}" for name, text in lines if text]


def _left(report: TransferReport) -> str:
    names = [item.source for item in report.unmapped_sources]
    layers = "layers " + ", ".join(map(str, sorted({int(name.split(".")[2]) for name in names})))
    # Roles that no moved module has, such as MLP gates if the target has none.
    absent = {name.rpartition(".")[2] for name in names} - {row.role for row in report.rows}
    places = f"{', '.join(sorted(absent))} of {layers}" if absent else layers
    return (
        f"{len(names)} source modules feed no target module ({places}); "
        f"they held {report.left_behind:.1%} of the update's energy"
    )


def _cells(label: str, rows: Sequence[ModuleRow]) -> dict[str, str]:
    def mean(field: str) -> float:
        return weighted(rows, field)

    # A row has no norm if the source's weights were not read, or the role is new.
    norms = [row.norm_before for row in rows if row.norm_before is not None]
    before = f"{math.hypot(*norms):.3g} to " if norms or not rows else ""
    after = math.hypot(*(row.norm_after or 0.0 for row in rows))
    return {
        "module": label,
        "n": str(len(rows)),
        "kept": _percent(mean("kept")),
        "energy src/tgt": f"{_percent(mean('energy_src'))} / {_percent(mean('energy_tgt'))}",
        "gap src/tgt": f"{_number(mean('gap_src'), 4)} / {_number(mean('gap_tgt'), 4)}",
        "cond src/tgt": f"{_number(mean('condition_src'), 0)} / {_number(mean('condition_tgt'), 0)}",
        "sim out/in": f"{_number(mean('similarity_out'), 2)} / {_number(mean('similarity_in'), 2)}",
        "vectors": _number(mean("vector_ratio"), 2),
        "activations": _number(mean("activation_cosine"), 3),
        "cosine": _number(mean("weight_cosine"), 3),
        "parts": _number(mean("part_cosine"), 3),
        "norm": f"{before}{after:.3g}",
    }


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Drop columns that have no figure in any row."""
    given = [name for name in rows[0] if any(set(row[name]) - set("-/ ") for row in rows)]
    return [{name: row[name] for name in given} for row in rows]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def verdict(report: TransferReport) -> Verdict:
    """Return the verdict of a report: what to expect of the moved adapter."""
    return report.verdict


def judge(report: TransferReport, method: Method) -> Verdict:
    """Judge a transfer by its fit or by its method's diagnostic and the remaining energy, and by the effect."""
    found, effect = _by_diagnostics(report, method), report.effect
    if effect is None:
        return found
    level = found.level
    # A control should be ineffective.
    if level != "control" and (effect.outcome == "ineffective" or effect.outcome == "destructive"):
        level = effect.outcome
    return Verdict(level, f"{found.text}; {effect.sentence}")


def _by_diagnostics(report: TransferReport, method: Method) -> Verdict:
    if report.fit is not None:
        return fit_verdict(report.fit)
    if not isinstance(method, MapMethod):
        return Verdict("unknown", f"method {method.name} reports no diagnostics: {_MEASURE}")
    if method.is_control:
        return Verdict("control", "this is a random map, a control: expect no effect")
    if report.kept < _LOST:
        return Verdict("lost", f"the maps kept {report.kept:.2%} of the update's energy: {_NOTHING}")
    if method.measure == "none":
        return Verdict("unknown", f"method {method.name} measures no agreement of the two bases: {_MEASURE}")
    same = report.source.digest is not None and report.source.digest == report.target.digest
    return _by_alignment(method.measure, report.rows, report.recipe.signs, same)


def _by_alignment(measure: str, rows: tuple[ModuleRow, ...], signs: str, same: bool) -> Verdict:
    cosine = weighted(rows, "part_cosine" if measure == "part cosine" else "weight_cosine")
    if same and (cosine >= _SAME_COSINE or not rows):
        return Verdict(
            "aligned", "source and target are one and the same base (equal digests): nothing had to be moved"
        )
    if not rows:  # only experts or token rows were moved
        return Verdict("unknown", f"alignment cannot be measured (no linear layer was moved): {_MEASURE}")
    if measure == "part cosine" and cosine >= _SAME_COSINE:
        return Verdict("aligned", f"the bases are made of the same parts (weight cosine {cosine:.3f}): {_SOME}")
    if cosine >= _SAME_COSINE:
        hint = "" if measure == "weight cosine" else "; --method copy moves the whole update"
        return Verdict("aligned", f"the two bases are nearly identical (weight cosine {cosine:.3f}){hint}")
    if measure == "vector ratio":
        ratio = weighted(rows, "vector_ratio")
        if math.isnan(ratio):
            reason = "the signs of the singular vectors are not anchored" if signs == "rule" else "nothing was measured"
            return Verdict("unknown", f"alignment cannot be measured ({reason}): {_NOTHING}")
        return _by_ratio(ratio)
    if measure == "activation cosine":
        figure = weighted(rows, "activation_cosine")
        return Verdict("aligned", f"activations are aligned (cosine {figure:.2f}): {_SOME} with `jcrosslora evaluate`")
    if measure == "subspace similarity":
        sides = weighted(rows, "similarity_out"), weighted(rows, "similarity_in")
        if known := [side for side in sides if not math.isnan(side)]:
            return _by_ratio(sum(known) / len(known))
    relations = "coordinates of the two bases are unrelated", "two bases are distant relatives", "two bases are related"
    return _by_limits(cosine, _COSINES, [f"the {one} (weight cosine {cosine:.3f})" for one in relations])


def _by_ratio(ratio: float) -> Verdict:
    chance, weak = f"alignment is at chance level ({ratio:.2f}x)", f"alignment is weak ({ratio:.2f}x chance)"
    return _by_limits(ratio, _RATIOS, (chance, weak, f"the bases are aligned ({ratio:.1f}x chance)"))


def _by_limits(value: float, limits: tuple[float, float], sentences: Sequence[str]) -> Verdict:
    """Judge by a figure; the sentences are for values below the first limit, below the second, and from there on."""
    place = next((place for place, limit in enumerate(limits) if value < limit), 2)
    known: tuple[tuple[Level, str], ...] = ("chance", _NOTHING), ("weak", _LITTLE), ("aligned", _SOME)
    level, advice = known[place]
    return Verdict(level, f"{sentences[place]}: {advice}")
