"""The words below each picture: what is shown, what the colours are, how to read it."""

from __future__ import annotations

from typing import TypeAlias

from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.evaluation import Evaluation
from jcrosslora.report.page.moved import Moved

# The words, and the key: (variable of a colour, what it stands for).
Caption: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]

_ROUNDING = 1e-4  # shares below it are not told from none
_MEANINGS = {
    "base": "without adapter: the target as it is",
    "moved": "moved adapter: the target with the adapter that this page is about",
    "trained": "trained adapter: the target with an adapter that was trained for it on the task's own data; about the "
    "best to hope for",
    "random": "random adapter: as large as the moved one, but random; a move has to do better than this",
    "other": "another adapter",
}
_WORDS = {
    "curve": "How much the target with the moved adapter predicts otherwise than the source with the original one, on "
    "texts that were kept aside. It starts with the target alone; 0 would be no difference. A curve that falls and "
    "then stays level has learned what it can from these texts.",
    "heat": "Each cell is the change that the moved adapter makes to the weights of one kind of module in one layer: "
    "the stronger the colour, the larger; a cell without colour has none. Names with q, k, v and o are parts of the "
    "attention, gate, up and down of the feed-forward part.",
}


def caption(name: str, contents: Contents) -> Caption:
    """Describe a picture by its name."""
    if name == "bars" and contents.evaluation is not None:
        return _bars(contents.evaluation)
    if name == "layers" and contents.moved is not None:
        return _layers(contents.moved)
    return _WORDS[name], ()


def _bars(evaluation: Evaluation) -> Caption:
    what = "examples" if evaluation.written else "questions"
    words = f"Means over {evaluation.count:,} {what}. The thin line and the brackets are the 95% interval: where the "
    words += "mean would probably lie if other questions of this kind were asked; more questions make it shorter. Bars "
    words += "whose intervals hardly overlap do differ."
    parts = dict.fromkeys(model.part for model in evaluation.models)
    return words, tuple(("other" if part == "random" else part, _MEANINGS[part]) for part in parts)


def _layers(moved: Moved) -> Caption:
    words = "A line joins a layer of the source to the layer of the target that takes its place. Bars are the share of "
    words += "the update that each layer holds, in the original adapter (below) and in the moved one (above). "
    left = sum(one.share for one in moved.unmapped_sources)
    if moved.fitted:
        without = 1 - sum(moved.source_shares().values()) if moved.source_shares() else 0.0
        held = f", which held {without:.1%} of the original update," if without > _ROUNDING else ""
        words += "The update was fitted to what the source says with its adapter, so what the layers without a line"
        words += f"{held} do is part of it as well."
    elif left:
        words += f"Layers and modules without a place in the target held {left:.1%} of the original update, which was "
        words += "left behind."
    else:
        words += "Nothing of the original update was left behind."
    key = [("moved", "layer of the target"), ("base", "layer of the source")]
    fed = {layer for layer in moved.layers if layer is not None}
    if moved.unmapped_sources:
        key.append(("left", "left behind"))
    elif set(range(max(fed, default=0) + 1)) - fed:
        key.append(("left", "layer of the source without a line"))
    return words, tuple(key)
