"""Files of examples: questions with choices, and prompts with their right answers; to train and judge adapters with."""

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jcrosslora.errors import UsageError
from jcrosslora.text import Completion
from jcrosslora.text.completion import is_text, parse_messages, parse_object, split_answer
from jcrosslora.utils.reading import read_file
from jcrosslora.utils.texts import shortened

_QUESTION = 'wanted {"question": text, "choices": [text, ...], "answer": index}'
_KINDS = '{"messages": [...]}, {"prompt", "answer"} or {"question", "choices", "answer": index}'


@dataclass(frozen=True)
class Question:
    """A question with choices."""

    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice

    @property
    def prompt(self) -> str:
        """The text in front of " " and a choice."""
        return f"Question: {self.question}\nAnswer:"


# Of a question the right choice is the answer.
Example: TypeAlias = Completion | Question


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSONL file of examples, all of the kind of its first line.

    Args:
        path: lines of {"messages": [{"role", "content"}, ...]}, the last of them the assistant's; of {"prompt": text,
            "answer": text}, where " " and the answer follow the prompt as it is; or of {"question", "choices",
            "answer"}, as `read_task` takes them. Lines of the first two kinds may have "references", a list of answers
            that are as good.

    Raises:
        UsageError: the file cannot be read, a line is not of that kind, or there is none.
    """
    path = Path(path)
    lines = _read_lines(path)
    first = _object(lines[0][1]) if lines else {}
    if "messages" in first:
        return [_conversation(_object(line), f"{path}:{number}") for number, line in lines]
    if "prompt" in first:
        return [_prompted(line, f"{path}:{number}") for number, line in lines]
    if first and "question" not in first:
        msg = f"{path}:{lines[0][0]}: is {ascii(lines[0][1][:60])[1:]}, wanted {_KINDS} on each line"
        raise UsageError(msg)
    return list(read_task(path))


def read_task(path: str | Path) -> list[Question]:
    """Read a JSONL file of {"question", "choices", "answer"}; further keys and empty lines are skipped.

    Raises:
        UsageError: the file cannot be read, a line is not such a question, or there is none.
    """
    found = [_question(line, f"{path}:{number}") for number, line in _read_lines(Path(path))]
    if not found:
        msg = f"{path}: holds no question: {_QUESTION} on each line"
        raise UsageError(msg)
    return found


def as_completion(example: Example) -> Completion:
    """Make a completion of an example."""
    if isinstance(example, Completion):
        return example
    return Completion(example.prompt, f" {example.choices[example.answer]}")


def _read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Read the lines of a JSONL file that are not blank, with their numbers from 1; skip a byte order mark in front."""
    try:
        content = read_file(path)
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}): wanted a JSONL file"
        raise UsageError(msg) from error
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _question(line: bytes, place: str) -> Question:
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
    return UsageError(f"{place}: {came}, {_QUESTION} with texts that are not blank and an index from 0")


def _conversation(entry: dict[str, Any], place: str) -> Completion:
    prompt, answer = split_answer(parse_messages(entry.get("messages"), place))
    if not prompt or answer is None:
        msg = f"{place}: its messages do not end with an answer of the assistant's behind another message"
        raise UsageError(msg)
    return Completion(prompt, answer, references=_references(entry, place))


def _prompted(line: bytes, place: str) -> Completion:
    entry = _object(line)
    prompt, answer = map(entry.get, ("prompt", "answer"))
    if not is_text(prompt) or not is_text(answer):
        msg = f'{place}: is {ascii(line[:60])[1:]}, wanted {{"prompt": text, "answer": text}} with texts not blank'
        raise UsageError(msg)
    return Completion(prompt, f" {answer}", references=_references(entry, place))


def _references(entry: dict[str, Any], place: str) -> tuple[str, ...]:
    found = entry.get("references", [])
    if not isinstance(found, list) or not all(map(is_text, found)):
        msg = f"{place}: references is {ascii(found)[:60]}, wanted a list of texts that are not blank"
        raise UsageError(msg)
    return tuple(found)


def _object(line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}
