"""`residual-fit`: give the target's residual stream the change that an adapter gives the source's, in closed form.

Let h be a residual stream behind a layer and dh what an adapter changes of it. For each target layer, from the first to
the last, with M the linear map from the source's stream to the target's,

    wanted = scale * M dh_src,   dW_down = argmin || wanted - dh_tgt - N(dW_down x) ||

where dh_tgt is what the adapter that the target has so far changes of its stream behind that layer: a given adapter,
and the updates fitted to the layers in front. x is the input of down_proj with that adapter. N is the norm behind
down_proj, linearised: N(y) = gain * y / rms, with rms as it is at the position; the identity where the family has none.
M is a ridge map and dW_down a ridge map of reduced rank, both fitted on the same positions. Every dimension is divided
by its size (see `jcrosslora.linalg.dimension_sizes`): without that a few massive ones rule the fit.

Linearised, N lets anything be written into a dimension of little gain by outputs large enough. But they raise the rms,
and all that the MLP wrote before is lost. So |dW_down x / rms|^2 is added to what is minimised, with the weight of what
is left out, which is at most the share of the norm's outputs in the stream: a tenth of that.

The streams, with and without adapter, are kept at all positions and advanced a layer at a time, so that each is
computed once; what a layer's fit needs are sums of products over the positions, linear in the map M.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, StackedFactors, stack_adapter
from jcrosslora.decoder.residual_streams import Down, Stream, Texts
from jcrosslora.errors import AdapterError, PairingError, UsageError
from jcrosslora.linalg import dimension_sizes, dot, recompress, reduced_rank_ridge, ridge
from jcrosslora.utils.progress import each

if TYPE_CHECKING:
    from jcrosslora.evidence.probes import ProbeBatch

ROLE = "down_proj"
PENALTY = 1e-2  # of the mean diagonal, which is that of a correlation matrix
# Of the mean square that the norm behind down_proj writes into a dimension, relative to the dimension's size.
RESTRAINT = 0.1


def fit_residual(
    source: BaseModel,
    target: BaseModel,
    adapter: Adapter,
    current: StackedAdapter | None,
    batches: Sequence[ProbeBatch],
    layers: Sequence[int | None],
    *,
    rank: int = 16,
    scale: float = 0.6,
    params: tuple[Params, Params] | None = None,
    progress: bool = False,
) -> StackedAdapter:
    """Fit updates of the target's down_proj that carry over what an adapter changes of the source's residual stream.

    Memory: the layers of both bases as float32; for every position of every batch, padding included, two streams of
    each base, and of the target the input and the output of one layer's down_proj (23 kB a position for a pair of 600
    wide models, 0.9 GB for 38,000 of them); one layer's sums. Time: twice a forward pass of each base, and the products
    of down_proj's inputs.

    Args:
        source: the base that the adapter is of.
        target: the base that the updates are for.
        adapter: of the source, with fused matrices taken apart (see `fit_to_base`).
        current: what the target has already, or None; its effect is taken off what is wanted.
        batches: at least one; each shape among them is compiled once.
        layers: for each target layer the source layer whose stream it follows, or None for no update of that layer.
            An order other than ascending costs the source's passes again for every step back.
        rank: R of each update.
        scale: how much of the source's change is wanted.
        params: weights of source and target, if they are loaded already.
        progress: whether to show a progress bar.

    Returns:
        The updates alone, without `current` (`join_stacked` adds the two): down_proj, a (L, R, I) and b (L, H, R), zero
        in layers without one.

    Raises:
        UsageError: a rank below 1 or above the short side of down_proj, or no batches.
        PairingError: `layers` does not fit the bases, or feeds no layer.
        AdapterError: the adapter does not fit the source, or a stream with it or with `current` is not finite.
        CheckpointError: weights that cannot be read, or a model that the decoder does not know.
    """
    hidden, inner = target.modules[f"model.layers.0.mlp.{ROLE}"].shape
    _check(source, target, batches, layers, rank, min(hidden, inner))
    stacked = stack_adapter(adapter, source)
    texts_src, texts_tgt = (
        Texts(base, None if params is None else params[side], [_tokens_of(batch, side) for batch in batches])
        for side, base in enumerate((source, target))
    )
    teacher, taught = Stream(texts_src, None), Stream(texts_src, stacked)
    plain, student = Stream(texts_tgt, None), Stream(texts_tgt, current)
    a = np.zeros((len(layers), rank, inner), np.float32)
    b = np.zeros((len(layers), hidden, rank), np.float32)
    last = max(layer for layer, feeder in enumerate(layers) if feeder is not None)
    for layer in each(range(last + 1), "fit the residual stream", "layers", show=progress):
        plain.run_to(layer)
        feeder = layers[layer]
        if feeder is None:
            student.run_to(layer)
            continue
        downs = student.run_layer()
        teacher.run_to(feeder)
        taught.run_to(feeder)
        streams = [teacher.states, taught.states, plain.states, student.states]
        sums = _summed(texts_tgt.settings, batches, streams, downs)
        factors = jax.block_until_ready(_solve(sums, student.gain(layer), jnp.float32(scale), rank))
        a[layer], b[layer] = np.asarray(factors.a), np.asarray(factors.b)
        if not (np.isfinite(a[layer]).all() and np.isfinite(b[layer]).all()):
            msg = (
                f"{adapter.info.name}: the residual stream of {source.ref} with it, or of {target.ref} with what was "
                f"moved so far, is not finite behind layer {layer}: the factors are too large or not numbers"
            )
            raise AdapterError(msg)
        student.apply(downs, factors)
        # What the next layer's down_proj does must not join this one's in memory.
        del downs
    return StackedAdapter({ROLE: StackedFactors(jnp.asarray(a), jnp.asarray(b))})


@flax.struct.dataclass
class _Sums:
    """Sums over positions of one layer, float32; s and t are the streams of source and target, x as in the module.

    Where there is a norm behind down_proj, x is divided by the rms that it divides by.

    Attributes:
        source: (H_src, H_src), of s s'.
        cross: (H_src, H_tgt), of s t'.
        squares: (H_tgt,), of the squares of t.
        inputs: (I, I), of x x'.
        wanted: (I, H_src), of x ds'.
        present: (I, H_tgt), of x dt'.
        written: (H_tgt,), of the squares of down_proj's outputs divided by their rms; zeros where there is no norm.
        count: (), positions.
    """

    source: jax.Array
    cross: jax.Array
    squares: jax.Array
    inputs: jax.Array
    wanted: jax.Array
    present: jax.Array
    written: jax.Array
    count: jax.Array


# Of source and target, without and with adapter, in this order.
_States = tuple[jax.Array, ...]


def _summed(
    settings: DecoderSettings,
    batches: Sequence[ProbeBatch],
    streams: Sequence[Sequence[jax.Array]],
    downs: Sequence[Down],
) -> _Sums:
    """The sums over all batches; streams are the four of `_States`, one array a batch."""
    sums = _no_sums(tuple(stream[0] for stream in streams), downs[0])
    for batch, down, *states in zip(batches, downs, *streams, strict=True):
        places = jnp.asarray(batch.at_src), jnp.asarray(batch.at_tgt), jnp.asarray(batch.valid)
        sums = jax.block_until_ready(_add(settings, sums, tuple(states), down, places))
    return sums


def _no_sums(states: _States, down: Down) -> _Sums:
    src, tgt, inner = states[0].shape[-1], states[2].shape[-1], down.read.shape[-1]
    shapes = (src, src), (src, tgt), (tgt,), (inner, inner), (inner, src), (inner, tgt), (tgt,), ()
    return _Sums(*map(jnp.zeros, shapes))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(
    settings: DecoderSettings,
    sums: _Sums,
    states: _States,
    down: Down,
    places: tuple[jax.Array, jax.Array, jax.Array],
) -> _Sums:
    """Add the positions of one batch; places are `at_src`, `at_tgt` and `valid` of a `ProbeBatch`."""
    at_src, at_tgt, valid = places

    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])[at].astype(jnp.float32) * valid.astype(jnp.float32)[:, None]

    s, s_adapted = (take(state, at_src) for state in states[:2])
    t, t_adapted = (take(state, at_tgt) for state in states[2:])
    x, written = take(down.read, at_tgt), jnp.zeros(())
    if settings.post_norms:
        wrote = take(down.wrote, at_tgt)
        divisor = lax.rsqrt(jnp.mean(wrote**2, axis=-1, keepdims=True) + settings.eps)
        x, written = x * divisor, jnp.sum((wrote * divisor) ** 2, axis=0)
    return _Sums(
        source=sums.source + dot(s.T, s),
        cross=sums.cross + dot(s.T, t),
        squares=sums.squares + jnp.sum(t**2, axis=0),
        inputs=sums.inputs + dot(x.T, x),
        wanted=sums.wanted + dot(x.T, s_adapted - s),
        present=sums.present + dot(x.T, t_adapted - t),
        written=sums.written + written,
        count=sums.count + jnp.sum(valid, dtype=jnp.float32),
    )


@partial(jax.jit, static_argnames="rank")
def _solve(sums: _Sums, gain: jax.Array, scale: jax.Array, rank: int) -> StackedFactors:
    """The update of one layer: a (R, I) and b (H, R)."""
    size_src, size_tgt = dimension_sizes(jnp.diagonal(sums.source)), dimension_sizes(sums.squares)
    # (H_src, H_tgt): from divided rows of the source's stream to divided rows of the target's.
    gram = sums.source / size_src[:, None] / size_src
    carry = ridge(gram, sums.cross / size_src[:, None] / size_tgt, PENALTY)
    missing = scale * dot(sums.wanted / size_src, carry) - sums.present / size_tgt
    # (z - g u)^2 + k u^2 = (g z / w - w u)^2 and a constant, with w^2 = g^2 + k: again a regression, of w u.
    reach = gain / size_tgt
    restraint = RESTRAINT * jnp.mean(reach**2 * sums.written) / jnp.maximum(sums.count, 1)
    weight = jnp.sqrt(reach**2 + restraint)
    weight = jnp.where(weight > 0, weight, 1)
    size_in = dimension_sizes(jnp.diagonal(sums.inputs))
    cross = missing * (reach / weight) / size_in[:, None]
    left, right = reduced_rank_ridge(sums.inputs / size_in[:, None] / size_in, cross, rank, PENALTY)
    # The singular values are split evenly: factors of one size lose least when they are stored in few bits.
    b, a, _ = recompress(right / weight[:, None], left.T / size_in, rank)
    return StackedFactors(a, b)


def _tokens_of(batch: ProbeBatch, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, (B, T) each, of the source (0) or the target (1)."""
    return (batch.tokens_tgt, batch.mask_tgt) if side else (batch.tokens_src, batch.mask_src)


def _check(
    source: BaseModel,
    target: BaseModel,
    batches: Sequence[ProbeBatch],
    layers: Sequence[int | None],
    rank: int,
    widest: int,
) -> None:
    if not 1 <= rank <= widest:
        msg = f"rank {rank} is out of range; {ROLE} of {target.ref} allows 1 to {widest}"
        raise UsageError(msg)
    if not batches:
        msg = "no probe batches were given to fit the residual stream on; give at least one"
        raise UsageError(msg)
    depth_src, depth_tgt = source.dims.layers, target.dims.layers
    if len(layers) != depth_tgt:
        msg = f"the layer map names {len(layers)} layers but the target has {depth_tgt}; name a source layer for each"
        raise PairingError(msg)
    fed = [feeder for feeder in layers if feeder is not None]
    if not fed or not 0 <= min(fed) <= max(fed) < depth_src:
        msg = f"the layer map names source layers {fed}, wanted at least one, of 0 to {depth_src - 1}"
        raise PairingError(msg)
