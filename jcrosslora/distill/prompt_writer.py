"""Which of two bases writes the prompts of a fit.

The better model of text writes the better requests, and mostly that is the newer one, the target. Both are asked how
well they foresee the last inputs of lists of inputs, as such lists are what they are to go on with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jcrosslora.distill.discovery.job_kinds import KINDS
from jcrosslora.distill.discovery.requests import list_requests
from jcrosslora.distill.sources.protocol import Source, Writer
from jcrosslora.distill.template_choice import compare
from jcrosslora.text import Completion

_SHOWN = 2  # inputs in front of the one that is looked at
_TOKENS = 48  # of it, more than any of them has


def choose_writer(source: Source, target: Source, shared: dict[Any, Any] | None = None) -> Writer:
    """Choose the base that foresees the inputs of `KINDS` best, in nats a character, behind others of their kind.

    Args:
        source: a base with an adapter, which is taken off.
        target: another base, without one.
        shared: what holds for all adapters of the pair; the choice is looked for there, and added.

    Raises:
        SourceError: a source that is asked over the network does not answer.
    """
    known = {} if shared is None else shared
    if choose_writer not in known:
        known[choose_writer] = _nats(target) < _nats(source)
    return target if known[choose_writer] else source.alone()


def _nats(source: Source) -> float:
    """Measure the mean NLL of the inputs under the base, nats a character."""
    lists = [
        kind.inputs[first : first + _SHOWN + 1] for kind in KINDS for first in range(0, len(kind.inputs), _SHOWN + 1)
    ]
    items = [Completion(list_requests([*shown, ""]), f" {last}") for *shown, last in lists]
    tokens = [len(source.tokenizer.encode(item.answer, special=False).ids) for item in items]
    nll = compare(source, items, _TOKENS).base_nll
    return float(np.dot(nll, tokens) / sum(len(item.answer) for item in items))
