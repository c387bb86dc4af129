"""Sample text: one batched pass over the prompts, then a token at a time with the KV cache."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.adapters import StackedAdapter
from jcrosslora.decoder.draw import draw
from jcrosslora.decoder.forward import extend_cache, logits, positions_of
from jcrosslora.decoder.kv_cache import KVCache, init_cache
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.settings import DecoderSettings


@flax.struct.dataclass
class Sampled:
    """The result of `sample`.

    Attributes:
        tokens: int32 (B, length), without the prompt; zeros after a stop token.
        valid: bool (B, length), True up to and including the stop token.
        finite: bool (B,), False if a token was drawn from logits that are NaN or infinite.
    """

    tokens: jax.Array
    valid: jax.Array
    finite: jax.Array


def step(
    settings: DecoderSettings,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    adapter: StackedAdapter | None = None,
) -> tuple[jax.Array, KVCache]:
    """Run one more token of every sequence.

    Args:
        settings: of the model.
        params: its weights.
        cache: of the previous tokens, with a free slot; without one the last slot is overwritten.
        tokens: int32 (B,).
        positions: int32 (B,), number of previous tokens without padding.
        adapter: or None.

    Returns:
        float32 (B, V) logits of the next token, and the cache with the given tokens appended.
    """
    place = positions[:, None]
    hidden, cache = extend_cache(settings, params, cache, tokens[:, None], (place, place), adapter)
    return logits(settings, params, hidden[:, 0]), cache


@partial(jax.jit, static_argnames=("settings", "length", "stop_tokens"))
def sample(
    settings: DecoderSettings,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    *,
    length: int,
    temperature: float | jax.Array,
    key: jax.Array,
    adapter: StackedAdapter | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> Sampled:
    """Continue prompts until `length` tokens are written or all sequences have stopped.

    Args:
        settings: of the model.
        params: its weights.
        prompts: int32 (B, P).
        prompt_mask: bool (B, P), False at padding on either side; every row has at least one token.
        length: largest number of new tokens.
        temperature: divides the logits; 0 takes the likeliest token.
        key: from `jax.random.key`; the same key gives the same text.
        adapter: or None.
        stop_tokens: a sequence ends after one of these.
    """
    batch, prompt_length = prompts.shape
    cache = init_cache(settings, batch, prompt_length + length, params.stream_dtype)
    positions = positions_of(prompts, prompt_mask)
    hidden, cache = extend_cache(settings, params, cache, prompts, positions, adapter)
    last = jnp.argmax(jnp.where(prompt_mask, jnp.arange(prompt_length), -1), axis=-1)
    first = logits(settings, params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    state = _State(
        count=jnp.zeros((), jnp.int32),
        scores=first,
        cache=cache,
        positions=jnp.sum(prompt_mask, axis=-1, dtype=jnp.int32),
        running=jnp.ones((batch,), bool),
        tokens=jnp.zeros((batch, length), jnp.int32),
        valid=jnp.zeros((batch, length), bool),
        finite=jnp.ones((batch,), bool),
    )

    def advance(state: _State) -> _State:
        drawn = draw(jax.random.fold_in(key, state.count), state.scores, jnp.asarray(temperature, jnp.float32))
        drawn = jnp.where(state.running, drawn, 0)
        stopped = jnp.isin(drawn, jnp.asarray(stop_tokens, jnp.int32))
        scores, cache = step(settings, params, state.cache, drawn, state.positions, adapter)
        return _State(
            count=state.count + 1,
            scores=scores,
            cache=cache,
            positions=state.positions + 1,
            running=state.running & ~stopped,
            tokens=state.tokens.at[:, state.count].set(drawn),
            valid=state.valid.at[:, state.count].set(state.running),
            finite=state.finite & (jnp.isfinite(jnp.max(state.scores, axis=-1)) | ~state.running),
        )

    end = lax.while_loop(lambda state: (state.count < length) & jnp.any(state.running), advance, state)
    return Sampled(end.tokens, end.valid, end.finite)


@flax.struct.dataclass
class _State:
    count: jax.Array
    scores: jax.Array
    cache: KVCache
    positions: jax.Array
    running: jax.Array
    tokens: jax.Array
    valid: jax.Array
    finite: jax.Array
