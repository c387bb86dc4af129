"""Task files: a question with its choices on each line."""

import codecs
import json
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.errors import UsageError
from jcrosslora.text.completion import is_text
from jcrosslora.utils.reading import read_file
from jcrosslora.utils.texts import shortened

_WANTED = 'wanted {"question": text, "choices": [text, ...], "answer": index}'


@dataclass(frozen=True)
class Question:
    """A question with choices.

    Attributes:
        question: its text.
        choices: the possible answers.
        answer: index of the right choice.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The text in front of " " and a choice."""
        return f"Question: {self.question}\nAnswer:"


def read_task(path: str | Path) -> list[Question]:
    """Read a JSONL file of {"question", "choices", "answer"}; further keys and empty lines are skipped.

    Args:
        path: the file.

    Raises:
        UsageError: the file cannot be read, a line is not such a question, or there is none.
    """
    found = [_parse(line, f"{path}:{number}") for number, line in read_lines(Path(path))]
    if not found:
        msg = f"{path}: holds no question: {_WANTED} on each line"
        raise UsageError(msg)
    return found


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Read the lines of a JSONL file that are not blank, with their numbers from 1; skip a byte order mark in front.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        content = read_file(path)
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}): wanted a JSONL file"
        raise UsageError(msg) from error
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: bytes, place: str) -> Question:
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _refusal(place, "is not UTF-8 JSON") from None
    if not isinstance(entry, dict):
        raise _refusal(place, f"is of type {type(entry).__name__}")
    for key in ("question", "choices", "answer"):
        if key not in entry:
            raise _refusal(place, f"has no {key!r}")
    question, choices, answer = entry["question"], entry["choices"], entry["answer"]
    if not is_text(question):
        raise _refusal(place, f"has the question {shortened(ascii(question))}")
    if not isinstance(choices, list) or not choices or not all(is_text(choice) for choice in choices):
        raise _refusal(place, f"has the choices {shortened(ascii(choices))}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise _refusal(place, f"has the answer {shortened(ascii(answer))} for {len(choices)} choices")
    return Question(question, tuple(choices), answer)


def _refusal(place: str, came: str) -> UsageError:
    return UsageError(f"{place}: {came}, {_WANTED} with texts that are not blank and an index from 0")
