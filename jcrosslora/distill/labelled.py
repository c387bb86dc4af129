"""Labelled examples in a fit: completions whose answers are the user's, and right whatever the source says."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from jcrosslora.distill.settings import FIRST, ROUND
from jcrosslora.text import Completion, Prompt


def as_taught(examples: Sequence[Completion]) -> list[Completion]:
    """Make completions of examples: their answers, ends included, are taught as they are."""
    return [replace(one, right="answer") for one in examples]


def without_labelled(prompts: Sequence[Prompt], examples: Sequence[Completion]) -> list[Prompt]:
    """Leave out prompts whose right answer is known, which the source need not answer."""
    labelled = {one.prompt for one in examples}
    return [one for one in prompts if one not in labelled]


def examples_of_round(
    examples: Sequence[Completion], number: int, excluded: Collection[Prompt] = ()
) -> list[Completion]:
    """Take the examples that a further round repeats, in turn; `number` counts rounds from 1.

    They are the same share of it as of the first completions, so that a long fit does not forget them.
    """
    usable = [one for one in examples if one.prompt not in excluded]
    count = -(-len(usable) * ROUND // FIRST)
    return [usable[place % len(usable)] for place in range((number - 1) * count, number * count)]
