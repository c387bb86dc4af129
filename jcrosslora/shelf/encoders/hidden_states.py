"""The base as an encoder: the mean of the residual stream behind its middle layer, over the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer, pad_right
from jcrosslora.decoder import DecoderSettings, fast_dtype, load_params, settings_of
from jcrosslora.decoder.attention import KVCache, last_keys
from jcrosslora.decoder.block import layer_forward
from jcrosslora.decoder.forward import context_of, embed, positions_of
from jcrosslora.decoder.layer import LayerWeights
from jcrosslora.decoder.layer_stack import layer_at
from jcrosslora.decoder.params import Params
from jcrosslora.errors import not_finite
from jcrosslora.shelf.encoders.encoder import unit_rms
from jcrosslora.text import Prompt
from jcrosslora.text.completion import prompt_text

_WIDTHS, _ROWS = (32, 64, 128), 8  # shapes (B, T): the fewer, the less to compile; further tokens are not read


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The lower half of a base.

    Attributes:
        settings: of the base.
        tokenizer: of the base.
        params: its weights; of its layers, those in `layers` are used.
        layers: the arrays of each layer up to the middle one.
        name: of the base, for messages.
    """

    settings: DecoderSettings
    tokenizer: Tokenizer
    params: Params
    layers: tuple[LayerWeights, ...]
    name: str

    @classmethod
    def of(cls, base: BaseModel) -> HiddenStates:
        """Load a base.

        Raises:
            CheckpointError: the base or its tokenizer cannot be read, or the decoder does not support it.
        """
        settings, tokenizer = settings_of(base), load_tokenizer(base)
        params = load_params(base, fast_dtype())
        count = max(1, base.dims.layers // 2)
        layers = tuple(layer_at(settings, params, None, layer) for layer in range(count))
        return cls(settings, tokenizer, params, layers, base.ref)

    def encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Encode prompts, float32 (P, H), each row with a root mean square of 1.

        At most the first 128 tokens of a prompt are read, and the mean is without the first one: models keep large
        numbers there that do not depend on the text.

        Raises:
            CheckpointError: the base's predictions are not finite.
        """
        rows = [self.tokenizer.encode(prompt_text(prompt)).ids[: _WIDTHS[-1]] for prompt in prompts]
        found = np.zeros((len(rows), self.settings.hidden), np.float32)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for first in range(0, len(order), _ROWS):
            part = order[first : first + _ROWS]
            width = next(width for width in _WIDTHS if len(rows[part[-1]]) <= width)
            count = 1 if len(rows) == 1 else _ROWS
            tokens, mask = pad_right([rows[place] for place in part], (count, width))
            found[part] = self._means(tokens, mask)[: len(part)]
        if not np.isfinite(found).all():
            raise not_finite(self.name)
        return unit_rms(found)

    def _means(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen = jnp.asarray(mask)
        x, inputs = _embed(self.settings, self.params, jnp.asarray(tokens))
        cache = last_keys(self.settings, x)
        for layer in self.layers:
            x, cache = _run_layer(self.settings, layer, seen, (x, cache), inputs)
        return np.asarray(_mean(x, seen))


@partial(jax.jit, static_argnums=0)
def _embed(settings: DecoderSettings, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return embed(settings, params, tokens)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    settings: DecoderSettings,
    layer: LayerWeights,
    mask: jax.Array,
    before: tuple[jax.Array, KVCache | None],
    inputs: jax.Array | None,
) -> tuple[jax.Array, KVCache | None]:
    context = context_of(settings, *positions_of(mask, mask), inputs=inputs)
    return layer_forward(settings, layer, context, *before)[:2]


@jax.jit
def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean (B, H) of states (B, T, H) that are scaled to a root mean square of 1 first: some tokens have large ones."""
    x = x.astype(jnp.float32)
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-12)
    several = mask.sum(axis=1, keepdims=True) > 1
    used = (mask & ((jnp.arange(mask.shape[1])[None] > 0) | ~several)).astype(jnp.float32)
    total = jnp.sum(x * used[..., None], axis=1)
    return total / jnp.maximum(used.sum(axis=1, keepdims=True), 1.0)
