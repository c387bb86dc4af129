"""Training examples: a prompt and the answer that should follow it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Question, read_task
from jcrosslora.evaluate.tasks import read_lines
from jcrosslora.text import Completion, read
from jcrosslora.text.completion import is_text, parse_messages, split_answer

# Of a question the right choice is the answer.
Example: TypeAlias = Completion | Question


@dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of an example.

    Attributes:
        ids: int32 (T,), prompt and answer, with the token that ends the answer.
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


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSONL file of examples, all of the kind of its first line.

    Args:
        path: lines of {"messages": [{"role", "content"}, ...]}, the last of them the assistant's; of {"prompt": text,
            "answer": text}, where " " and the answer follow the prompt as it is; or of {"question", "choices",
            "answer"}, as `read_task` takes them.

    Raises:
        UsageError: the file cannot be read, a line is not of that kind, or there is none.
    """
    path = Path(path)
    lines = read_lines(path)
    first = _object(lines[0][1]) if lines else {}
    if "messages" in first:
        return [_conversation(line, f"{path}:{number}") for number, line in lines]
    if "prompt" in first:
        return [_prompted(line, f"{path}:{number}") for number, line in lines]
    return list(read_task(path))


def as_completion(example: Example) -> Completion:
    """Make a completion of an example."""
    if isinstance(example, Completion):
        return example
    return Completion(example.prompt, f" {example.choices[example.answer]}")


def encode(tokenizer: Tokenizer, example: Example) -> Encoded:
    """Tokenize a prompt and its right answer.

    Raises:
        UsageError: the answer has no token of its own, or the base's chat template refuses the messages.
    """
    found = read(tokenizer, as_completion(example))
    return Encoded(found.ids, found.answer)


def digest(examples: Sequence[Encoded]) -> str:
    """Return the SHA-256 (hex) of the tokens of all examples in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.array([len(example.ids), example.first], "<i8").tobytes())
        found.update(example.ids.astype("<i4").tobytes())
    return found.hexdigest()


def _conversation(line: bytes, place: str) -> Completion:
    prompt, answer = split_answer(parse_messages(_object(line).get("messages"), place))
    if not prompt or answer is None:
        msg = f"{place}: its messages do not end with an answer of the assistant's behind another message"
        raise UsageError(msg)
    return Completion(prompt, answer)


def _prompted(line: bytes, place: str) -> Completion:
    prompt, answer = map(_object(line).get, ("prompt", "answer"))
    if not is_text(prompt) or not is_text(answer):
        msg = f'{place}: is {ascii(line[:60])[1:]}, wanted {{"prompt": text, "answer": text}} with texts not blank'
        raise UsageError(msg)
    return Completion(prompt, f" {answer}")


def _object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; {} where it is not one."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
