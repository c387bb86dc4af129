"""Sample prompts where prompts may begin: at turns of a chat template, and at the beginning of plain texts."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.distill.sources import Source
from jcrosslora.distill.templates import TEMPLATES, without_bos
from jcrosslora.errors import UsageError
from jcrosslora.text import Message, Prompt, render
from jcrosslora.utils.progress import Track

ANSWER_TOKENS = 48  # of a plain text, after its prompt
_SYSTEMS = 16  # system prompts, which many messages share
_COMMON = 0.75  # share of plain texts that have the line before the answer
_LINE = re.compile(r"(?:\A|\n+)[^\n:]{1,40}:\n?")  # such as "Answer:"
FIRST_WORDS = (  # of common plain formats, for bases without a token that begins a text
    *(template.before.strip() for template in TEMPLATES),
    *("Text:", "Human:", "Context:", "Command:", "Message:", "Query:", "Request:", "Title:", "Sentence:", "Document:"),
)
_SYSTEM, _QUESTION = Message("system", "Instruction"), Message("user", "Question")


class Draft(NamedTuple):
    """A prompt that was sampled.

    Attributes:
        before: the text that it follows.
        text: what was sampled.
        prompt: the two as a prompt.
        ended: whether the prompt is complete.
    """

    before: str
    text: str
    prompt: Prompt
    ended: bool


class Opening(Protocol):
    """Samples prompts of at most `most` tokens where prompts may begin."""

    def __call__(  # noqa: D102
        self, source: Source, count: int, key: jax.Array, most: int, bar: Track | None = None
    ) -> list[Draft]: ...


def chat_openings(tokenizer: Tokenizer) -> dict[str, Opening]:
    """Return the turns of the chat template where a prompt may begin, by their names."""
    found: dict[str, Opening] = {}
    if _turn_ends(tokenizer, (_QUESTION,)):
        found["the user's turn of its chat template"] = _user_turns
        if _turn_ends(tokenizer, (_SYSTEM, _QUESTION)):
            found["the system's turn of its chat template"] = _system_turns
    return found


def plain_openings(firsts: Sequence[str]) -> dict[str, Opening]:
    """Return openings of plain texts that begin with some words, by their names."""
    named = {first: f"texts that begin with {first!r}" if first else "the beginning of a text" for first in firsts}
    return {name: partial(_plain_texts, first) for first, name in named.items()}


def begin(tokenizer: Tokenizer) -> str:
    """Return the text that a new text follows; writers add the token that begins a text themselves."""
    return "" if tokenizer.bos is not None else tokenizer.eos_name


def asked(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """Return the text that an answer to a prompt follows, without the token that begins a text."""
    if isinstance(prompt, str):
        return prompt
    return without_bos(tokenizer, render(tokenizer, prompt, ask=True).text)


def cut_at_line(texts: Sequence[str]) -> list[str | None]:
    """Cut texts where their answers begin: after the last line up to a colon that most of them have, as "Answer:".

    If such a line comes again, the next prompt begins there. A text without such a line gives None.
    """
    found = [[(one[0].strip(), one.end()) for one in _LINE.finditer(text)] for text in texts]
    common = Counter(line for lines in found for line in {name for name, _ in lines})
    known = {line for line, times in common.items() if times >= _COMMON * len(texts)}
    cut = list[str | None]()
    for text, lines in zip(texts, found, strict=True):
        first: dict[str, int] = {}
        for name, end in lines:
            if name in first:
                break
            first[name] = end
        ends = [end for name, end in first.items() if name in known and end > len(name) + 1]
        cut.append(text[: max(ends)] if ends else None)
    return cut


def _user_turns(source: Source, count: int, key: jax.Array, most: int, bar: Track | None = None) -> list[Draft]:
    """Sample messages of the user, after the system prompt that the template adds, if any."""
    return _messages(source, [()] * count, key, most, bar)


def _system_turns(source: Source, count: int, key: jax.Array, most: int, bar: Track | None = None) -> list[Draft]:
    """Sample system prompts, and messages of the user after them; many messages share a few system prompts."""
    before = _before(source.tokenizer, (_SYSTEM, _QUESTION), 0)
    written = source.write([before] * min(count, _SYSTEMS), most, 1.0, key)
    systems = [(Message("system", one.text.strip()),) for one in written if one.ended and one.text.strip()]
    systems = (systems * count)[: count * len(systems) // len(written)]
    found = []
    for draft in _messages(source, systems, jax.random.fold_in(key, 1), most, bar):
        user = draft.prompt[-1:]
        # The template may add this system prompt itself.
        usual = asked(source.tokenizer, user) == asked(source.tokenizer, draft.prompt)
        text = (draft.before + draft.text)[len(before) :]
        found.append(Draft(before, text, user if usual else draft.prompt, draft.ended))
    return found


def _plain_texts(
    first: str, source: Source, count: int, key: jax.Array, most: int, bar: Track | None = None
) -> list[Draft]:
    """Sample whole texts that begin with `first`, and cut them after the line before the answer."""
    before = begin(source.tokenizer) + first
    written = source.write([before] * count, most + ANSWER_TOKENS, 1.0, key, bar=bar)
    texts = [first + one.text for one in written]
    return [
        Draft(before, (cut or text).removeprefix(first), cut or text, cut is not None)
        for text, cut in zip(texts, cut_at_line(texts), strict=True)
    ]


def _messages(
    source: Source, systems: Sequence[tuple[Message, ...]], key: jax.Array, most: int, bar: Track | None
) -> list[Draft]:
    """Sample a message of the user after each of some system prompts, none or one message each."""
    starts = [_before(source.tokenizer, (*system, _QUESTION), len(system)) for system in systems]
    written = source.write(starts, most, 1.0, key, bar=bar) if starts else []
    return [
        Draft(before, one.text, (*system, Message("user", one.text.strip())), one.ended)
        for before, system, one in zip(starts, systems, written, strict=True)
        if one.text.strip()
    ]


def _before(tokenizer: Tokenizer, messages: tuple[Message, ...], number: int) -> str:
    """Return the text before the content of a message, without the token that begins a text."""
    rendered = render(tokenizer, messages, ask=True)
    return without_bos(tokenizer, rendered.text[: rendered.spans[number][0]])


def _turn_ends(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> bool:
    """Whether a chat template accepts the messages, and ends the first with a stop token."""
    if tokenizer.chat_template is None:
        return False
    try:
        rendered = render(tokenizer, messages, ask=True)
    except UsageError:
        return False
    behind = tokenizer.encode(rendered.text[rendered.spans[0][1] :], special=False).ids
    return behind.size > 0 and int(behind[0]) in tokenizer.stops
