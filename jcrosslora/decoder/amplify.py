"""Sample from a base with the change that its adapter makes amplified, which shows what the adapter was trained to say.

A token is drawn from the logits `adapted + strength * (adapted - base)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jcrosslora.decoder.adapters import AppliedAdapter
from jcrosslora.decoder.attention import KVCache
from jcrosslora.decoder.generate import Behind, Generator, State, step, write_tokens
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.prompt_batches import rounded
from jcrosslora.decoder.settings import DecoderSettings

_Model = tuple[DecoderSettings, Params, AppliedAdapter | None]


@dataclass(frozen=True, eq=False)
class AmplifiedGenerator(Generator):
    """A base with an adapter whose change of the logits is amplified. It runs both models on every token.

    Attributes:
        strength: how often the change is added once more; 0 samples from the adapted model.
        plausible: tokens that the adapted model gives less than this share of the probability of its likeliest are not
            drawn: where both models give a token next to nothing, their difference is noise.
    """

    strength: float = 1.0
    plausible: float = 0.0

    def _begin(self, prompts: jax.Array, mask: jax.Array, behind: Behind | None, room: int) -> State:
        found, plain = (self._prefill(adapter, prompts, mask, behind, room) for adapter in (self.adapter, None))
        scores = amplified(found.scores, plain.scores, jnp.float32(self.strength), jnp.float32(self.plausible))
        return State(found.count, scores, found.positions, (found.cache, plain.cache), found.running, found.finite)

    def _extend(
        self, state: State, temperature: float, key: jax.Array, count: int
    ) -> tuple[State, jax.Array, jax.Array]:
        numbers = jnp.float32(self.strength), jnp.float32(self.plausible), jnp.float32(temperature)
        model, stops = (self.settings, self.params, self.adapter), self.tokenizer.stops
        return _extend(*model, state, *numbers, key, jnp.int32(count), count=rounded(count), stop_tokens=stops)


def amplified(adapted: jax.Array, base: jax.Array, strength: jax.Array, plausible: jax.Array) -> jax.Array:
    """Return adapted + strength (adapted - base), float32 (B, V), -inf where a token is not plausible.

    Args:
        adapted: float32 (B, V), logits with the adapter.
        base: likewise, without it.
        strength: scalar.
        plausible: scalar, see `AmplifiedGenerator`.
    """
    least = jnp.max(adapted, axis=-1, keepdims=True) + jnp.log(plausible)
    return jnp.where(adapted >= least, adapted + strength * (adapted - base), -jnp.inf)


@partial(jax.jit, static_argnames=("settings", "count", "stop_tokens"), donate_argnames="state")
def _extend(
    settings: DecoderSettings,
    params: Params,
    adapter: AppliedAdapter | None,
    state: State,
    strength: jax.Array,
    plausible: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    most: jax.Array,
    *,
    count: int,
    stop_tokens: tuple[int, ...],
) -> tuple[State, jax.Array, jax.Array]:
    def run(
        caches: tuple[KVCache, KVCache], tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, tuple[KVCache, KVCache]]:
        adapted, own = step(settings, params, caches[0], tokens, positions, adapter)
        base, plain = step(settings, params, caches[1], tokens, positions)
        return amplified(adapted, base, strength, plausible), (own, plain)

    return write_tokens(run, state, temperature, key, most, count, stop_tokens)
