"""A completion as one base reads it: its tokens, and where in the contents each of them ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jcrosslora.checkpoint.tokenizer import Encoded, Tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.text.chat_template import render
from jcrosslora.text.completion import Completion, Message, Prompt


@dataclass(frozen=True, eq=False)
class Reading:
    """The tokens of a completion; T tokens.

    Two bases render a conversation differently, but its contents are the same. A place in them is the number of the
    content and a count of its characters; tokens of two bases that end at the same place predict the same text.

    Attributes:
        ids: int32 (T,), up to the end of the answer, with the token that ends it where the answer has ended.
        content: int32 (T,), number of the content that a token ends in, or just in front of; -1 for tokens of the
            template, for bos and for tokens that end inside a character. Plain text is one content.
        end: int32 (T,), characters of that content up to the end of the token.
        answer: index of the answer's first token, 1 or more.
        stop: whether the last token is the one that ends the answer.
    """

    ids: np.ndarray
    content: np.ndarray
    end: np.ndarray
    answer: int
    stop: bool


def read(tokenizer: Tokenizer, completion: Completion) -> Reading:
    """Tokenize a completion: a conversation by the base's chat template, plain text as it is.

    Raises:
        UsageError: the answer has no token of its own, or the chat template refuses the messages.
        CheckpointError: see `Tokenizer.encode`.
    """
    if isinstance(completion.prompt, str):
        return _read_text(tokenizer, completion.prompt, completion)
    return _read_conversation(tokenizer, completion.prompt, completion)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> np.ndarray:
    """Tokenize a prompt, up to where the answer begins: int32 (T,)."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt).ids
    return tokenizer.encode(render(tokenizer, prompt, ask=True).text, special=False).ids


def ending(tokenizer: Tokenizer, *, chat: bool) -> int | None:
    """Find the token that ends an answer: in a conversation the one behind the assistant's message, else eos.

    Returns:
        Its id; None where the base has no token that ends a text.
    """
    return _turn_end(tokenizer) if chat else tokenizer.eos


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Tokenizer) -> int | None:
    messages = Message("user", "Question"), Message("assistant", "Answer")
    rendered = render(tokenizer, messages)
    behind = tokenizer.encode(rendered.text[rendered.spans[1][1] :].lstrip(), special=False).ids
    return int(behind[0]) if len(behind) and behind[0] in tokenizer.stops else tokenizer.eos


def _read_text(tokenizer: Tokenizer, prompt: str, completion: Completion) -> Reading:
    found = tokenizer.encode(prompt + completion.answer)
    content, end = np.where(found.ends > 0, 0, -1), np.maximum(found.ends, 0)
    return _reading(tokenizer, found, content, end, len(prompt), completion)


def _read_conversation(tokenizer: Tokenizer, prompt: tuple[Message, ...], completion: Completion) -> Reading:
    asked = render(tokenizer, prompt, ask=True)
    begin = len(asked.text)
    # The answer follows the generation prompt, as it does when it is written.
    found = tokenizer.encode(asked.text + completion.answer, special=False)
    content, end = np.full(len(found.ids), -1, np.int32), np.zeros(len(found.ids), np.int32)
    for number, ((first, last), skipped) in enumerate(zip(asked.spans, asked.skipped, strict=True)):
        # The text behind a content that is not the answer is the template's.
        inside = (found.ends >= first) & (found.ends < last)
        content[inside], end[inside] = number, found.ends[inside] - first + skipped
    answer = found.ends >= begin
    content[answer], end[answer] = len(prompt), found.ends[answer] - begin
    return _reading(tokenizer, found, content, end, begin, completion)


def _reading(
    tokenizer: Tokenizer, found: Encoded, content: np.ndarray, end: np.ndarray, begin: int, completion: Completion
) -> Reading:
    """Find the answer's first token, the one behind character `begin` of the text, and add the one that ends it."""
    own = np.flatnonzero(found.ends > begin)
    if not own.size:
        msg = f"{tokenizer.ref}: the answer {completion.answer[:40]!r} has no token of its own: give a longer one"
        raise UsageError(msg)
    first = int(own[0])
    while first > 1 and found.ends[first - 1] < 0:  # a token that ends inside the answer's first character
        first -= 1
    ids = found.ids
    last = ending(tokenizer, chat=not isinstance(completion.prompt, str)) if completion.ended else None
    if last is not None:
        ids, content, end = np.append(ids, last), np.append(content, -1), np.append(end, 0)
    arrays = (each.astype(np.int32) for each in (ids, content, end))
    return Reading(*arrays, answer=max(1, first), stop=last is not None)
