"""Text behind prompts, a block of tokens at a time, so that a batch ends soon after its last stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import DecoderSettings, KVCache, Params, StackedAdapter, init_cache, logits, step
from jcrosslora.decoder.draw import draw
from jcrosslora.decoder.forward import extend_cache, positions_of
from jcrosslora.evaluate.harness.options import Options

_BLOCK = 16
_SMALLEST = 8


@dataclass(frozen=True, eq=False)
class Writer:
    """A model that writes.

    Attributes:
        settings: of the base.
        params: its weights.
        adapter: applied unmerged, or None.
        tokenizer: the base's.
    """

    settings: DecoderSettings
    params: Params
    adapter: StackedAdapter | None
    tokenizer: Tokenizer

    def write(self, prompts: Sequence[Sequence[int]], options: Options, key: jax.Array) -> list[str]:
        """Continue all prompts at once.

        Args:
            prompts: token ids, none empty.
            options: where to end.
            key: from `jax.random.key`.

        Returns:
            The texts, without the stop strings and special tokens.
        """
        tokens, mask = _padded(prompts)
        model = (self.settings, self.params, self.adapter)
        state = _start(*model, tokens, mask, room=_BLOCK * -(-options.length // _BLOCK))
        written = np.zeros((len(prompts), 0), np.int32)
        ends: list[int | None] = [None] * len(prompts)
        while written.shape[1] < options.length and None in ends:
            state, block = _extend(*model, state, jnp.float32(options.temperature), key)
            seen, written = written.shape[1], np.concatenate([written, np.asarray(block)[: len(prompts)]], axis=1)
            for row in (row for row, end in enumerate(ends) if end is None):
                ends[row] = _end(self.tokenizer, written[row], seen, options.until)
        return [self._text(row[:end][: options.length], options) for row, end in zip(written, ends, strict=True)]

    def _text(self, tokens: np.ndarray, options: Options) -> str:
        text = self.tokenizer.decode(tokens)
        return text[: min((place for stop in options.until if (place := text.find(stop)) >= 0), default=len(text))]


def batches_of(prompts: Sequence[tuple[list[int], Options]], batch_tokens: int) -> list[tuple[Options, list[int]]]:
    """Indices of prompts that are written together: those with the same options, the longest first.

    Args:
        prompts: token ids and options.
        batch_tokens: token positions in memory at once; a batch has one prompt or more.
    """
    by_options: dict[Options, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index][0])):
        by_options.setdefault(prompts[index][1], []).append(index)
    found = []
    for options, members in by_options.items():
        while members:
            count = max(1, batch_tokens // (len(prompts[members[0]][0]) + options.length))
            found.append((options, members[:count]))
            members = members[count:]
    return found


@flax.struct.dataclass
class _State:
    """Logits (B, V) of the next token, its position (B,), and what is before."""

    scores: jax.Array
    positions: jax.Array
    cache: KVCache
    count: jax.Array


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns in powers of two, since every further shape has to be compiled."""
    shape = (_rounded(len(prompts)), max(_SMALLEST, _rounded(max(map(len, prompts)))))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    mask[len(prompts) :, 0] = True
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    return tokens, mask


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _end(tokenizer: Tokenizer, tokens: np.ndarray, seen: int, until: Sequence[str]) -> int | None:
    """How many of the tokens a text keeps: up to the token that completes a stop string, or in front of a stop token.

    None where neither is among those behind the first `seen`.
    """
    stopped = np.flatnonzero(np.isin(tokens[seen:], tokenizer.stops))
    last = seen + int(stopped[0]) if len(stopped) else len(tokens)

    def complete(count: int) -> bool:
        # With special tokens, whose names may be among the stop strings.
        text = tokenizer.backend.decode(tokens[:count].tolist(), skip_special_tokens=False)
        return any(stop in text for stop in until)

    if until and complete(last):
        return next(count for count in range(seen, last + 1) if complete(count))
    return last if len(stopped) else None


@partial(jax.jit, static_argnames=("settings", "room"))
def _start(
    settings: DecoderSettings,
    params: Params,
    adapter: StackedAdapter | None,
    prompts: jax.Array,
    mask: jax.Array,
    *,
    room: int,
) -> _State:
    """Run the prompts; the cache has room for so many tokens more."""
    batch, length = prompts.shape
    cache = init_cache(settings, batch, length + room, params.stream_dtype)
    hidden, cache = extend_cache(settings, params, cache, prompts, positions_of(prompts, mask), adapter)
    lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return _State(logits(settings, params, last), lengths, cache, jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="settings")
def _extend(
    settings: DecoderSettings,
    params: Params,
    adapter: StackedAdapter | None,
    state: _State,
    temperature: jax.Array,
    key: jax.Array,
) -> tuple[_State, jax.Array]:
    """A block of tokens more, int32 (B, block); stop tokens stop nothing here."""

    def one(state: _State, _: None) -> tuple[_State, jax.Array]:
        drawn = draw(jax.random.fold_in(key, state.count), state.scores, temperature)
        scores, cache = step(settings, params, state.cache, drawn, state.positions, adapter)
        return _State(scores, state.positions + 1, cache, state.count + 1), drawn

    state, tokens = lax.scan(one, state, None, length=_BLOCK)
    return state, tokens.T
