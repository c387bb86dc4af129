"""Run the demo: fetch two bases, move an adapter, and compare the target's answers before and after."""

import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.methods import AUTO, Auto, find_method, make_method
from jcrosslora.report.table import print_report
from jcrosslora.session.demo.fetch import GEMMA3, fetch_models
from jcrosslora.session.demo.job import (
    SOURCE_ADAPTER,
    TARGET_ADAPTER,
    Comparison,
    compare,
    demo_questions,
    print_answers,
    print_figures,
    shipped,
)
from jcrosslora.session.result import TransferResult
from jcrosslora.session.transfer import transfer
from jcrosslora.utils import progress
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.terminal import say

TRAINED, RANDOM, PAPER = "trained on Gemma", "random control", "cross-lora"
_WRITTEN, _SHOWN = 48, 6  # questions that models answer in writing, and those whose answers are printed
_FETCH = "fetch SmolLM2-135M-Instruct and Gemma-3-270M"
_MOVE = "move an adapter from SmolLM2 to Gemma by method"
_MOVE_OTHERS = "move it by a random map and by the paper's map (cross-lora) for comparison"
_ANSWER = "let Gemma answer questions that no adapter was trained on"


def run_demo(
    out: Path, console: Console, *, method: str = AUTO, models: Path | None = None, overwrite: bool = False
) -> None:
    """Fetch two bases, move the shipped adapter, compare the target's answers, and print.

    Args:
        out: folder for the moved adapter.
        console: where to print.
        method: how to move it.
        models: folder of the base models; None is `models` in the cache folder.
        overwrite: whether an adapter in `out` may be replaced.

    Raises:
        JCrossLoRAError: the method or the output folder cannot be used, or the models cannot be fetched.
    """
    ensure_free(out, overwrite)
    make_method(method)
    moving = f"{_MOVE} {method}"
    seconds = {_FETCH: 20, moving: 180, _MOVE_OTHERS: 10, _ANSWER: 80}  # on 2 cores
    with (
        progress.steps(seconds, unpaced=(_FETCH,), announce=partial(say, console)) as steps,
        shipped(SOURCE_ADAPTER) as path,
    ):
        steps.begin(_FETCH)
        places = fetch_models(models, console)
        source, target = open_base(places[0]), open_base(places[1], name=GEMMA3.hub_id)
        steps.begin(moving)
        result = move(path, (source, target), method)
        result.save(out, overwrite=overwrite)
        with progress.hidden():
            print_report(result.report, console)
            say(console, f"written: {out}")
        try:
            found = _compare((source, target), path, result.adapter, method, steps)
        except KeyboardInterrupt:
            with progress.hidden():
                print(f"jcrosslora: interrupted; the moved adapter is in {out}", file=sys.stderr)
            sys.exit(130)
    _print(found, _moved_name(method), console)


def _compare(
    bases: tuple[BaseModel, BaseModel], path: Path, moved: Adapter, method: str, steps: progress.Steps
) -> Comparison:
    """Score the moved adapter, one trained on the target, the random control and the paper's map."""
    target = bases[1]
    with shipped(TARGET_ADAPTER) as trained:
        adapters = {_moved_name(method): moved, TRAINED: load_adapter(str(trained), target)}
    steps.begin(_MOVE_OTHERS)
    others = {RANDOM: "random", PAPER: "cross-lora"}
    adapters |= {name: move(path, bases, other).adapter for name, other in others.items() if other != method}
    steps.begin(_ANSWER)
    return compare(target, adapters, demo_questions(), written=_WRITTEN)


def _moved_name(method: str) -> str:
    return "moved" if method == AUTO else f"moved by {method}"


def _print(result: Comparison, moved: str, console: Console) -> None:
    say(console, "")
    say(console, "The adapter was trained on SmolLM2 to answer science questions as JSON. This is what Gemma writes.")
    say(console, "Models of this size are often wrong: look at the form of the answers, and at the figures below.")
    print_answers(result, (result.names[0], moved, TRAINED), _SHOWN, console)
    print_figures(result, TRAINED, console)


# The demo is to be over in minutes: a third of the usual completions, and half of the usual texts in each step of the
# search. Its answers are short.
COMPLETIONS, _SEARCHED, ANSWER_TOKENS = 100, 24, 16


def move(adapter: Path, bases: tuple[BaseModel, BaseModel], method: str) -> TransferResult:
    """Move an adapter by any method; an update is fitted to fewer completions than usual.

    Raises:
        JCrossLoRAError: the method cannot be used.
    """
    settings = {"completions": COMPLETIONS, "answer_tokens": ANSWER_TOKENS, "discovery": _SEARCHED}
    chosen = make_method(Auto(**settings))
    if method != AUTO:
        chosen = make_method(method, settings if hasattr(find_method(method), "completions") else {})
    # The demo scores the target's answers in place of the effect.
    return transfer(adapter, *bases, chosen, effect="never")
