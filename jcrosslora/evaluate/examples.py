"""Read the user's files: examples (questions with choices, prompts with right answers), and plain texts or prompts."""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jcrosslora.errors import UsageError
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.completion import is_text, parse_messages, parse_object, parse_prompt, prompt_text, split_answer
from jcrosslora.utils.files import read_file
from jcrosslora.utils.texts import shortened

_QUESTION = 'expected {"question": text, "choices": [text, ...], "answer": index}'
_KINDS = '{"messages": [...]}, {"prompt", "answer"} or {"question", "choices", "answer": index}'
_BOM = "\ufeff"
_JSON_LINES = (".jsonl", ".ndjson")
_PROMPT_KEYS = ("messages", "prompt", "text")


@dataclass(frozen=True)
class Question:
    """A question with choices."""

    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice

    @property
    def prompt(self) -> str:
        """The text before " " and a choice."""
        return f"Question: {self.question}\nAnswer:"


# The answer of a question is its right choice.
Example: TypeAlias = Completion | Question


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSONL file of examples, all of the same kind as its first line.

    Args:
        path: lines of {"messages": [{"role", "content"}, ...]}, the last one from the assistant; of {"prompt": text,
            "answer": text}, where " " and the answer follow the prompt unchanged; or of {"question", "choices",
            "answer"}, see `read_task`. Lines of the first two kinds may have "references", a list of equally good
            answers.

    Raises:
        UsageError: the file cannot be read or has no example, or a line is of another kind.
    """
    path = Path(path)
    lines = _read_lines(path)
    first = _object(lines[0][1]) if lines else {}
    if "messages" in first:
        return [_conversation(_object(line), f"{path}:{number}") for number, line in lines]
    if "prompt" in first:
        return [_prompted(_object(line), ascii(line[:60])[1:], f"{path}:{number}") for number, line in lines]
    if lines and "question" not in first:
        raise UsageError(f"{path}:{lines[0][0]}: is {ascii(lines[0][1][:60])[1:]}, expected {_KINDS} on each line")
    return list(read_task(path))


def parse_examples(entries: Sequence[Any]) -> list[Example]:
    """Parse a list of examples, or of mappings like the first two kinds of line in `read_examples`.

    Raises:
        UsageError: an entry is neither.
    """
    return [
        one if isinstance(one, Completion | Question) else _parsed(one, f"example {number}")
        for number, one in enumerate(entries)
    ]


def _parsed(entry: Any, where: str) -> Completion:
    if isinstance(entry, Mapping) and "messages" in entry:
        return _conversation(dict(entry), where)
    return _prompted(dict(entry) if isinstance(entry, Mapping) else {}, shortened(ascii(entry)), where)


def read_task(path: str | Path) -> list[Question]:
    """Read a JSONL file of {"question", "choices", "answer"}; further keys and empty lines are skipped.

    Raises:
        UsageError: the file cannot be read or has no question, or a line is not such a question.
    """
    found = [_question(line, f"{path}:{number}") for number, line in _read_lines(Path(path))]
    if not found:
        raise UsageError(f"{path}: holds no question: {_QUESTION} on each line")
    return found


def as_completion(example: Example) -> Completion:
    """Convert an example to a completion."""
    if isinstance(example, Completion):
        return example
    return Completion(example.prompt, f" {example.choices[example.answer]}")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read the user's prompts; answers in the file are not used.

    Args:
        path: a UTF-8 file. If its name ends in .jsonl or .ndjson, each line is a JSON object with a string "text" or
            "prompt", or with "messages", [{"role", "content"}, ...], whose last answer is dropped; otherwise each line
            is a text. Blank lines are skipped.

    Raises:
        UsageError: the file is missing, unreadable, not text or empty, or a line has the wrong form; or a file without
            such a name holds only JSON prompts.
    """
    path = Path(path)
    return parse_prompts(_read(path), str(path), json_lines=path.suffix.lower() in _JSON_LINES)


def parse_prompts(text: str, name: str, *, json_lines: bool) -> list[Prompt]:
    """Parse the prompts in the text of a file, see `read_prompts`.

    `name` is the file's name for errors.

    Raises:
        UsageError: there is no prompt, or a line has the wrong form.
    """
    lines = text.removeprefix(_BOM).split("\n")
    found: list[Prompt]
    if json_lines:
        found = [_prompt_of(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        if any(map(str.strip, lines)) and all(_is_json_prompt(line) for line in lines if line.strip()):
            msg = f"{name}: holds a JSON object on each line, but would be read as plain text: rename it "
            raise UsageError(
                msg + 'to .jsonl, or write prompts that are JSON themselves as {"prompt": ...} in such a file'
            )
        found = [line.removesuffix("\r") for line in lines]
    prompts = [prompt for prompt in found if prompt_text(prompt).strip()]
    if not prompts:
        raise UsageError(f"{name}: holds no text, expected at least one line: write one text a line")
    return prompts


def _read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Read the non-blank lines of a JSONL file, with their numbers from 1; skip a byte order mark."""
    lines = _bytes(path, "expected a JSONL file").removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _question(line: bytes, where: str) -> Question:
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _refusal(where, "is not UTF-8 JSON") from None
    if not isinstance(entry, dict):
        raise _refusal(where, f"is of type {type(entry).__name__}")
    for key in ("question", "choices", "answer"):
        if key not in entry:
            raise _refusal(where, f"has no {key!r}")
    question, choices, answer = entry["question"], entry["choices"], entry["answer"]
    if not is_text(question):
        raise _refusal(where, f"has the question {shortened(ascii(question))}")
    if not isinstance(choices, list) or not choices or not all(is_text(choice) for choice in choices):
        raise _refusal(where, f"has the choices {shortened(ascii(choices))}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise _refusal(where, f"has the answer {shortened(ascii(answer))} for {len(choices)} choices")
    return Question(question, tuple(choices), answer)


def _refusal(where: str, came: str) -> UsageError:
    return UsageError(f"{where}: {came}, {_QUESTION} with texts that are not blank and an index from 0")


def _conversation(entry: dict[str, Any], where: str) -> Completion:
    prompt, answer = split_answer(parse_messages(entry.get("messages"), where))
    if not prompt or answer is None:
        raise UsageError(f"{where}: its messages do not end with an answer of the assistant after another message")
    return Completion(prompt, answer, references=_references(entry, where))


def _prompted(entry: Mapping[str, Any], shown: str, where: str) -> Completion:
    prompt, answer = map(entry.get, ("prompt", "answer"))
    if not is_text(prompt) or not is_text(answer):
        raise UsageError(f'{where}: is {shown}, expected {{"prompt": text, "answer": text}} with texts not blank')
    return Completion(prompt, f" {answer}", references=_references(entry, where))


def _references(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = entry.get("references", [])
    if not isinstance(found, list) or not all(map(is_text, found)):
        raise UsageError(f"{where}: references is {ascii(found)[:60]}, expected a list of texts that are not blank")
    return tuple(found)


def _object(line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}


def _bytes(path: Path, wanted: str) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): {wanted}") from error


def _read(path: Path) -> str:
    try:
        text = _bytes(path, "name a file with one text a line").decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8 with one text a line"
        raise UsageError(msg) from error
    if "\0" in text:
        raise UsageError(f"{path}: is a binary file, expected UTF-8 text: name a file with one text a line")
    return text


def _is_json_prompt(line: str) -> bool:
    """Return whether a line of a plain text file is a JSON prompt."""
    return not parse_object(line).keys().isdisjoint(_PROMPT_KEYS)


def _prompt_of(line: str, where: str) -> Prompt:
    entry = parse_object(line)
    if "messages" in entry:
        return parse_prompt(entry["messages"], where)
    text = entry.get("text", entry.get("prompt"))
    if not isinstance(text, str):
        msg = f'{where}: is not a JSON object with a string "text": write {{"text": "..."}} on each line, '
        raise UsageError(msg + '{"prompt": "..."} or {"messages": [...]}')
    if not _is_utf8(text):
        raise UsageError(f"{where}: the text has half of a surrogate pair: write whole characters")
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
