"""Decode a queue of prompts greedily: when the text in a row ends, the row takes the next prompt."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.run import KVCache, blank_sequences, put_sequence
from jcrosslora.decoder.prompt_batches import PromptBatch, plan_batches, plan_queues, rounded
from jcrosslora.decoder.sampling import Sampling, State
from jcrosslora.errors import not_finite

if TYPE_CHECKING:
    from jcrosslora.checkpoint.tokenizer import Tokenizer
    from jcrosslora.utils.progress import Track

_TURN = 8  # prompts that are read together
_STEPS = 8  # tokens between two checks for texts that have ended; it divides the room for new tokens


class Writer(Protocol):
    """The part of `Generator` that a queue needs."""

    @property
    def name(self) -> str:
        """The base's name, for errors."""
        ...

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name, for errors."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, whose stop tokens end a text."""
        ...

    @property
    def shares_beginnings(self) -> bool:
        """Whether a prefix that several prompts share can be read once."""
        ...

    def before_switch(self, length: int, most: int) -> int:
        """Count the tokens to write after a text of `length` tokens, at most `most`, before its rotations switch."""
        ...

    def of_rows(self, places: Sequence[int], rows: int) -> Self:
        """Return the writer for a batch whose rows hold the prompts at these places."""
        ...

    def begin(self, batch: PromptBatch, room: int, *, pad_left: bool) -> State:
        """Read the prompts of a batch."""
        ...

    def extend(self, state: State, sampling: Sampling, count: int) -> tuple[State, jax.Array, jax.Array]:
        """Write up to `count` tokens, see `sampling.extend`."""
        ...


def write_queue(
    writer: Writer,
    ids: Sequence[np.ndarray],
    max_new_tokens: int,
    begun: Sequence[np.ndarray] | None = None,
    *,
    bar: Track | None = None,
) -> list[np.ndarray]:
    """Write the likeliest tokens after n prompts, int32 (T,) token ids of at most `LONGEST_PROMPT`.

    Args:
        writer: its `of_rows` gets the places of prompts.
        max_new_tokens: tokens at which a text is cut off.
        begun: the known first tokens of M n texts, int32 (T,) each; a prompt with them has at most `LONGEST_PROMPT`.
            Each prompt is answered M times: `of_rows` gets its place + m n for m from 0 to M - 1; prompts that are
            read together have the same m. None writes one text for each prompt, from the start.
        bar: advances by one for each text.

    Returns:
        int32 (T,) for each of the M n texts, with the stop token if there is one.

    Raises:
        AdapterError, CheckpointError: see `Generator.continue_tokens`.
    """
    found = [np.zeros(0, np.int32)] * len(ids) if begun is None else list(begun)
    waiting = [place for place, text in enumerate(found) if not _whole(writer, text, max_new_tokens)]
    if bar is not None:
        bar.update(len(found) - len(waiting))
    while waiting:  # again for texts whose rotations have switched, which changes all their keys
        turns, limits = [], {}
        for start in range(0, len(found), len(ids)):
            places = [place for place in waiting if start <= place < start + len(ids)]
            texts = [np.concatenate([ids[place - start], found[place]]) for place in places]
            planned = plan_batches(texts, max_new_tokens, share=writer.shares_beginnings, most=_TURN)
            turns += [dataclasses.replace(turn, places=[places[one] for one in turn.places]) for turn in planned]
            for place, text in zip(places, texts, strict=True):
                begun_tokens = len(found[place])
                limits[place] = begun_tokens + writer.before_switch(len(text), max_new_tokens - begun_tokens)
        waiting = []
        for own, *sizes in plan_queues(turns, max_new_tokens):
            for place, row in _Rows(writer, max_new_tokens, limits, *sizes).write(own, found):
                found[place] = row
                if not _whole(writer, row, max_new_tokens):
                    waiting.append(place)
                elif bar is not None:
                    bar.update(1)
        waiting.sort()
    return found


def _whole(writer: Writer, text: np.ndarray, most: int) -> bool:
    """Tell whether a text has ended or is cut off."""
    return len(text) == most or (len(text) > 0 and int(text[-1]) in writer.tokenizer.stops)


class _Rows:
    """The rows of a cache.

    They all write into the same slots, as a ring buffer. A row writes no more tokens than there are slots before it
    takes another prompt, which empties it.
    """

    def __init__(self, writer: Writer, max_new_tokens: int, limits: Mapping[int, int], rows: int, slots: int) -> None:
        self._writer, self._limits, self._rows, self._slots = writer, limits, rows, slots
        self._room = rounded(max_new_tokens)
        self._places: dict[int, int] = {}  # of prompts, by row
        self._texts: dict[int, np.ndarray] = {}
        self._state: State | None = None

    def write(self, turns: Sequence[PromptBatch], begun: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the place and text of each prompt when it ends or reaches its limit.

        A text begins with its tokens in `begun`, which are part of the prompt already.
        """
        waiting, looks = deque(turns), 0
        while waiting or self._places:
            while waiting and len(self._free) >= len(waiting[0].places):
                self._enter(waiting.popleft(), begun)
            self._extend(self._slots + looks * _STEPS % self._room)
            looks += 1
            for row, text in list(self._texts.items()):
                if _whole(self._writer, text, self._limits[self._places[row]]):
                    del self._texts[row]
                    yield self._places.pop(row), text

    @property
    def _free(self) -> list[int]:
        return [row for row in range(self._rows) if row not in self._places]

    def _enter(self, turn: PromptBatch, begun: Sequence[np.ndarray]) -> None:
        """Read prompts into free rows."""
        new = self._writer.of_rows(turn.places, turn.shape[0]).begin(turn, 0, pad_left=True)
        state = self._state or blank(new, rows=self._rows, slots=self._slots + self._room)
        rows, wanted = self._free[: len(turn.places)], np.zeros(turn.shape[0], np.int32)
        wanted[: len(rows)] = rows
        self._state = enter(state, new, jnp.asarray(wanted), jnp.int32(len(rows)), jnp.int32(self._slots))
        self._places |= dict(zip(rows, turn.places, strict=True))
        self._texts |= {row: begun[place] for row, place in zip(rows, turn.places, strict=True)}

    def _extend(self, filled: int) -> None:
        """Write the next tokens of all rows into the slots from `filled` on."""
        assert self._state is not None
        running = jnp.asarray([row in self._places for row in range(self._rows)])
        cache = _each(self._state.cache, lambda one: dataclasses.replace(one, filled=jnp.int32(filled)))
        state = dataclasses.replace(self._state, running=running, cache=cache)
        most = min(_STEPS, max(self._limits[self._places[row]] - len(text) for row, text in self._texts.items()))
        sampling = Sampling(jnp.float32(0), jax.random.key(0), jnp.int32(most))
        # Rows without a prompt run as any other.
        writer = self._writer.of_rows([self._places.get(row, 0) for row in range(self._rows)], self._rows)
        self._state, *new = writer.extend(state, sampling, _STEPS)
        tokens, valid, finite = map(np.asarray, (*new, self._state.finite))
        for row, text in self._texts.items():
            if not finite[row]:
                one = self._writer.of_rows([self._places[row]], 1)
                raise not_finite(one.name, one.adapter_name)
            self._texts[row] = np.concatenate([text, tokens[row][valid[row]]])[: self._limits[self._places[row]]]


@partial(jax.jit, static_argnames=("rows", "slots"))
def blank(state: State, *, rows: int, slots: int) -> State:
    """Return an empty state like `state`, for `rows` sequences and a cache of `slots` slots."""

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros((rows, *x.shape[1:]), x.dtype)

    cache = _each(state.cache, lambda one: blank_sequences(one, rows, slots))
    own = {name: zeros(getattr(state, name)) for name in _BY_ROW}
    return dataclasses.replace(state, cache=cache, **own)


@partial(jax.jit, donate_argnames="state")
def enter(state: State, begun: State, rows: jax.Array, count: jax.Array, end: jax.Array) -> State:
    """Put the first `count` sequences of `begun` into rows, int32 (C,), of a state; prompts end before slot `end`."""

    def put(number: jax.Array, state: State) -> State:
        row = rows[number]
        own = {name: getattr(state, name).at[row].set(getattr(begun, name)[number]) for name in _BY_ROW}
        cache = _each(state.cache, lambda one, new: put_sequence(one, row, new, number, end), begun.cache)
        return dataclasses.replace(state, cache=cache, **own)

    return lax.fori_loop(0, count, put, state)


_BY_ROW = ("scores", "positions", "running", "finite")


def _each(caches: Any, function: Callable[..., KVCache], *others: Any) -> Any:
    """Apply a function to the cache of a state, or to both caches of an amplified model."""
    return jax.tree.map(function, caches, *others, is_leaf=lambda one: isinstance(one, KVCache))
