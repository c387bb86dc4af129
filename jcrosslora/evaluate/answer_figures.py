"""Figures of one written answer against the right ones: equal text, equal JSON, chrF, ROUGE-L.

chrF is that of sacrebleu: M. Popović, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015. ROUGE-L is
that of rouge-score: C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries, 2004.
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from jcrosslora.errors import UsageError

# Modules of the extra `scores`, by the figure that needs them.
LIBRARIES = {"chrf": "sacrebleu", "rouge_l": "rouge_score"}


def exact(text: str, references: Sequence[str]) -> float:
    """Return 1 if a text is one of the references, space around both not counted; else 0."""
    return float(text.strip() in [reference.strip() for reference in references])


def equal_json(text: str, references: Sequence[str]) -> float:
    """Return 1 if a text and one of the references are JSON of the same value; else 0.

    The order of keys and the way a number is written do not matter; the order of a list does.
    """
    found = parse_json(text)
    values = [parse_json(reference) for reference in references]
    return float(found is not None and any(value is not None and _same(found[0], value[0]) for value in values))


def chrf(text: str, references: Sequence[str]) -> float:
    """Compute chrF against the nearest of the references, 0 to 100.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    return float(_chrf_scorer().sentence_score(text.strip(), [one.strip() for one in references]).score)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Compute the F-measure of ROUGE-L against the nearest of the references, 0 to 1.

    Words are runs of a to z and digits, in lower case and without stemming; other letters count as space.

    Raises:
        UsageError: rouge-score is not installed.
    """
    return float(_rouge_scorer().score_multi(list(references), text)["rougeL"].fmeasure)


def parse_json(text: str) -> tuple[Any] | None:
    """Read JSON, strictly; return its value as a tuple of one, or None where the text is not JSON."""
    try:
        return (json.loads(text.strip(), parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


def installed(figure: str) -> bool:
    """Check whether the library that a figure needs is installed; True for a figure that needs none."""
    return figure not in LIBRARIES or find_spec(LIBRARIES[figure]) is not None


def _refuse(name: str) -> Any:
    msg = f"{name} is not JSON"
    raise ValueError(msg)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    # In Python, but not in JSON, True is 1.
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@cache
def _chrf_scorer() -> Any:
    return _library("chrf", "sacrebleu.metrics").CHRF()


@cache
def _rouge_scorer() -> Any:
    return _library("rouge_l", "rouge_score.rouge_scorer").RougeScorer(["rougeL"])


def _library(figure: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        msg = f"figure {figure!r} needs the package {LIBRARIES[figure].replace('_', '-')} ({error}): "
        msg += "pip install 'jcrosslora[scores]'"
        raise UsageError(msg) from error
