"""Render a conversation with a chat template, and tokenize a completion for one base, with the end of each token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.text.completion import Completion, Message, Prompt

# For bases without a chat template. As in nearly all templates, contents are on separate lines, so that they begin with
# the same tokens as in other bases.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
# Placeholder for contents while finding the text around them; templates do not use these private characters.
_MARK = "\ue000{}\ue001"


@dataclass(frozen=True, eq=False)
class Reading:
    """The tokens of a completion; T tokens.

    Two bases render a conversation differently, but its contents are the same. A place in them is the number of the
    content and a count of its characters; tokens of two bases that end at the same place predict the same text.

    Attributes:
        ids: int32 (T,), up to the end of the answer, with its stop token if the answer has ended.
        content: int32 (T,), number of the content that a token ends in, or just before; -1 for tokens of the
            template, for bos and for tokens that end inside a character. Plain text is one content.
        end: int32 (T,), characters of that content up to the end of the token.
        answer: index of the answer's first token, 1 or more.
        stop: whether the last token is the answer's stop token.
    """

    ids: np.ndarray
    content: np.ndarray
    end: np.ndarray
    answer: int
    stop: bool

    @property
    def answer_tokens(self) -> int:
        """Number of the answer's tokens, including its stop token."""
        return len(self.ids) - self.answer


def read(tokenizer: Tokenizer, completion: Completion) -> Reading:
    """Tokenize a completion: a conversation with the base's chat template, plain text unchanged.

    Raises UsageError if the answer has no separate token, or the chat template refuses the messages.
    """
    prompt, answer = completion.prompt, completion.answer
    chat = not isinstance(prompt, str)
    if isinstance(prompt, str):
        begin, found = len(prompt), tokenizer.encode(prompt + answer)
        content, end = np.where(found.ends > 0, 0, -1), np.maximum(found.ends, 0)
    else:
        asked = render(tokenizer, prompt, ask=True)
        # The answer follows the generation prompt, as in generation.
        begin, found = len(asked.text), tokenizer.encode(asked.text + answer, special=False)
        content, end = _places(asked, found.ends)
    own = np.flatnonzero(found.ends > begin)
    if not own.size:
        raise UsageError(f"{tokenizer.ref}: the answer {answer[:40]!r} has no separate token: give a longer one")
    first = int(own[0])
    while first > 1 and found.ends[first - 1] < 0:  # a token that ends inside the answer's first character
        first -= 1
    ids, last = found.ids, ending(tokenizer, chat=chat) if completion.ended else None
    if last is not None:
        ids, content, end = np.append(ids, last), np.append(content, -1), np.append(end, 0)
    arrays = (each.astype(np.int32) for each in (ids, content, end))
    return Reading(*arrays, answer=max(1, first), stop=last is not None)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> np.ndarray:
    """Tokenize a prompt, up to where the answer begins: int32 (T,)."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt).ids
    return tokenizer.encode(render(tokenizer, prompt, ask=True).text, special=False).ids


def last_tokens(tokenizer: Tokenizer, ids: np.ndarray, most: int) -> np.ndarray:
    """Cut a text, int32 (T,), to its last tokens if it has more than `most`.

    A BOS token stays in front: without it some models, such as Gemma, write nonsense.
    """
    if len(ids) <= most:
        return ids
    begun = int(ids[0] == begin_of(tokenizer))
    return np.concatenate([ids[:begun], ids[len(ids) - most + begun :]])


def begin_of(tokenizer: Tokenizer) -> int | None:
    """Return the BOS token id of a base or of its chat template; None if there is none."""
    return tokenizer.backend.token_to_id(tokenizer.bos_name) if tokenizer.bos is None else tokenizer.bos


def ending(tokenizer: Tokenizer, *, chat: bool) -> int | None:
    """Return the id of the stop token of an answer: in a chat the one after the assistant's message, otherwise EOS.

    None if the base has no stop token.
    """
    return _turn_end(tokenizer) if chat else tokenizer.eos


@dataclass(frozen=True)
class Rendered:
    """A conversation as one base reads it.

    Attributes:
        text: the whole text, special tokens by their names.
        spans: first character and end of each message's content in the text.
        skipped: number of leading whitespace characters of each content that the template drops.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    skipped: tuple[int, ...]


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool = False) -> Rendered:
    """Render messages with the chat template of a base, or `PLAIN_TEMPLATE` if it has none.

    The text is the same as from transformers' `apply_chat_template`. `ask` adds the generation prompt. Raises
    UsageError if the template refuses the messages, or changes a content beyond stripping space.
    """
    contents = [message.content for message in messages]
    text = _rendered(tokenizer, messages, contents, ask)
    marks = [_MARK.format(place) for place in range(len(messages))]
    around = [_rendered(tokenizer, messages, marks, ask)]  # the texts before, between and after the contents
    for mark in marks:
        before, _, rest = around.pop().partition(mark)
        around += [before, rest]
    spans = _spans(text, contents, around)
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


def with_own_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """Return the tokenizer with another chat template, e.g. an adapter's, or unchanged if it is None."""
    if template is None:
        return tokenizer
    return replace(tokenizer, chat_template=template, ref=f"{tokenizer.ref} with the adapter's chat_template.jinja")


def tokenizer_of(base: BaseModel, template: str | None) -> Tokenizer:
    """Return the base's tokenizer with an adapter's chat template, unless the user gave the base one.

    Raises CheckpointError if the base has no tokenizer, or it cannot be read.
    """
    return with_own_template(load_tokenizer(base), template if base.chat_template is None else None)


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Tokenizer) -> int | None:
    messages = Message("user", "Question"), Message("assistant", "Answer")
    rendered = render(tokenizer, messages)
    behind = tokenizer.encode(rendered.text[rendered.spans[1][1] :].lstrip(), special=False).ids
    return int(behind[0]) if len(behind) and behind[0] in tokenizer.stops else tokenizer.eos


def _places(asked: Rendered, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the content in which each token ends, -1 for template tokens, and its characters up to that end."""
    content, end = np.full(len(ends), -1, np.int32), np.zeros(len(ends), np.int32)
    for number, ((first, last), skipped) in enumerate(zip(asked.spans, asked.skipped, strict=True)):
        # The text after a content that is not the answer is the template's.
        inside = (ends >= first) & (ends < last)
        content[inside], end[inside] = number, ends[inside] - first + skipped
    answer = ends >= len(asked.text)
    content[answer], end[answer] = len(asked.spans), ends[answer] - len(asked.text)
    return content, end


def _spans(text: str, contents: Sequence[str], around: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Return the span of each content; None if the text is not the contents with the texts around them."""
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

    shown = [{"role": one.role, "content": content} for one, content in zip(messages, contents, strict=True)]
    names: dict[str, Any] = {"bos_token": tokenizer.bos_name, "eos_token": tokenizer.eos_name}
    try:
        return run_template(
            template_of(tokenizer), shown, add_generation_prompt=ask, tools=None, documents=None, **names
        )
    except Exception as error:  # a template is untrusted code and may raise anything
        cause = f"{type(error).__name__}: {' '.join(str(error)[:400].split())[:200]}"
        roles = ", ".join(message.role for message in messages)
        msg = f"{tokenizer.ref}: its chat template refuses messages of {roles} ({cause}): give another with --template"
        raise UsageError(msg) from error
