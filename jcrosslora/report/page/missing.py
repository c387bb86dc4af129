"""What the page leaves out for want of a file, and which command makes it."""

from __future__ import annotations

from collections.abc import Iterator

from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.evaluation import Evaluation
from jcrosslora.report.page.moved import Moved

_EVALUATE = "jcrosslora evaluate --base TARGET --task FILE.jsonl --adapter DIR --show 10 --json > answers.json"
_REPORT = "jcrosslora report DIR --answers answers.json"
_BESIDE = "evaluate it beside the moved one, and report with"
_TRAINED = (
    "How much of what training brings: jcrosslora train TARGET --data TRAIN.jsonl --out trained, "
    "evaluate the moved one with --trained trained, and report."
)
_RANDOM = (
    "Whether a random update would do as well: jcrosslora transfer ... --method random --out random, "
    f"{_BESIDE} --random random."
)


def missing(contents: Contents) -> Iterator[str]:
    """Yield a sentence for each part that is left out: what it would show, and the command."""
    if contents.evaluation is None:
        yield f"Whether the adapter works, with answers before and after: {_EVALUATE}, then {_REPORT}."
    else:
        yield from _of_evaluation(contents.evaluation)
    if contents.moved is None:
        yield "How the adapter was made: jcrosslora report on the folder that jcrosslora transfer wrote."
    else:
        yield from _of_transfer(contents.moved)


def _of_evaluation(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.written:
        yield "Answers before and after: evaluate a task that is answered in writing, see jcrosslora evaluate --help."
    elif not evaluation.examples:
        yield f"Answers before and after: {_EVALUATE}."
    if len(evaluation.models) == 1:
        yield f"Whether an adapter works: {_EVALUATE}."
        return
    if evaluation.of_part("moved") is None:
        yield "Which of the adapters is the moved one: jcrosslora report with --moved NAME."
    if evaluation.of_part("trained") is None:
        yield _TRAINED
    if evaluation.of_part("random") is None:
        yield _RANDOM


def _of_transfer(moved: Moved) -> Iterator[str]:
    if len(moved.curve) < 2:
        yield f"A curve of the fit: method {moved.recipe.method} records none; distill does."
    if not any(layer is not None for layer in moved.layers):
        yield "A map of the layers: the source was asked and not read, so its layers are not known."
