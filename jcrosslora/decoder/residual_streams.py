"""Residual streams of one base over many texts, with an adapter or without, advanced a layer at a time."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, StackedFactors, load_params, settings_of
from jcrosslora.decoder.adapters import update
from jcrosslora.decoder.block import Context, LayerWeights, layer_forward
from jcrosslora.decoder.forward import embed, layer_stack, positions_of
from jcrosslora.decoder.ops import rms_norm
from jcrosslora.decoder.rope import rotations


@flax.struct.dataclass
class Down:
    """What down_proj of one layer read and wrote, (B, T, I) and (B, T, H)."""

    read: jax.Array
    wrote: jax.Array


class Texts:
    """One base and what it reads.

    Attributes:
        settings: of the base.
        params: its weights, with the embeddings of those tokens alone that occur, and no head.
        rows: int32 (B, T) of each batch, rows of that embedding.
        masks: bool (B, T) of each batch.
    """

    def __init__(self, base: BaseModel, params: Params | None, read: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self.settings = settings_of(base)
        params = load_params(base) if params is None else params
        kept = np.unique(np.concatenate([tokens.ravel() for tokens, _ in read]))
        # An embedding may be larger than all layers together, and no token but these is ever looked up.
        self.params = dataclasses.replace(params, embedding=jax.block_until_ready(params.embedding[kept]), head=None)
        self.rows = [jnp.asarray(np.searchsorted(kept, tokens).astype(np.int32)) for tokens, _ in read]
        self.masks = [jnp.asarray(mask) for _, mask in read]


class Stream:
    """The residual stream of one base with one adapter or none, at all positions, behind one layer at a time.

    Attributes:
        states: (B, T, H) of each batch, behind the last layer that was run.
        done: how many layers were run.
    """

    def __init__(self, texts: Texts, adapter: StackedAdapter | None) -> None:
        self._texts, self._settings = texts, texts.settings
        self._layers = layer_stack(texts.settings, texts.params, _alive(adapter))
        self._start()

    def _start(self) -> None:
        self.states = [embed(self._settings, self._texts.params, rows) for rows in self._texts.rows]
        self.done = 0

    def run_to(self, layer: int) -> None:
        """Run up to a layer, that one included; from the start where it lies behind."""
        if layer < self.done - 1:
            self._start()
        while self.done <= layer:
            for _ in self._run_batches():
                pass

    def run_layer(self) -> list[Down]:
        """Run one layer more; returns what its down_proj did in each batch."""
        return list(self._run_batches())

    def _run_batches(self) -> Iterator[Down]:
        weights = jax.tree.map(lambda x: x[self.done], self._layers)
        for place, (mask, state) in enumerate(zip(self._texts.masks, self.states, strict=True)):
            self.states[place], down = jax.block_until_ready(_behind(self._settings, weights, mask, state))
            yield down
        self.done += 1

    def apply(self, downs: Sequence[Down], factors: StackedFactors) -> None:
        """Put the states behind the last layer where they are with one more update of its down_proj."""
        gain = self.gain(self.done - 1)
        for place, (state, down) in enumerate(zip(self.states, downs, strict=True)):
            self.states[place] = jax.block_until_ready(_updated(self._settings, gain, factors, state, down))

    def gain(self, layer: int) -> jax.Array:
        """(H,): of the norm behind down_proj, ones where there is none."""
        if self._settings.post_norms:
            return self._layers.norms["mlp_post"][layer]
        return jnp.ones(self._settings.hidden, jnp.float32)


@partial(jax.jit, static_argnums=0)
def _behind(settings: DecoderSettings, layer: LayerWeights, mask: jax.Array, x: jax.Array) -> tuple[jax.Array, Down]:
    """The stream behind a layer. One program for all streams: two would round differently, and pass for a change."""
    positions, keys = positions_of(mask, mask)
    context = Context(positions, keys, rotations(settings.ropes, positions))
    x, _, seen = layer_forward(settings, layer, context, x, None)
    return x, Down(seen.inputs["down_in"], seen.outputs["down_proj"])


@partial(jax.jit, static_argnums=0)
def _updated(
    settings: DecoderSettings, gain: jax.Array, factors: StackedFactors, state: jax.Array, down: Down
) -> jax.Array:
    """The stream (B, T, H) with one more update of the layer's down_proj."""
    added = update(down.read, factors)
    if settings.post_norms:
        wrote = down.wrote.astype(jnp.float32)
        added = rms_norm(wrote + added, gain, settings.eps) - rms_norm(wrote, gain, settings.eps)
    return (state.astype(jnp.float32) + added).astype(state.dtype)


def _alive(adapter: StackedAdapter | None) -> StackedAdapter | None:
    """The adapter without roles that are all zeros; None where nothing is left, so that it is run as none is."""
    if adapter is None:
        return None
    alive = {role: f for role, f in adapter.roles.items() if bool(jnp.any(f.a != 0) & jnp.any(f.b != 0))}
    return StackedAdapter(alive) if alive else None
