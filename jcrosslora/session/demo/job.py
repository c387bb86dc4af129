"""The demo's job, to answer science questions in JSON, and how well each adapter does it, as a table."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Generator, fast_dtype, load_model
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Interval, Question, Scores, lift_recovered, read_task, score
from jcrosslora.utils.progress import each

SOURCE_ADAPTER = "smollm2_json_answers"
TARGET_ADAPTER = "gemma3_json_answers"
_QUESTIONS = "science_questions.jsonl"


def shipped(name: str) -> AbstractContextManager[Path]:
    """Open a file or folder of the package's data, such as the adapter `SOURCE_ADAPTER`."""
    return as_file(files("jcrosslora") / "data" / name)


def demo_questions() -> list[Question]:
    """Return the package's own science questions, which no shipped adapter was trained on, with JSON as choices."""
    with shipped(_QUESTIONS) as path:
        return in_json(read_task(path))


def in_json(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with every choice as the JSON that the job asks for.

    A choice ends with a line break, so that training teaches where an answer ends.
    """
    return [
        dataclasses.replace(question, choices=tuple(f"{json_answer(choice)}\n" for choice in question.choices))
        for question in questions
    ]


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


# Enough for the first line of most answers.
_ANSWER_TOKENS = 20


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models of one base side by side: the base itself, then the base with each adapter.

    Attributes:
        questions: n questions, as they were scored.
        scores: of all models, in the order of `names`.
        names: of the models, "base" first.
        written: name -> what the model writes, one line for each of the first questions, without spaces around it.
    """

    questions: Sequence[Question]
    scores: Scores
    names: tuple[str, ...]
    written: Mapping[str, Sequence[str]]

    def log_likelihoods(self) -> dict[str, float]:
        """Return for each model log p(right answers) / their characters, in nats."""
        return dict(zip(self.names, -self.scores.nll_pooled(), strict=True))

    def accuracies(self) -> dict[str, float]:
        """Return for each model the share of questions whose right choice is the likeliest."""
        return dict(zip(self.names, self.scores.accuracy(), strict=True))

    def json_shares(self) -> dict[str, float]:
        """Return for each model the share of its written answers that are JSON."""
        return {name: sum(map(is_json_answer, lines)) / len(lines) for name, lines in self.written.items()}

    def lift(self, name: str, trained: str) -> Interval:
        """Return the share of `trained`'s gain in log-likelihood that another model has.

        Raises:
            UsageError: `trained` has no gain that can be told from 0.
        """
        figures = self.scores.by_question("nll_pooled")
        base, moved, oracle = (figures[self.names.index(one)] for one in (self.names[0], name, trained))
        return lift_recovered(base, moved, oracle)


def compare(
    base: BaseModel, adapters: Mapping[str, Adapter], questions: Sequence[Question], *, written: int
) -> Comparison:
    """Score a base alone and with each adapter, and let all of them write answers.

    Args:
        base: the target of the move.
        adapters: name -> adapter of this base.
        questions: at least one.
        written: let the models answer so many of the questions in writing, by the likeliest token each time.
    """
    model, tokenizer = load_model(base, fast_dtype()), load_tokenizer(base)
    scores = score(base, questions, list(adapters.values()), model=model, tokenizer=tokenizer)
    models: dict[str, Adapter | None] = {"base": None, **adapters}
    prompts, lines = [question.prompt for question in questions[:written]], {}
    for name, adapter in each(models.items(), "write answers", "models"):
        generator = Generator.of(base, adapter, model=model, tokenizer=tokenizer)
        found = generator.continue_texts(prompts, _ANSWER_TOKENS, 0.0, jax.random.key(0))
        lines[name] = [_first_line(text) for text in found]
    return Comparison(questions, scores, tuple(models), lines)


def _first_line(text: str) -> str:
    return text.strip(" ").partition("\n")[0].rstrip()


def print_answers(comparison: Comparison, names: Sequence[str], count: int, console: Console) -> None:
    """Print what some of the models write in answer to the first `count` questions, one model below the other."""
    width = max(map(len, names))
    for place, question in enumerate(comparison.questions[:count]):
        console.print(Text(question.question, style="bold"), soft_wrap=True)
        for name in names:
            written = comparison.written[name][place] or "(nothing)"
            console.print(Text(f"  {name:<{width}}  {written}"), soft_wrap=True)


def print_figures(comparison: Comparison, trained: str, console: Console) -> None:
    """Print log-likelihood, accuracy, share of JSON and lift of every model.

    Args:
        comparison: what to print.
        trained: the model whose gain over the base is the whole lift.
        console: where to.
    """
    nats, accuracy, json = comparison.log_likelihoods(), comparison.accuracies(), comparison.json_shares()
    written = len(comparison.written[trained])
    caption = (
        f"{len(comparison.questions)} questions. log p / char: log-likelihood of the right answer, nats per character. "
        f"In JSON: of the first {written} answers in writing. "
        f"Lift: share of the gain in log-likelihood of '{trained}', with its 95% interval."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("log p / char", "accuracy", "in JSON", "lift recovered"):
        table.add_column(name, justify="right")
    for name in comparison.names:
        shown = (f"{nats[name]:.3f}", f"{accuracy[name]:.0%}", f"{json[name]:.0%}", _lift(comparison, name, trained))
        table.add_row(Text(name), *map(Text, shown))
    console.print(table)


def _lift(comparison: Comparison, name: str, trained: str) -> str:
    if name == comparison.names[0]:
        return "0"
    if name == trained:
        return "1"
    try:
        found = comparison.lift(name, trained)
    except UsageError:  # an interval that includes 0: no share of such a gain can be told
        return "-"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
