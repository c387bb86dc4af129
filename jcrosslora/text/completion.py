"""A prompt and the answer after it, as plain text or as the messages of a conversation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeGuard, cast, get_args

from jcrosslora.errors import UsageError

Role = Literal["system", "user", "assistant"]
Taught = Literal["nothing", "end", "answer"]
COMPLETIONS = "completions.jsonl"  # the file of completions next to an adapter

_EXPECTED = 'expected {"messages": [{"role": "user", "content": text}, ...]} with roles system, user and assistant'


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


# Plain text up to the answer, or the messages before it, which end with the user's.
Prompt: TypeAlias = str | tuple[Message, ...]
# A prompt as a user gives it: messages may be {"role", "content"}.
Asked: TypeAlias = str | Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True)
class Completion:
    """A prompt with an answer.

    Attributes:
        prompt: text, which the answer follows directly, or messages.
        answer: the text after the prompt; in a conversation, the content of the assistant's message.
        ended: whether the answer is complete rather than cut off.
        origin: where the completion comes from, for reports.
        references: equally good answers; generated text is compared with them and with `answer`.
        taught: what a fit teaches as correct, regardless of the source's predictions: nothing, the end of an answer
            that has ended, or the whole answer and its end.
        greedy: whether the source wrote the answer at temperature 0.
    """

    prompt: Prompt
    answer: str = ""
    ended: bool = True
    origin: str = ""
    references: tuple[str, ...] = ()
    taught: Taught = "nothing"
    greedy: bool = False

    @property
    def text(self) -> str:
        """Prompt and answer, for reports; for a conversation the contents, one per line."""
        if isinstance(self.prompt, str):
            return self.prompt + self.answer
        return f"{prompt_text(self.prompt)}\n{self.answer}"


def is_text(value: Any) -> TypeGuard[str]:
    """Tell whether a JSON value is non-blank text without lone surrogates, which JSON can hold."""
    return isinstance(value, str) and value.strip() != "" and not any("\ud800" <= mark <= "\udfff" for mark in value)


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Read the value of "messages" in a JSON line, a list of {"role", "content"}.

    A content may also be a list of {"type": "text", "text"}. `where` names the line in errors. Raises UsageError if it
    is not such a list, or a content is empty.
    """
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: messages is {ascii(value)[:60]}, {_EXPECTED}")
    found = []
    for entry in value:
        fields = entry if isinstance(entry, dict) else {}
        role, content = fields.get("role"), _content(fields.get("content"))
        if not isinstance(role, str) or role not in get_args(Role) or not is_text(content):
            raise UsageError(f"{where}: a message is {ascii(entry)[:60]}, {_EXPECTED} and texts that are not blank")
        found.append(Message(cast("Role", role), content))
    return tuple(found)


def split_answer(messages: Sequence[Message]) -> tuple[tuple[Message, ...], str | None]:
    """Split messages into those before the assistant's last answer and that answer, None if there is none."""
    if messages and messages[-1].role == "assistant":
        return tuple(messages[:-1]), messages[-1].content
    return tuple(messages), None


def parse_prompt(value: Any, where: str) -> tuple[Message, ...]:
    """Read the value of "messages" as `parse_messages` does, without the assistant's answer at the end."""
    prompt, _ = split_answer(parse_messages(value, where))
    if not prompt:
        raise UsageError(f"{where}: has only an answer, expected a message of the user before it")
    return prompt


def as_prompts(prompts: Asked | Sequence[Asked]) -> list[Prompt]:
    """Return a list of prompts; a single text or the messages of one conversation become one prompt.

    Messages are objects, or mappings as in a JSON line, and are read as by `parse_prompt`.
    """
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Message | Mapping))
    several = cast("Sequence[Asked]", [prompts] if single else prompts)
    return [_as_prompt(one, number) for number, one in enumerate(several, 1)]


def parse_object(line: str) -> dict[str, Any]:
    """Return the JSON object of a line; {} if it is not one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def message_entries(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as the value of "messages" in a JSON line; `parse_messages` reads it."""
    return [{"role": one.role, "content": one.content} for one in messages]


def prompt_text(prompt: Prompt) -> str:
    """Write a prompt as one line of text per message, for reports and for texts that are read without a template."""
    return prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)


def _as_prompt(value: Asked, number: int) -> Prompt:
    if isinstance(value, str):
        return value
    messages = [{"role": one.role, "content": one.content} if isinstance(one, Message) else one for one in value]
    return parse_prompt(messages, f"prompt {number}")


def _content(value: Any) -> Any:
    """Join a content given as several texts; None if a part has no text. Anything else is returned unchanged."""
    parts = value if isinstance(value, list) else []
    if not parts or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return value
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def completion_lines(completions: Iterable[Completion]) -> str:
    """Write one JSON object a line: {"messages"} with the answer as the last one, or {"prompt", "completion"}.

    The completion follows its prompt unchanged, without a space between them. A line has "ended": false if the answer
    was cut off.
    """
    return "".join(f"{json.dumps(_entry(one), ensure_ascii=False)}\n" for one in completions)


def _entry(completion: Completion) -> dict[str, Any]:
    if isinstance(completion.prompt, str):
        entry: dict[str, Any] = {"prompt": completion.prompt, "completion": completion.answer}
    else:
        entry = {"messages": message_entries([*completion.prompt, Message("assistant", completion.answer)])}
    return entry if completion.ended else entry | {"ended": False}
