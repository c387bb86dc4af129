"""`jcrosslora evaluate`: a base alone and with adapters, on questions with choices or on answers in writing."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json, say
from jcrosslora.errors import OutputError, UsageError

if TYPE_CHECKING:
    from jcrosslora.evaluate import Answers, Example, Scores


@dataclass(frozen=True)
class Evaluate:
    """Judge a base, alone and with adapters, by a task; say for each adapter whether it is better.

    Questions with choices are scored by likelihood. Examples with "messages", or with "prompt" and "answer", are
    answered in writing, and the answers compared with the right ones.
    """

    base: str
    """The base model: a folder of safetensors, a GGUF file or a hub id."""
    task: Path
    """JSONL with {"messages"}, {"prompt", "answer"} or {"question", "choices", "answer": index} on each line."""
    adapter: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Adapters of this base, judged beside each other."""
    template: Path | None = None
    """File with a chat template, by which conversations are read in place of the base's own."""
    limit: int | None = None
    """Take only the first so many lines."""
    max_new_tokens: int | None = None
    """Tokens at which an answer is cut off; if not given, those of the longest right one and 16 more, at most 512."""
    show: int = 0
    """Print so many examples, evenly spread, with all answers to them."""
    html: Path | None = None
    """Write a page with the figures and all answers side by side to this file; an old one is replaced."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self, console: Console) -> None:
        """Print each figure with its interval, and the difference to the base."""
        from jcrosslora.adapter import load_adapter
        from jcrosslora.adapter.ignored import token_update_sentences
        from jcrosslora.checkpoint import open_base
        from jcrosslora.evaluate import answer, read_examples, score
        from jcrosslora.evaluate.tasks import Question

        examples = read_examples(self.task)
        questions = [one for one in examples if isinstance(one, Question)]
        self._check(written=not questions)
        base = open_base(self.base, chat_template=self.template)
        adapters = [load_adapter(ref, base) for group in self.adapter for ref in group]
        notes = [
            f"{adapter.info.name}: {sentence}"
            for adapter in adapters
            for sentence in token_update_sentences(adapter.tokens, "bases are run without it")
        ]
        if questions:
            self._print_scores(score(base, questions[: self.limit], adapters, progress=True), notes, console)
            return
        given: Sequence[Example] = examples[: self.limit]
        answers = answer(base, given, adapters, max_new_tokens=self.max_new_tokens, progress=True)
        self._print_answers(answers, notes, console)

    def _check(self, *, written: bool) -> None:
        """Refuse what cannot be done, before any work."""
        if self.limit is not None and self.limit < 1:
            msg = f"limit {self.limit} is out of range; it must be at least 1"
            raise UsageError(msg)
        if self.show < 0 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            msg = f"show {self.show} with max-new-tokens {self.max_new_tokens} is out of range; wanted 0 or more to "
            msg += "show, and 1 token or more"
            raise UsageError(msg)
        if not written and (self.show or self.html or self.max_new_tokens):
            msg = f"{self.task}: holds questions with choices, which are not answered in writing: leave out --show, "
            msg += '--html and --max-new-tokens, or give lines of {"messages"} or {"prompt", "answer"}'
            raise UsageError(msg)
        if self.html is not None:
            _page_path(self.html)

    def _print_scores(self, scores: "Scores", notes: Sequence[str], console: Console) -> None:
        from jcrosslora.evaluate import FIGURES, print_scores

        if self.json:
            found = {"questions": len(scores.answers), "models": _models(scores, FIGURES)}
            print_json({**found, "not_scored": notes})
            return
        _say_notes(notes, console)
        print_scores(scores, console)

    def _print_answers(self, answers: "Answers", notes: Sequence[str], console: Console) -> None:
        from jcrosslora.evaluate import answers_page, print_answers
        from jcrosslora.evaluate.answers_table import spread
        from jcrosslora.utils.files import write_output

        if self.html is not None:
            page = answers_page(answers).encode()
            write_output(_page_path(self.html), page, "free space, or choose another file")
        if self.json:
            found = {"examples": len(answers.examples), "max_new_tokens": answers.max_new_tokens}
            found |= {"models": _models(answers, answers.figures), "not_scored": notes}
            shown = [_example(answers, place) for place in spread(answers, self.show)]
            print_json(found | ({"answers": shown} if self.show else {}))
            return
        _say_notes(notes, console)
        print_answers(answers, console, show=self.show)
        if self.html is not None:
            say(console, f"written: {self.html}")


def _models(scores: "Scores | Answers", figures: Sequence[str]) -> list[dict[str, Any]]:
    """Give every figure of every model with its interval, and its difference to the base."""
    models: list[dict[str, Any]] = [{"name": name} for name in scores.names]
    for figure in figures:
        found = zip(models, scores.bootstrap(figure), scores.differences(figure), strict=True)
        for place, (model, value, difference) in enumerate(found):
            model[figure] = asdict(value) | ({"minus_base": asdict(difference)} if place else {})
    return models


def _example(answers: "Answers", place: int) -> dict[str, Any]:
    """Give an example with the answer of each model."""
    from jcrosslora.text.completion import prompt_text

    written = [
        {"name": name, "text": texts[place], "ended": bool(ended[place]), "exact": bool(exact[place])}
        for name, texts, ended, exact in zip(
            answers.names, answers.texts, answers.ended, answers.by_example("exact"), strict=True
        )
    ]
    prompt = prompt_text(answers.examples[place].prompt)
    return {"example": place + 1, "prompt": prompt, "right": list(answers.references[place]), "written": written}


def _say_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        say(console, f"not scored: {note}")


def _page_path(path: Path) -> Path:
    """Check that a page can be written, before any work is done for it."""
    from jcrosslora.utils.files import output_path

    path = output_path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        msg = f"{path}: is no name of a page, and may be that of another file: give one that ends in .html"
        raise OutputError(msg)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        msg = f"{path}: cannot be written: wanted a file in a folder that exists and can be written to"
        raise OutputError(msg)
    return path
