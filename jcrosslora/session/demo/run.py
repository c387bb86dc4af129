"""The demo: fetch two bases, move an adapter between them, and compare the target's answers before and after.

The job of the shipped adapters is to answer science questions in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, load_tokenizer, open_base
from jcrosslora.decoder import Generator, fast_dtype, load_model
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Interval, Question, Scores, lift_recovered, read_task, score
from jcrosslora.methods import AUTO, Auto, find_method, make_method
from jcrosslora.report import print_report
from jcrosslora.session.demo.fetch import GEMMA3, fetch_models
from jcrosslora.session.result import TransferResult
from jcrosslora.session.transfer import transfer
from jcrosslora.utils import progress
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.terminal import say

SOURCE_ADAPTER, TARGET_ADAPTER = "smollm2_json_answers", "gemma3_json_answers"
TRAINED, RANDOM, PAPER = "trained on Gemma", "random control", "cross-lora"
_WRITTEN, _SHOWN = 48, 6  # numbers of questions that models answer in writing, and whose answers are printed
_ANSWER_TOKENS = 20  # tokens of a written answer: most first lines are shorter
# The demo should end in minutes: a third of the usual completions, half of the usual texts in each step of the search,
# and short answers.
COMPLETIONS, _SEARCHED, ANSWER_TOKENS = 100, 24, 16
_FETCH = "fetch SmolLM2-135M-Instruct and Gemma-3-270M"
_MOVE = "move an adapter from SmolLM2 to Gemma by method"
_MOVE_OTHERS = "move it by a random map and by the paper's map (cross-lora) for comparison"
_ANSWER = "let Gemma answer questions that no adapter was trained on"


def run_demo(
    out: Path, console: Console, *, method: str = AUTO, models: Path | None = None, overwrite: bool = False
) -> None:
    """Fetch two bases, move the shipped adapter, compare the target's answers, and print.

    Args:
        out: folder for the moved adapter; with `overwrite` one that is there is replaced.
        models: folder of the base models; None is `models` in the cache folder.

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
            raise KeyboardInterrupt(f"the moved adapter is in {out}") from None
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


def move(adapter: Path, bases: tuple[BaseModel, BaseModel], method: str) -> TransferResult:
    """Move an adapter by any method; a fit uses fewer completions than usual.

    Raises JCrossLoRAError if the method cannot be used.
    """
    # The loss of the demo's adapter was on answers alone, so that it knows no prompts.
    settings = {"completions": COMPLETIONS, "answer_tokens": ANSWER_TOKENS, "discovery": _SEARCHED, "own_prompts": 0}
    chosen = make_method(Auto(**settings))
    if method != AUTO:
        chosen = make_method(method, settings if hasattr(find_method(method), "completions") else {})
    # The demo scores the target's answers instead of the effect.
    return transfer(adapter, *bases, chosen, effect="never")


def shipped(name: str) -> AbstractContextManager[Path]:
    """Open a file or folder of the package's data, such as the adapter `SOURCE_ADAPTER`."""
    return as_file(files("jcrosslora") / "data" / name)


def demo_questions() -> list[Question]:
    """Return the package's own science questions, which no shipped adapter was trained on, with JSON as choices."""
    with shipped("science_questions.jsonl") as path:
        return in_json(read_task(path))


def in_json(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with every choice as the JSON that the job asks for.

    A choice ends with a line break, so that training teaches where an answer ends.
    """
    return [replace(one, choices=tuple(f"{json_answer(choice)}\n" for choice in one.choices)) for one in questions]


def json_answer(text: str) -> str:
    """Return the JSON object of an answer, on one line."""
    return json.dumps({"answer": text.rstrip(" .")}, ensure_ascii=False)


def is_json_answer(written: str) -> bool:
    """Tell whether a written line is one JSON object of the form `{"answer": text}`."""
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and list(found) == ["answer"] and isinstance(found["answer"], str)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models of one base side by side: the base itself, then the base with each adapter.

    Attributes:
        scores: of all models, in the order of `names`.
        names: of the models, "base" first.
        written: the answers of each model by name, one stripped line for each of the first questions.
    """

    questions: Sequence[Question]
    scores: Scores
    names: tuple[str, ...]
    written: Mapping[str, Sequence[str]]

    def log_likelihoods(self) -> dict[str, float]:
        """Return log p(right answers) per character for each model, in nats."""
        return dict(zip(self.names, -self.scores.nll_pooled(), strict=True))

    def lift(self, name: str, trained: str) -> Interval:
        """Return the share of `trained`'s gain in log-likelihood that another model has.

        Raises UsageError if the gain of `trained` does not differ from 0.
        """
        figures = self.scores.by_question("nll_pooled")
        return lift_recovered(*(figures[self.names.index(one)] for one in (self.names[0], name, trained)))


def compare(
    base: BaseModel, adapters: Mapping[str, Adapter], questions: Sequence[Question], *, written: int
) -> Comparison:
    """Score a base alone and with each adapter, and let all of them write answers.

    The models answer the first `written` of the questions in writing, by the likeliest token each time.
    """
    model, tokenizer = load_model(base, fast_dtype()), load_tokenizer(base)
    scores = score(base, questions, list(adapters.values()), model=model, tokenizer=tokenizer)
    models: dict[str, Adapter | None] = {"base": None, **adapters}
    prompts, lines = [question.prompt for question in questions[:written]], {}
    for name, adapter in progress.each(models.items(), "write answers", "models"):
        generator = Generator.of(base, adapter, model=model, tokenizer=tokenizer)
        found = generator.continue_texts(prompts, _ANSWER_TOKENS, 0.0, jax.random.key(0))
        lines[name] = [text.strip(" ").partition("\n")[0].rstrip() for text in found]
    return Comparison(questions, scores, tuple(models), lines)


def print_answers(comparison: Comparison, names: Sequence[str], count: int, console: Console) -> None:
    """Print the written answers of some models to the first `count` questions, one model per line."""
    width = max(map(len, names))
    for place, question in enumerate(comparison.questions[:count]):
        console.print(Text(question.question, style="bold"), soft_wrap=True)
        for name in names:
            written = comparison.written[name][place] or "(nothing)"
            console.print(Text(f"  {name:<{width}}  {written}"), soft_wrap=True)


def print_figures(comparison: Comparison, trained: str, console: Console) -> None:
    """Print log-likelihood, accuracy, share of JSON and lift of every model; `trained` has the whole lift."""
    nats, accuracies = comparison.log_likelihoods(), comparison.scores.accuracy()
    written = len(comparison.written[trained])
    caption = (
        f"{len(comparison.questions)} questions. log p / char: log-likelihood of the right answer, nats per character. "
        f"In JSON: of the first {written} answers in writing. "
        f"Lift: share of the gain in log-likelihood of '{trained}', with its 95% interval."
    )
    figures = ("log p / char", "accuracy", "in JSON", "lift recovered")
    columns = Column("model", overflow="fold"), *(Column(name, justify="right") for name in figures)
    table = Table(*columns, caption=caption, caption_justify="left")
    for name, accuracy in zip(comparison.names, accuracies, strict=True):
        share = sum(map(is_json_answer, comparison.written[name])) / len(comparison.written[name])
        shown = f"{nats[name]:.3f}", f"{accuracy:.0%}", f"{share:.0%}", _lift(comparison, name, trained)
        table.add_row(Text(name), *map(Text, shown))
    console.print(table)


def _lift(comparison: Comparison, name: str, trained: str) -> str:
    if name in (comparison.names[0], trained):
        return "1" if name == trained else "0"
    try:
        found = comparison.lift(name, trained)
    except UsageError:  # the interval of the gain includes 0
        return "-"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
