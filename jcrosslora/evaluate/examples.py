"""Files of examples: a prompt and its right answer on each line, which adapters are trained on and judged by."""

from pathlib import Path
from typing import Any, TypeAlias

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.tasks import Question, read_lines, read_task
from jcrosslora.text import Completion
from jcrosslora.text.completion import is_text, parse_messages, parse_object, split_answer

# Of a question the right choice is the answer.
Example: TypeAlias = Completion | Question

_KINDS = '{"messages": [...]}, {"prompt", "answer"} or {"question", "choices", "answer": index}'


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
    lines = read_lines(path)
    first = _object(lines[0][1]) if lines else {}
    if "messages" in first:
        return [_conversation(_object(line), f"{path}:{number}") for number, line in lines]
    if "prompt" in first:
        return [_prompted(line, f"{path}:{number}") for number, line in lines]
    if first and "question" not in first:
        msg = f"{path}:{lines[0][0]}: is {ascii(lines[0][1][:60])[1:]}, wanted {_KINDS} on each line"
        raise UsageError(msg)
    return list(read_task(path))


def as_completion(example: Example) -> Completion:
    """Make a completion of an example."""
    if isinstance(example, Completion):
        return example
    return Completion(example.prompt, f" {example.choices[example.answer]}")


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
