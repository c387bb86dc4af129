"""Sample from a model: one pass over the prompts, then a token at a time from the cache, in a compiled loop."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.run import KVCache
from jcrosslora.architectures.settings import init_cache
from jcrosslora.decoder.forward import extend_behind, extend_cache, logits
from jcrosslora.decoder.layout import Layout
from jcrosslora.decoder.model import Model

_BLOCK = 512  # tokens; near the square root of a vocabulary of 262,144, which minimises the work of a draw


@flax.struct.dataclass
class State:
    """A batch of B sequences between two tokens.

    Attributes:
        count: int32 (), tokens written so far.
        scores: float32 (B, V), logits of the next token.
        positions: int32 (B,), of the next token.
        cache: holds all tokens before; for an amplified model a pair, with its adapter and without.
        running: bool (B,), False after a stop token.
        finite: bool (B,), False if a token was drawn from NaN or infinite logits.
    """

    count: jax.Array
    scores: jax.Array
    positions: jax.Array
    cache: Any
    running: jax.Array
    finite: jax.Array


class Sampling(NamedTuple):
    """How to draw tokens, with a key from `jax.random.key`.

    Attributes:
        temperature: float32 scalar; 0 takes the likeliest token.
        most: int32 scalar, tokens to write; None for as many as there is space for.
    """

    temperature: jax.Array
    key: jax.Array
    most: jax.Array | None = None


class Behind(NamedTuple):
    """Prefixes that prompts share: tokens int32 (G, P) and a mask like that of prompts.

    Attributes:
        owners: int32 (B,), the prefix of each prompt.
    """

    tokens: jax.Array
    mask: jax.Array
    owners: jax.Array


@partial(jax.jit, static_argnames="room")
def prefill(model: Model, prompts: jax.Array, mask: jax.Array, behind: Behind | None = None, *, room: int) -> State:
    """Run prompts, int32 (B, P), whose mask is False at padding on either side; every row has at least one token.

    `room` is the number of free cache slots after the prompts. `behind` holds shared prefixes: each is read once, and
    the cache has padding after it. All layers must then have attention, with rotary settings that do not switch with
    the length.
    """
    batch, length = mask.shape
    sizes = (batch, length + room) if behind is None else (len(behind.tokens), behind.tokens.shape[1] + length + room)
    cache = init_cache(model.settings, *sizes, model.params.cache_dtype)
    if behind is None:
        hidden, cache = extend_cache(model, cache, prompts, Layout.of(mask))
    else:
        beginnings = behind.tokens, behind.mask
        hidden, cache = extend_behind(model, cache, beginnings, behind.owners, (prompts, Layout.of(mask)))
    last = jnp.argmax(jnp.where(mask, jnp.arange(length), -1), axis=-1)
    first = logits(model, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    running, finite = jnp.ones((batch,), bool), jnp.ones((batch,), bool)
    return State(jnp.zeros((), jnp.int32), first, jnp.max(cache.positions, axis=-1) + 1, cache, running, finite)


@partial(jax.jit, static_argnames=("count", "stop_tokens"), donate_argnames="state")
def extend(
    model: Model, state: State, sampling: Sampling, *, count: int, stop_tokens: tuple[int, ...] = ()
) -> tuple[State, jax.Array, jax.Array]:
    """Write more tokens; ends early when all sequences have stopped. The state is used up.

    It is compiled once for each `count`, which is at least `sampling.most`.

    Returns:
        The new state; int32 (B, count) tokens, zeros after a stop token; bool (B, count), True up to and including it.
    """

    def run(cache: KVCache, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, KVCache]:
        return step(model, cache, tokens, positions)

    return _write_tokens(run, state, sampling, count, stop_tokens)


@partial(jax.jit, static_argnames=("count", "stop_tokens"), donate_argnames="state")
def extend_amplified(
    model: Model,
    state: State,
    change: tuple[jax.Array, jax.Array],
    sampling: Sampling,
    *,
    count: int,
    stop_tokens: tuple[int, ...],
) -> tuple[State, jax.Array, jax.Array]:
    """Write more tokens as `extend` does, from `amplified` logits.

    The state has two caches, with the adapter and without it; `change` is strength and plausible.
    """
    base = model.with_adapter(None)

    def run(
        caches: tuple[KVCache, KVCache], tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, tuple[KVCache, KVCache]]:
        adapted, own = step(model, caches[0], tokens, positions)
        unadapted, plain = step(base, caches[1], tokens, positions)
        return amplified(adapted, unadapted, *change), (own, plain)

    return _write_tokens(run, state, sampling, count, stop_tokens)


def amplified(adapted: jax.Array, base: jax.Array, strength: jax.Array, plausible: jax.Array) -> jax.Array:
    """Return adapted + strength (adapted - base), float32 (B, V), from the logits with an adapter and without.

    Implausible tokens get -inf, see `AmplifiedGenerator`.
    """
    least = jnp.max(adapted, axis=-1, keepdims=True) + jnp.log(plausible)
    return jnp.where(adapted >= least, adapted + strength * (adapted - base), -jnp.inf)


def _write_tokens(
    run: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
    state: State,
    sampling: Sampling,
    count: int,
    stop_tokens: tuple[int, ...],
) -> tuple[State, jax.Array, jax.Array]:
    """Draw up to `most` tokens in a loop, as `extend` does.

    `run` takes the cache, tokens and their positions, int32 (B,) each, and returns the logits of the next tokens and
    the cache with the tokens appended. `count` columns are returned (static).
    """
    shape = len(state.scores), count

    def advance(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> tuple[jax.Array, State, jax.Array, jax.Array]:
        place, state, tokens, valid = carry
        drawn = draw(jax.random.fold_in(sampling.key, state.count), state.scores, sampling.temperature)
        drawn = jnp.where(state.running, drawn, 0)
        finite = state.finite & (jnp.isfinite(jnp.max(state.scores, axis=-1)) | ~state.running)
        scores, cache = run(state.cache, drawn, state.positions)
        running = state.running & ~jnp.isin(drawn, jnp.asarray(stop_tokens, jnp.int32))
        tokens, valid = tokens.at[:, place].set(drawn), valid.at[:, place].set(state.running)
        return place + 1, State(state.count + 1, scores, state.positions + 1, cache, running, finite), tokens, valid

    start = jnp.zeros((), jnp.int32), state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    most = count if sampling.most is None else sampling.most
    _, state, tokens, valid = lax.while_loop(
        lambda carry: (carry[0] < most) & jnp.any(carry[1].running), advance, start
    )
    return state, tokens, valid


def step(model: Model, cache: KVCache, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, KVCache]:
    """Run one more token, int32 (B,), of every sequence.

    The cache must have a free slot, otherwise the last one is overwritten. `positions`, int32 (B,), count the tokens
    before each token, without padding.

    Returns:
        float32 (B, V) logits of the next token, and the cache with the tokens appended.
    """
    hidden, cache = extend_cache(model, cache, tokens[:, None], Layout(positions[:, None]))
    return logits(model, hidden[:, 0]), cache


def draw(key: jax.Array, scores: jax.Array, temperature: jax.Array) -> jax.Array:
    """Draw tokens int32 (B,) from softmax(scores / temperature), scores (B, V); at temperature 0 take the likeliest.

    Inverts the cumulative distribution, first over blocks of tokens, then inside one. `jax.random.categorical` needs a
    random number and two logarithms for every token, which on a CPU costs more than the output head.
    """
    return lax.cond(temperature > 0, _invert, lambda _, scores, __: likeliest(scores), key, scores, temperature)


def _invert(key: jax.Array, scores: jax.Array, temperature: jax.Array) -> jax.Array:
    warm = (scores - jnp.max(scores, axis=-1, keepdims=True)) / temperature
    weights = jnp.exp(_blocks(warm))
    sums = jnp.sum(weights, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    level = jax.random.uniform(key, (scores.shape[0],)) * ends[:, -1]
    block = _first_above(ends, sums, level)
    start = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    inside = _block_at(weights, block)
    return block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), inside, level - start)


def _first_above(ends: jax.Array, weights: jax.Array, level: jax.Array) -> jax.Array:
    above = ends > level[:, None]
    # Rounding can leave none above the level; take the heaviest then, whose weight is not zero.
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1)).astype(
        jnp.int32
    )


def likeliest(scores: jax.Array) -> jax.Array:
    """Return the argmax, int32 (...), of scores (..., V); the first one in a tie.

    On a CPU, XLA computes a maximum with vector instructions but an argmax one number at a time, so this takes the
    maxima of blocks and searches only one block.
    """
    blocks = _blocks(scores)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    return (block * _BLOCK + jnp.argmax(_block_at(blocks, block), axis=-1)).astype(jnp.int32)


def _blocks(scores: jax.Array) -> jax.Array:
    """Divide scores (..., V) into blocks (..., blocks, tokens); the last one is filled up with -inf."""
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, -scores.shape[-1] % _BLOCK)]
    return jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(*scores.shape[:-1], -1, _BLOCK)


def _block_at(blocks: jax.Array, place: jax.Array) -> jax.Array:
    """Return the block (..., tokens) at a place (...) of each row."""
    return jnp.take_along_axis(blocks, place[..., None, None], axis=-2)[..., 0, :]
