"""Training examples: a prompt and the answer that should follow it."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Question, read_task
from jcrosslora.evaluate.question_batches import tokenize
from jcrosslora.evaluate.tasks import is_text, read_lines


@dataclass(frozen=True)
class Prompted(Question):
    """A question whose text is the whole prompt, for answers that are written and not chosen."""

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
    """Read a JSONL file of examples, all of the kind of its first line.

    Args:
        path: lines of {"question", "choices", "answer"}, as `read_task` takes them, or of {"prompt": text,
            "answer": text}, where " " and the answer follow the prompt as it is.

    Raises:
        UsageError: the file cannot be read, a line is not of that kind, or there is none.
    """
    path = Path(path)
    lines = read_lines(path)
    if not lines or "prompt" not in _object(lines[0][1]):
        return list(read_task(path))
    return [_prompted(line, f"{path}:{number}") for number, line in lines]


def encode(tokenizer: Tokenizer, question: Question) -> Encoded:
    """Tokenize a prompt and its right answer, split where `evaluate` splits them.

    Raises:
        UsageError: the answer has no token of its own.
    """
    answer = question.choices[question.answer]
    found = tokenize(tokenizer, dataclasses.replace(question, choices=(answer,), answer=0))
    return Encoded(np.concatenate([found.prefix, found.tails[0]]), len(found.prefix) + found.scored[0])


def digest(examples: Sequence[Encoded]) -> str:
    """Return the SHA-256 (hex) of the tokens of all examples in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.array([len(example.ids), example.first], "<i8").tobytes())
        found.update(example.ids.astype("<i4").tobytes())
    return found.hexdigest()


def _prompted(line: bytes, place: str) -> Prompted:
    prompt, answer = map(_object(line).get, ("prompt", "answer"))
    if not is_text(prompt) or not is_text(answer):
        msg = f'{place}: is {ascii(line[:60])[1:]}, wanted {{"prompt": text, "answer": text}} with texts not blank'
        raise UsageError(msg)
    return Prompted(prompt, (answer,), 0)


def _object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; {} where it is not one."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
