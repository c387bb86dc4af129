"""Further prompts like given ones: what differs between them is written anew, inside what they have in common.

A few hundred prompts do not show all that an adapter can do: of 77 kinds of request, 200 prompts hold some only once or
not at all. The base, which sees a few of them, writes others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.distill.sources.protocol import Writer
from jcrosslora.distill.task_search import list_prompts, write_lines
from jcrosslora.text import Completion, Prompt
from jcrosslora.utils.progress import Track

SIMILAR = "similar"
FEWEST, _SHOWN = 8, 8  # different prompts to go by, and how many of them stand in front of each new one
_MOST_TOKENS, _PERCENTILE = 128, 95  # of what differs
_LINES = 0.9  # share of prompts in which that is a single line


@dataclass(frozen=True)
class SharedForm:
    """What given prompts have in common, and what differs between them.

    Attributes:
        prompts: the given ones, each once.
        before: what all of them begin with; of conversations, what their last messages begin with.
        after: what all of them end with, likewise.
        differing: the line between the two, of each prompt that has a single one there.
        tokens: the most tokens of such a line.
    """

    prompts: tuple[Prompt, ...]
    before: str
    after: str
    differing: tuple[str, ...]
    tokens: int

    def write(self, base: Writer, count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        """Write at most `count` prompts of this form that resemble the given ones, without near-duplicates."""
        if not count:
            return []
        listed = list_prompts(self.differing, count, seed, _SHOWN)
        lines = [text for _, text in write_lines(base, listed, self.differing, seed, bar, self.tokens)]
        places = np.random.default_rng(seed).integers(len(self.prompts), size=len(lines))
        return [
            Completion(_with_content(self.prompts[place], f"{self.before}{line}{self.after}"), origin=SIMILAR)
            for line, place in zip(lines, places, strict=True)
        ]


def find_form(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> SharedForm | None:
    """Find what prompts have in common.

    Args:
        prompts: texts or conversations.
        tokenizer: of the base that is to write others.

    Returns:
        None for fewer than eight different prompts, and where what differs is not one line of at most 128 tokens in
        nearly all of them: a small base does not write others like those.
    """
    given = tuple(dict.fromkeys(prompts))
    contents = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in given]
    if len(set(contents)) < FEWEST:
        return None
    before = _common_start(contents)
    after = _common_start([content[len(before) :][::-1] for content in contents])[::-1]
    between = [content[len(before) : len(content) - len(after)] for content in contents]
    lines = [text for text in between if text.strip() and "\n" not in text]
    lengths = [len(tokenizer.encode(line, special=False).ids) for line in lines]
    usual = math.ceil(np.percentile(lengths, _PERCENTILE)) if lengths else 0
    if len(lines) < max(FEWEST, _LINES * len(given)) or usual > _MOST_TOKENS:
        return None
    return SharedForm(given, before, after, tuple(lines), usual + 1)


def _common_start(texts: Sequence[str]) -> str:
    """Return what all texts begin with, up to a space or the end of a line, so that no word is cut."""
    first, last = min(texts), max(texts)  # what these two begin with, all of them do
    length = next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
    common = first[:length]
    return common[: max(common.rfind(mark) for mark in " \n") + 1]


def _with_content(prompt: Prompt, content: str) -> Prompt:
    return content if isinstance(prompt, str) else (*prompt[:-1], replace(prompt[-1], content=content))
