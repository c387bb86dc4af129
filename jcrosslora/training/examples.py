"""Examples to train on: a prompt and the answer that is to follow it."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Question, read_task
from jcrosslora.evaluate.pairs import tokenize
from jcrosslora.evaluate.tasks import read_lines


@dataclass(frozen=True)
class Prompted(Question):
    """A question whose text is the whole prompt, for answers that are written, not chosen."""

    @property
    def prompt(self) -> str:
        """The text itself."""
        return self.question


@dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of an example.

    Attributes:
        ids: int32 (T,), prompt and answer.
        first: index of the answer's first token, 1 or more.
    """

    ids: np.ndarray
    first: int

    @property
    def length(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def answer(self) -> int:
        """Number of the answer's tokens."""
        return len(self.ids) - self.first


def read_examples(path: str | Path) -> list[Question]:
    """Read a JSONL file whose lines are all of the kind of its first one.

    Args:
        path: lines of {"question", "choices", "answer"}, as `read_task` takes them, or of {"prompt": text,
            "answer": text}, where " " and the answer follow the prompt as it is.

    Raises:
        UsageError: the file cannot be read, a line is of no such kind, or there is none.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines or "prompt" not in _object(lines[0][1]):
        return list(read_task(path))
    return [_prompted(line, f"{path}:{number}") for number, line in lines]


def encode(tokenizer: Tokenizer, question: Question) -> Encoded:
    """Tokens of a prompt and its right answer, split where `evaluate` splits them.

    Raises:
        UsageError: the answer has no token of its own.
    """
    answer = question.choices[question.answer]
    found = tokenize(tokenizer, dataclasses.replace(question, choices=(answer,), answer=0))
    return Encoded(np.concatenate([found.prefix, found.tails[0]]), len(found.prefix) + found.scored[0])


def digest(examples: Sequence[Encoded]) -> str:
    """SHA-256, in hex, of the tokens of all examples in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.array([len(example.ids), example.first], "<i8").tobytes())
        found.update(example.ids.astype("<i4").tobytes())
    return found.hexdigest()


def _lines(path: Path) -> list[tuple[int, bytes]]:
    try:
        return read_lines(path)
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}): wanted a JSONL file of examples"
        raise UsageError(msg) from error


def _prompted(line: bytes, place: str) -> Prompted:
    prompt, answer = map(_object(line).get, ("prompt", "answer"))
    if not _is_text(prompt) or not _is_text(answer):
        msg = f'{place}: is {ascii(line[:60])[1:]}, wanted {{"prompt": text, "answer": text}} with texts not blank'
        raise UsageError(msg)
    return Prompted(prompt, (answer,), 0)


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where it is none."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _is_text(value: Any) -> TypeGuard[str]:
    # Half a surrogate pair can be written in JSON, but is no text.
    return isinstance(value, str) and value.strip() != "" and not any("\ud800" <= mark <= "\udfff" for mark in value)
