"""Find the beginnings that prompts have in common: each is then read once for all of its prompts."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

SHORTEST, _MULTIPLE = 32, 16  # tokens of a common beginning, the fewest, and what their number is a multiple of


class Group(NamedTuple):
    """Prompts with a common beginning.

    Attributes:
        places: of the prompts, at least two.
        length: tokens that they all begin with, fewer than the shortest of them has.
    """

    places: list[int]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be read again."""
        return (len(self.places) - 1) * self.length


def common_beginnings(ids: Sequence[np.ndarray]) -> list[Group]:
    """Group prompts by their beginnings, int32 (T,) token ids each.

    Of prompts that begin alike, some may go on alike for longer than others: they are divided where that saves more.

    Returns:
        Groups without a prompt in common, in the order of their first prompts as far as they are not divided; prompts
        that begin like no other are in none.
    """
    return [group for part in _alike(ids, range(len(ids)), 0, SHORTEST) for group in _divided(ids, part)]


def _divided(ids: Sequence[np.ndarray], places: list[int]) -> list[Group]:
    """Return one group of prompts that begin alike, or several with longer beginnings."""
    whole = Group(places, _common_length([ids[place] for place in places]))
    finer = [group for part in _alike(ids, places, whole.length, _MULTIPLE) for group in _divided(ids, part)]
    inside = {place for group in finer for place in group.places}
    others = [place for place in places if place not in inside]
    finer += [Group(others, whole.length)] if len(others) > 1 else []
    return finer if sum(group.saved for group in finer) > whole.saved else [whole]


def _alike(ids: Sequence[np.ndarray], places: Iterable[int], start: int, count: int) -> list[list[int]]:
    """Put prompts together that have the same `count` tokens from `start` on, and at least one more behind them."""
    found: dict[bytes, list[int]] = {}
    for place in places:
        if len(ids[place]) > start + count:
            found.setdefault(ids[place][start : start + count].tobytes(), []).append(place)
    return [part for part in found.values() if len(part) > 1]


def _common_length(prompts: Sequence[np.ndarray]) -> int:
    """Count the tokens that all prompts begin with, rounded down; each has one behind them, from which it goes on."""
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        unequal = np.flatnonzero(prompt[:length] != first[:length])
        length = int(unequal[0]) if len(unequal) else length
    return length // _MULTIPLE * _MULTIPLE
