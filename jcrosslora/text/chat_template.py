"""Render conversations by a chat template, and find the contents of the messages in the rendered text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.text.completion import Message

# For bases without a chat template of their own. Contents stand on lines of their own, as in nearly all templates, so
# that their first tokens are those of other bases.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)

# Stand for contents while the text around them is found; templates have no use for these private characters.
_MARK = "\ue000{}\ue001"


@dataclass(frozen=True)
class Rendered:
    """A conversation as one base reads it.

    Attributes:
        text: all of it, special tokens by their names.
        spans: first character and end of each message's content in the text.
        skipped: characters of space at the beginning of each content that the template drops.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    skipped: tuple[int, ...]


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool = False) -> Rendered:
    """Render messages by the chat template of a base; `PLAIN_TEMPLATE` if it has none.

    The text is what `apply_chat_template` of transformers gives.

    Args:
        tokenizer: of the base.
        messages: at least one.
        ask: whether to end with what stands in front of an answer (the generation prompt).

    Raises:
        UsageError: the template refuses the messages, or changes a content beyond stripping space.
    """
    contents = [message.content for message in messages]
    text = _rendered(tokenizer, messages, contents, ask)
    spans = _spans(text, contents, _around(tokenizer, messages, ask))
    if spans is None:
        msg = f"{tokenizer.ref}: its chat template does not keep the messages as they are "
        msg += f"({contents[0][:40]!r}, ...): give another with --template"
        raise UsageError(msg)
    skipped = [
        0 if text.startswith(content, first) else len(content) - len(content.lstrip())
        for content, (first, _) in zip(contents, spans, strict=True)
    ]
    return Rendered(text, spans, tuple(skipped))


def template_of(tokenizer: Tokenizer) -> str:
    """Return the source of the template that `render` uses."""
    return tokenizer.chat_template or PLAIN_TEMPLATE


def _around(tokenizer: Tokenizer, messages: Sequence[Message], ask: bool) -> list[str]:
    """Find the texts in front of, between and behind the contents."""
    marks = [_MARK.format(place) for place in range(len(messages))]
    rest, found = _rendered(tokenizer, messages, marks, ask), []
    for mark in marks:
        before, _, rest = rest.partition(mark)
        found.append(before)
    return [*found, rest]


def _spans(text: str, contents: Sequence[str], around: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Walk along the text; None where it is not made of the contents and of what stands around them."""
    spans, place = [], 0
    for before, content, behind in zip(around, contents, around[1:], strict=False):
        if not text.startswith(before, place):
            return None
        place += len(before)
        shown = next((one for one in (content, content.strip()) if text.startswith(one + behind, place)), None)
        if shown is None:
            return None
        spans.append((place, place + len(shown)))
        place += len(shown)
    return tuple(spans) if text[place:] == around[-1] else None


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], contents: Sequence[str], ask: bool) -> str:
    from jcrosslora.text.sandbox import run_template

    names: dict[str, Any] = {"bos_token": tokenizer.bos_name, "eos_token": tokenizer.eos_name}
    names |= {"add_generation_prompt": ask, "tools": None, "documents": None}
    names["messages"] = [
        {"role": message.role, "content": content} for message, content in zip(messages, contents, strict=True)
    ]
    try:
        return run_template(template_of(tokenizer), **names)
    except Exception as error:  # a template is a program of somebody else's, which may raise anything
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        roles = ", ".join(message.role for message in messages)
        msg = f"{tokenizer.ref}: its chat template refuses messages of {roles} ({cause}): give another with --template"
        raise UsageError(msg) from error
