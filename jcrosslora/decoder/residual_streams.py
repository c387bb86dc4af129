"""Compute the residual streams of a base on many texts, with or without an adapter, one layer at a time."""

from collections.abc import Iterator, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.architecture import layer_forward
from jcrosslora.architectures.ops import rms_norm
from jcrosslora.architectures.run import KVCache, LayerWeights
from jcrosslora.architectures.settings import last_keys
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import DecoderSettings, Model, StackedAdapter, StackedFactors, load_model
from jcrosslora.decoder.forward import context_of, embed, positions_of
from jcrosslora.decoder.layer_stack import layer_at
from jcrosslora.decoder.model import update


@flax.struct.dataclass
class Down:
    """The input (B, T, I) and the output (B, T, H) of down_proj in one layer; None in a layer without it."""

    read: jax.Array | None
    wrote: jax.Array | None


class Texts:
    """A base and the texts that it reads.

    Attributes:
        model: the base, without head and with the embeddings of the occurring tokens alone.
        rows: int32 (B, T) of each batch, rows of that embedding.
        masks: bool (B, T) of each batch, False at padding.
    """

    def __init__(self, base: BaseModel, model: Model | None, read: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        kept = np.unique(np.concatenate([tokens.ravel() for tokens, _ in read]))
        # An embedding may be larger than all layers together.
        self.model = jax.block_until_ready((model or load_model(base)).of_tokens(kept))
        self.rows = [jnp.asarray(np.searchsorted(kept, tokens).astype(np.int32)) for tokens, _ in read]
        self.masks = [jnp.asarray(mask) for _, mask in read]


class Stream:
    """The residual stream of a base with or without an adapter, at all positions, after one layer at a time.

    Attributes:
        states: (B, T, H) of each batch, after the last layer that was run.
        done: number of layers that were run.
    """

    def __init__(self, texts: Texts, adapter: StackedAdapter | None) -> None:
        self._texts, self._settings = texts, texts.model.settings
        self._adapter = _nonzero(adapter)
        self._start()

    def _start(self) -> None:
        begun = [embed(self._texts.model, rows) for rows in self._texts.rows]
        self.states, self._inputs = [x for x, _ in begun], [inputs for _, inputs in begun]
        self._keys = [last_keys(self._settings, x) for x in self.states]
        self.done = 0

    def run_to(self, layer: int) -> None:
        """Run up to and including a layer; start again if it was passed."""
        if layer < self.done - 1:
            self._start()
        while self.done <= layer:
            for _ in self._run_batches():
                pass

    def run_layer(self) -> list[Down]:
        """Run the next layer; return the input and output of its down_proj in each batch."""
        return list(self._run_batches())

    def _run_batches(self) -> Iterator[Down]:
        weights = layer_at(self._settings, self._texts.model.params, self._adapter, self.done)
        for place, (mask, state) in enumerate(zip(self._texts.masks, self.states, strict=True)):
            before = state, self._keys[place]
            (self.states[place], self._keys[place]), down = jax.block_until_ready(
                _run_layer(self._settings, weights, mask, before, self._inputs[place])
            )
            yield down
        self.done += 1

    def apply(self, downs: Sequence[Down], factors: StackedFactors) -> None:
        """Add an update of down_proj in the last layer to the states."""
        gain, normed = self.gain(self.done - 1), self._settings.normed_behind(self.done - 1)
        for place, (state, down) in enumerate(zip(self.states, downs, strict=True)):
            self.states[place] = jax.block_until_ready(_add_update(self._settings, normed, gain, factors, state, down))

    def gain(self, layer: int) -> jax.Array:
        """Return the gain (H,) between down_proj and the stream: that of the norm, if any, times `residual_scale`."""
        scale = jnp.float32(self._settings.residual_scale)
        if self._settings.normed_behind(layer):
            place = self._settings.layers_with("mlp_post").index(layer)
            return self._texts.model.params.norms["mlp_post"][place] * scale
        return jnp.full(self._settings.hidden, scale)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    settings: DecoderSettings,
    layer: LayerWeights,
    mask: jax.Array,
    before: tuple[jax.Array, KVCache | None],
    inputs: jax.Array | None,
) -> tuple[tuple[jax.Array, KVCache | None], Down]:
    """Return the stream after a layer, and what the next reads. One program for all streams: two could round apart."""
    context = context_of(settings, *positions_of(mask, mask), inputs=inputs)
    x, cache, captured = layer_forward(settings, layer, context, *before)
    return (x, cache), Down(captured.inputs.get("down_in"), captured.outputs.get("down_proj"))


@partial(jax.jit, static_argnums=(0, 1))
def _add_update(
    settings: DecoderSettings, normed: bool, gain: jax.Array, factors: StackedFactors, state: jax.Array, down: Down
) -> jax.Array:
    """Return the stream (B, T, H) with an update of the layer's down_proj added."""
    assert down.read is not None
    assert down.wrote is not None
    added = update(down.read, factors)
    if normed:
        wrote = down.wrote.astype(jnp.float32)
        added = rms_norm(wrote + added, gain, settings.eps) - rms_norm(wrote, gain, settings.eps)
    elif settings.residual_scale != 1.0:
        added = added * gain
    return (state.astype(jnp.float32) + added).astype(state.dtype)


def _nonzero(adapter: StackedAdapter | None) -> StackedAdapter | None:
    """Return the adapter without zero roles; None if all are zero, so that the program without an adapter is run."""
    if adapter is None:
        return None
    roles = {role: f for role, f in adapter.roles.items() if bool(jnp.any(f.a != 0) & jnp.any(f.b != 0))}
    return StackedAdapter(roles) if roles else None
