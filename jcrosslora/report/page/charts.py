"""The charts of a report, each with a question and a caption; and all of them on one sheet."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from jcrosslora.errors import UsageError
from jcrosslora.maps.moved import ModuleRow
from jcrosslora.report.page import theme
from jcrosslora.report.page.contents import LAYER, Contents, Evaluation
from jcrosslora.report.page.headline import FIGURES, headline, main_figures
from jcrosslora.report.page.theme import BASE, INK, LEFT, LINE, MOVED, MUTED, OTHER, TRAINED, numbered
from jcrosslora.report.record import TransferReport
from jcrosslora.utils.texts import shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Key: TypeAlias = tuple[tuple[str, str], ...]  # the variable of a colour, what it stands for
_COLOURS = {"base": BASE, "moved": MOVED, "trained": TRAINED}
_LONGEST = 22  # letters of a model's name
_STEPS = 5  # of the scale below the heat map, at most
_BAR = 0.3  # height of the tallest bar of a layer, of the distance of the two rows
_ROUNDING = 1e-4  # shares below it are not told from none
_MEANINGS = {
    "base": "without adapter: the target as it is",
    "moved": "moved adapter: the target with the adapter that this page is about",
    "trained": "trained adapter: the target with an adapter that was trained on it for this task; about the best "
    "to expect",
    "random": "random adapter: a random update as large as the moved one; a move has to do better than this",
    "other": "another adapter",
}
_CURVE = (
    "How far the predictions of the target with the moved adapter are from those of the source with the original one, "
    "on held-out texts, during the fit. It starts with the target alone; 0 is no difference. A curve that falls and "
    "then stays level has learned what it can from these texts."
)
_HEAT = (
    "Each cell is the change that the moved adapter makes to the weights of one kind of module in one layer: the "
    "stronger the colour, the larger; a cell without colour has none. Names with q, k, v and o are parts of the "
    "attention, gate, up and down of the feed-forward part."
)
_LETTERS = 70  # in a line of the sheet
_LINE, _TITLE = 0.2, 0.35  # inches


@dataclass(frozen=True)
class Picture:
    """A picture, the question that it answers, and the words below it."""

    name: str
    title: str
    heights: tuple[float, ...]  # of its panels, in inches, one below the other
    draw: Callable[[list[Axes]], None]  # on that many axes, within `drawing`
    words: str
    key: Key = ()

    def figure(self) -> Figure:
        """Draw the picture alone; call it within `drawing`."""
        figure = theme.new_figure(sum(self.heights))
        grid = {"height_ratios": self.heights}
        self.draw(list(figure.subplots(len(self.heights), squeeze=False, gridspec_kw=grid)[:, 0]))
        theme.settle(figure)
        return figure

    def svg(self) -> str:
        """Return the picture as an element of the page."""
        with theme.drawing():
            return theme.inline_svg(self.figure(), self.name, self.title)


def pictures(contents: Contents) -> Iterator[Picture]:
    """Yield the pictures that have data, in the order of the page."""
    evaluation, report = contents.evaluation, contents.moved
    if evaluation is not None and (shown := main_figures(evaluation)):
        heights = (0.75 + 0.3 * len(evaluation.models),) * len(shown)
        draw = partial(_draw_bars, evaluation)
        yield Picture("bars", "Does it work?", heights, draw, *_bars(evaluation))
    if report is None:
        return
    looks = [(used, divergence) for used, divergence in report.curve if divergence is not None]
    if len(looks) > 1:
        yield Picture("curve", "How did the fit go?", (2.9,), partial(_draw_curve, looks), _CURVE)
    if not report.rows:
        return
    if report.mapped:
        yield Picture("layers", "Which layer became which?", (3.6,), partial(_draw_layer_map, report), *_layers(report))
    height = 1.25 + 0.27 * len(layer_norms(report))
    yield Picture("heat", "Where is the update large?", (height,), partial(_draw_heat_map, report), _HEAT)


def report_sheet(contents: Contents, form: theme.Format) -> bytes:
    """Draw the sheet, and return the content of its file. The same contents give the same bytes.

    Raises UsageError if there is no picture to draw, or matplotlib is not installed.
    """
    found = list(pictures(contents))
    if not found:
        raise UsageError(f"{contents.name}: has nothing to draw: write the page as html")
    verdict = headline(contents)
    lines = [visible(contents.name), f"{verdict.word}: {verdict.sentence}", *map(visible, verdict.reasons)]
    text = [part for line in lines for part in textwrap.wrap(line, _LETTERS)]
    tall = _LINE * (len(text) + 1) + sum(_TITLE + sum(picture.heights) for picture in found)
    with theme.drawing():
        sheet = theme.new_figure(tall)
        sheet.set_facecolor("white")
        sheet.text(0.02, 1 - _LINE / 2 / tall, "\n".join(text), va="top", fontsize=10, linespacing=1.3)
        top = tall - _LINE * (len(text) + 1)
        for picture in found:
            sheet.text(0.02, (top - _TITLE / 2) / tall, picture.title, va="center", fontsize=12, fontweight="bold")
            top -= _TITLE + sum(picture.heights)
            picture.draw([sheet.add_axes(place) for place in _places(picture, top, tall)])
        return theme.file_of(sheet, form)


def _bars(evaluation: Evaluation) -> tuple[str, Key]:
    what = "examples" if evaluation.written else "questions"
    words = f"Means over {evaluation.count:,} {what}. The thin line and the brackets are the 95% interval: where the "
    words += "mean would probably lie if other questions of this kind were asked; more questions make it shorter. Bars "
    words += "whose intervals hardly overlap do differ."
    parts = dict.fromkeys(model.part for model in evaluation.models)
    return words, tuple(("other" if part == "random" else part, _MEANINGS[part]) for part in parts)


def _layers(report: TransferReport) -> tuple[str, Key]:
    words = "A line joins a layer of the source to the layer of the target that takes its place. Bars are the share of "
    words += "the update that each layer holds, in the original adapter (below) and in the moved one (above). "
    left, shares = report.left_behind, source_shares(report)
    if report.fit is not None:
        without = 1 - sum(shares.values()) if shares else 0.0
        held = f", which held {without:.1%} of the original update," if without > _ROUNDING else ""
        words += "The update was fitted to what the source says with its adapter, so what the layers without a line"
        words += f"{held} do is part of it as well."
    elif left:
        words += f"Layers and modules without a place in the target held {left:.1%} of the original update, which was "
        words += "left behind."
    else:
        words += "Nothing of the original update was left behind."
    key = [("moved", "layer of the target"), ("base", "layer of the source")]
    fed = {layer for layer in report.layers if layer is not None}
    if report.unmapped_sources:
        key.append(("left", "left behind"))
    elif set(range(max(fed, default=0) + 1)) - fed:
        key.append(("left", "layer of the source without a line"))
    return words, tuple(key)


def _places(picture: Picture, bottom: float, tall: float) -> list[tuple[float, float, float, float]]:
    """Place the panels of a picture at a height in inches above the bottom of the sheet, as if it were alone."""
    share, start = sum(picture.heights) / tall, bottom / tall
    bounds = [axes.get_position().bounds for axes in picture.figure().axes]
    return [(left, start + low * share, width, height * share) for left, low, width, height in bounds]


def _draw_bars(evaluation: Evaluation, panels: list[Axes]) -> None:
    """Draw a panel for each figure: a bar for each model, a whisker for its interval, and both as numbers."""
    from matplotlib.transforms import blended_transform_factory

    for axes, name in zip(panels, main_figures(evaluation), strict=True):
        shown, models = FIGURES[name], evaluation.models
        found = [model.figures[name] for model in models]
        places = range(len(models))
        axes.barh(places, [one.value for one in found], 0.62, color=[_COLOURS.get(one.part, OTHER) for one in models])
        # Rounding makes some lengths negative.
        whiskers = [[max(0.0, one.value - one.low) for one in found], [max(0.0, one.high - one.value) for one in found]]
        axes.errorbar([one.value for one in found], places, xerr=whiskers, fmt="none", ecolor=INK)
        for place, one in zip(places, found, strict=True):
            axes.text(1.03, place, shown.interval(one), transform=axes.get_yaxis_transform(), va="center", fontsize=10)
        axes.set_yticks(places, [shortened(visible(model.title), _LONGEST) for model in models])
        axes.invert_yaxis()
        axes.set_xlim(0, shown.top or max(*(one.high for one in found), 1e-9) * 1.05)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=9)
        axes.locator_params(axis="x", nbins=4)
        better = "lower" if shown.lower else "higher"
        axes.set_title(" \n ", linespacing=1.3)  # room for a title that begins at the edge of the picture
        edge = blended_transform_factory(axes.figure.transSubfigure, axes.transAxes)
        words = f"{shown.title}\n{better} is better"
        axes.text(0.01, 1.05, words, transform=edge, va="bottom", linespacing=1.3).set_in_layout(False)


def _draw_curve(curve: Sequence[tuple[int, float]], panels: list[Axes]) -> None:
    """Draw the held-out divergence in nats over the fit, and mark where another pass begins."""
    (axes,), places, values = panels, range(len(curve)), [divergence for _, divergence in curve]
    last = curve[-1][0]
    again = next(place for place, (used, _) in enumerate(curve) if used == last)
    if again < len(curve) - 1:
        axes.axvspan(again, len(curve) - 1, color=LINE, alpha=0.35, linewidth=0)
        axes.text((again + len(curve) - 1) / 2, 1.02, "the same texts again", color=MUTED, fontsize=9, ha="center",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.plot(places, values, color=MOVED, marker="o", markersize=4, linewidth=1.8)
    for place, sides in ((0, "left"), (len(curve) - 1, "right")):
        axes.annotate(f"{values[place]:.3g}", (place, values[place]), (0, 7), textcoords="offset points", ha=sides)
    axes.set_ylim(0, max(*values, 1e-9) * 1.12)
    shown = numbered(len(curve))
    axes.set_xticks(shown, list(map(str, shown)))
    axes.set_xlabel(f"measurement during the fit, which used {last:,} texts")
    axes.set_ylabel("difference (nats)")
    axes.tick_params(labelsize=9)


def _draw_layer_map(report: TransferReport, panels: list[Axes]) -> None:
    """Draw the source's layers below and the target's above, a line for each that feeds another, and shares as bars."""
    (axes,), shares = panels, source_shares(report)
    fed = {layer for layer in report.layers if layer is not None}
    count_src = max((*fed, *shares)) + 1
    count_tgt = max(len(report.layers), *(layer_of(row.target) + 1 for row in report.rows))
    for layer, source in enumerate(report.layers):
        if source is not None:
            ends = [_place(source, count_src), _place(layer, count_tgt)]
            axes.plot(ends, [0, 1], color=LINE, linewidth=1.1, zorder=0)
    above, below = (count_tgt, 1.0, _BAR), (count_src, 0.0, -_BAR)
    _draw_shares(axes, above, target_shares(report), MOVED)
    _draw_shares(axes, below, shares, BASE)
    _draw_shares(axes, below, left_shares(report), LEFT, max(shares.values(), default=1.0))
    axes.scatter([_place(layer, count_tgt) for layer in range(count_tgt)], [1.0] * count_tgt, 9, color=MOVED, zorder=3)
    places, colours = range(count_src), [BASE if layer in fed else LEFT for layer in range(count_src)]
    axes.scatter([_place(layer, count_src) for layer in places], [0.0] * count_src, 9, color=colours, zorder=3)
    for count, height, side in ((count_tgt, 1 + _BAR + 0.04, "bottom"), (count_src, -_BAR - 0.04, "top")):
        for layer in numbered(count):
            axes.text(_place(layer, count), height, str(layer), ha="center", va=side, color=MUTED, fontsize=9)
    axes.text(0, 1 + _BAR + 0.2, "layers of the target (the new model)", va="bottom")
    axes.text(0, -_BAR - 0.2, "layers of the source (the old model)", va="top")
    axes.set_xlim(0, 1)
    axes.set_ylim(-_BAR - 0.42, 1 + _BAR + 0.42)
    axes.axis("off")


def _draw_shares(
    axes: Axes, row: tuple[int, float, float], shares: Mapping[int, float], colour: str, tallest: float = 0.0
) -> None:
    """Draw the share of each layer as a bar.

    A row is the number of its layers, where it lies, and the height of a bar of share `tallest` (0 is the largest
    share), below 0 for bars downwards.
    """
    count, start, height = row
    top = tallest or max(shares.values(), default=0.0) or 1.0
    heights = [height * share / top for share in shares.values()]
    axes.bar([_place(layer, count) for layer in shares], heights, 0.7 / count, start, color=colour)


def _place(layer: int, count: int) -> float:
    return (layer + 0.5) / count


def _draw_heat_map(report: TransferReport, panels: list[Axes]) -> None:
    """Draw a cell for each role and layer, the stronger the colour the larger; a cell without colour has no update."""
    (axes,), norms = panels, layer_norms(report)
    largest = max((norm for of_role in norms.values() for norm in of_role.values()), default=0.0)
    sizes = theme.round_steps(largest, _STEPS)
    count = max(len(report.layers), *(layer + 1 for of_role in norms.values() for layer in of_role))
    for place, of_role in enumerate(norms.values()):
        for layer, norm in of_role.items():
            _cell(axes, layer, place, norm / sizes[-1])
    bottom = len(norms) + 1.35
    width = 0.7 * count / len(sizes)
    for at, size in enumerate(sizes):
        left = count * 0.3 + at * width
        _cell(axes, left, bottom, size / sizes[-1], width)
        axes.text(left + width / 2, bottom + 1.15, f"{size:g}", ha="center", va="top", color=MUTED, fontsize=9)
    axes.text(0, bottom + 0.5, "size (norm)", va="center", color=MUTED, fontsize=9)
    axes.set_yticks([place + 0.5 for place in range(len(norms))], list(norms))
    shown = numbered(count)
    axes.set_xticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("layer of the target")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlim(0, count)
    axes.set_ylim(bottom + 2.2, 0)
    for side in axes.spines.values():
        side.set_visible(False)


def _cell(axes: Axes, left: float, top: float, share: float, width: float = 1.0) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, 1, facecolor=(MOVED, share), edgecolor=LINE, linewidth=0.5))


def layer_of(name: str) -> int:
    """Return the number of the layer in a module's name."""
    match = LAYER.match(name)
    assert match is not None
    return int(match[1])


def layer_norms(report: TransferReport) -> dict[str, dict[int, float]]:
    """Map role and target layer to the norm of the moved update, over all modules of a role such as experts."""
    squares = {role: _squares(rows) for role, rows in report.by_role()}
    return {role: {layer: math.sqrt(value) for layer, value in sorted(of.items())} for role, of in squares.items()}


def target_shares(report: TransferReport) -> dict[int, float]:
    """Map each target layer to its share of the moved update's squared norm."""
    sums = _squares(report.rows)
    total = sum(sums.values())
    return {layer: value / total for layer, value in sums.items()} if total > 0 else {}


def source_shares(report: TransferReport) -> dict[int, float]:
    """Map each source layer to its share of the original update's squared norm; empty if that is not known."""
    energy = report.energy
    if not energy:
        return {}
    # A source module may feed several of the target.
    found = {row.source: row.energy / energy for row in report.rows if row.source and row.energy is not None}
    found |= {one.source: one.share for one in report.unmapped_sources}
    return _sums((layer_of(name), share) for name, share in found.items())


def left_shares(report: TransferReport) -> dict[int, float]:
    """Map each source layer to the share of the original update that it held and that was not moved."""
    return _sums((layer_of(one.source), one.share) for one in report.unmapped_sources)


def _squares(rows: Iterable[ModuleRow]) -> dict[int, float]:
    return _sums((layer_of(row.target), (row.norm_after or 0.0) ** 2) for row in rows)


def _sums(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    sums: dict[int, float] = {}
    for layer, value in pairs:
        sums[layer] = sums.get(layer, 0.0) + value
    return sums
