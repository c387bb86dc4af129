"""`residual-fit`: give the target's residual stream the change that an adapter gives the source's, in closed form.

Let h be the residual stream after a layer and dh the change that an adapter makes in it. For each target layer, from
the first to the last, with M the linear map from the source's stream to the target's,

    wanted = scale * M dh_src,   dW_down = argmin || wanted - dh_tgt - N(dW_down x) ||

where dh_tgt is the change of the target's stream after that layer by the adapter that the target has so far: a given
adapter, and the updates fitted to the layers before. x is the input of down_proj with that adapter. N is the norm after
down_proj, linearised: N(y) = gain * y / rms, with the rms of the position; the identity where the family has no such
norm. M is a ridge map and dW_down a ridge map of reduced rank, both fitted on the same positions. Every dimension is
divided by its size (see `jcrosslora.linalg.least_squares`): otherwise a few massive dimensions dominate the fit.

The linearised N allows large outputs of down_proj to write anything into a dimension of small gain. But large outputs
raise the rms, which suppresses everything that the MLP wrote before. A penalty on |dW_down x / rms|^2 prevents that,
with a weight of a tenth of the mean square that the norm writes into a dimension, relative to the dimension's size.

The streams, with and without adapter, are kept at all positions and advanced a layer at a time, so that each is
computed once. The fit of a layer needs sums of products over the positions, which are linear in the map M.
"""

from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, stack_adapter
from jcrosslora.decoder.residual_streams import Down, Stream, Texts
from jcrosslora.errors import AdapterError, PairingError, UsageError
from jcrosslora.evaluate.probes import PROBE_TOKENS, ProbeBatch
from jcrosslora.linalg import dimension_sizes, dot, recompress, reduced_rank_ridge, ridge
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import each

ROLE = "down_proj"
PENALTY = 1e-2  # ridge penalty, relative to the mean diagonal, which is that of a correlation matrix
# Weight of the output penalty, relative to the mean square that the norm after down_proj writes into a dimension, over
# the dimension's size.
RESTRAINT = 0.1


def residual_cost(texts: int) -> Cost:
    """Count a fit: each layer runs without and with the update, and the products take as long again on the target."""
    tokens = texts * PROBE_TOKENS
    return Cost(source=2 * tokens, target=4 * tokens, precise=True)


class ResidualFit:
    """Fits of the target's down_proj to what adapters change in the source's residual stream.

    Memory: the layers of both bases as float32; for every position of every batch, padding included, two streams of
    each base, and of the target the input and the output of one layer's down_proj (23 kB a position for a pair of 600
    wide models, 0.9 GB for 38,000 positions); the sums of one layer. Time: two forward passes of each base, and the
    products of down_proj's inputs.
    """

    def __init__(
        self,
        source: BaseModel,
        target: BaseModel,
        batches: Sequence[ProbeBatch],
        layers: Sequence[int | None],
        models: tuple[Model, Model] | None = None,
    ) -> None:
        """Read the texts.

        Args:
            batches: at least one; each shape among them is compiled once.
            layers: for each target layer the source layer whose stream it follows, or None for no update of that
                layer. Every step back in this list repeats the source's forward passes.
            models: source and target, if they are loaded already.

        Raises:
            UsageError: there are no batches, or the target's layers change the stream behind their MLP.
            PairingError: `layers` does not fit the bases, or feeds no layer.
            CheckpointError: weights cannot be read, or the decoder does not know the model.
        """
        _check(source, target, batches, layers)
        self._source, self._target, self._batches = source, target, batches
        self._held = target.layers_with(ROLE)
        self._layers = [feeder if layer in self._held else None for layer, feeder in enumerate(layers)]
        src, tgt = (None, None) if models is None else models
        self._texts = (
            Texts(source, src, [(one.tokens_src, one.mask_src) for one in batches]),
            Texts(target, tgt, [(one.tokens_tgt, one.mask_tgt) for one in batches]),
        )

    def fit(
        self, adapter: Adapter, current: StackedAdapter | None = None, *, rank: int = 16, scale: float = 0.6
    ) -> StackedAdapter:
        """Fit an update of each layer.

        Args:
            adapter: of the source, with fused matrices split (see `fit_to_base`).
            current: an adapter that the target has already; its effect is subtracted from the wanted change.
            rank: R of each update.
            scale: factor of the source's change.

        Returns:
            The updates without `current` (`join_stacked` adds the two): down_proj, a (L, R, I) and b (L, H, R), zero
            in layers without an update.

        Raises:
            UsageError: the rank is below 1 or above the short side of down_proj.
            AdapterError: the adapter does not fit the source, or a stream with it or with `current` is not finite.
        """
        target, (texts_src, texts_tgt) = self._target, self._texts
        hidden, inner = target.architecture.role_shapes[ROLE]
        if not 1 <= rank <= min(hidden, inner):
            msg = f"rank {rank} is out of range; {ROLE} of {target.ref} allows 1 to {min(hidden, inner)}"
            raise UsageError(msg)
        teacher, taught = Stream(texts_src, None), Stream(texts_src, stack_adapter(adapter, self._source))
        plain, student = Stream(texts_tgt, None), Stream(texts_tgt, current)
        a = np.zeros((len(self._held), rank, inner), np.float32)
        b = np.zeros((len(self._held), hidden, rank), np.float32)
        last = max(layer for layer, feeder in enumerate(self._layers) if feeder is not None)
        for layer in each(range(last + 1), "fit the residual stream", "layers"):
            plain.run_to(layer)
            feeder = self._layers[layer]
            if feeder is None:
                student.run_to(layer)
                continue
            downs = student.run_layer()
            teacher.run_to(feeder)
            taught.run_to(feeder)
            streams = [teacher.states, taught.states, plain.states, student.states]
            sums = self._summed(layer, streams, downs)
            factors = jax.block_until_ready(_solve(sums, student.gain(layer), jnp.float32(scale), rank))
            place = self._held.index(layer)
            a[place], b[place] = np.asarray(factors.a), np.asarray(factors.b)
            if not (np.isfinite(a[place]).all() and np.isfinite(b[place]).all()):
                where = f"the residual stream of {self._source.ref} with it, or of {target.ref} with the update fitted"
                msg = f"{adapter.info.name}: {where} so far, is not finite after layer {layer}: "
                raise AdapterError(msg + "the factors are too large or not numbers")
            student.apply(downs, factors)
            # Free the activations of this layer's down_proj before those of the next are computed.
            del downs
        return StackedAdapter({ROLE: StackedFactors(jnp.asarray(a), jnp.asarray(b))})

    def _summed(self, layer: int, streams: Sequence[Sequence[jax.Array]], downs: Sequence[Down]) -> "_Sums":
        """Sum over all batches; `streams` are the four of `_States`, with one array for each batch."""
        settings = self._texts[1].model.settings
        eps = settings.eps if settings.normed_behind(layer) else None
        sums = _no_sums(tuple(stream[0] for stream in streams), downs[0])
        for batch, down, *states in zip(self._batches, downs, *streams, strict=True):
            places = jnp.asarray(batch.at_src), jnp.asarray(batch.at_tgt), jnp.asarray(batch.valid)
            sums = jax.block_until_ready(_add(eps, sums, tuple(states), down, places))
        return sums


def _check(source: BaseModel, target: BaseModel, batches: Sequence[ProbeBatch], layers: Sequence[int | None]) -> None:
    if not batches:
        msg = "no probe batches were given to fit the residual stream on; give at least one"
        raise UsageError(msg)
    if "layer_scale" in target.architecture.tensors:
        msg = f"{target.ref}: layers of {target.family.name} change the stream behind {ROLE}, which the residual fit "
        raise UsageError(msg + "does not know; use distill")
    depth_src, depth_tgt = source.dims.layers, target.dims.layers
    if len(layers) != depth_tgt:
        msg = f"the layer map names {len(layers)} layers but the target has {depth_tgt}; name a source layer for each"
        raise PairingError(msg)
    fed = [feeder for feeder in layers if feeder is not None]
    if not set(target.layers_with(ROLE)) & {layer for layer, feeder in enumerate(layers) if feeder is not None}:
        msg = f"the layer map names source layers {fed}, wanted one for a layer of {target.ref} that has {ROLE}"
        raise PairingError(msg)
    if not 0 <= min(fed) <= max(fed) < depth_src:
        msg = f"the layer map names source layers {fed}, wanted at least one, of 0 to {depth_src - 1}"
        raise PairingError(msg)


@flax.struct.dataclass
class _Sums:
    """Sums over positions of one layer, float32; s and t are the streams of source and target, x the inputs.

    Where there is a norm after down_proj, x is divided by its rms.

    Attributes:
        source: (H_src, H_src), sum of s s'.
        cross: (H_src, H_tgt), sum of s t'.
        squares: (H_tgt,), sum of the squares of t.
        inputs: (I, I), sum of x x'.
        wanted: (I, H_src), sum of x ds'.
        present: (I, H_tgt), sum of x dt'.
        written: (H_tgt,), sum of the squares of down_proj's outputs over their rms; zeros where there is no norm.
    """

    source: jax.Array
    cross: jax.Array
    squares: jax.Array
    inputs: jax.Array
    wanted: jax.Array
    present: jax.Array
    written: jax.Array
    count: jax.Array


# Streams of the source without and with adapter, then of the target.
_States = tuple[jax.Array, ...]


def _no_sums(states: _States, down: Down) -> _Sums:
    assert down.read is not None
    src, tgt, inner = states[0].shape[-1], states[2].shape[-1], down.read.shape[-1]
    shapes = (src, src), (src, tgt), (tgt,), (inner, inner), (inner, src), (inner, tgt), (tgt,), ()
    return _Sums(*map(jnp.zeros, shapes))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(
    eps: float | None, sums: _Sums, states: _States, down: Down, places: tuple[jax.Array, jax.Array, jax.Array]
) -> _Sums:
    """Add the positions of one batch; places are `at_src`, `at_tgt` and `valid` of a `ProbeBatch`."""
    at_src, at_tgt, valid = places

    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])[at].astype(jnp.float32) * valid.astype(jnp.float32)[:, None]

    s, s_adapted = (take(state, at_src) for state in states[:2])
    t, t_adapted = (take(state, at_tgt) for state in states[2:])
    assert down.read is not None
    x, written = take(down.read, at_tgt), jnp.zeros(())
    if eps is not None:
        assert down.wrote is not None
        wrote = take(down.wrote, at_tgt)
        divisor = lax.rsqrt(jnp.mean(wrote**2, axis=-1, keepdims=True) + eps)
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
    """Solve for the update of one layer: a (R, I) and b (H, R)."""
    size_src, size_tgt = dimension_sizes(jnp.diagonal(sums.source)), dimension_sizes(sums.squares)
    # (H_src, H_tgt), between streams whose dimensions are divided by their sizes.
    gram = sums.source / size_src[:, None] / size_src
    carry = ridge(gram, sums.cross / size_src[:, None] / size_tgt, PENALTY)
    missing = scale * dot(sums.wanted / size_src, carry) - sums.present / size_tgt
    # (z - g u)^2 + k u^2 = (g z / w - w u)^2 + constant, with w^2 = g^2 + k: again a regression, for w u.
    reach = gain / size_tgt
    restraint = RESTRAINT * jnp.mean(reach**2 * sums.written) / jnp.maximum(sums.count, 1)
    weight = jnp.sqrt(reach**2 + restraint)
    weight = jnp.where(weight > 0, weight, 1)
    size_in = dimension_sizes(jnp.diagonal(sums.inputs))
    cross = missing * (reach / weight) / size_in[:, None]
    left, right = reduced_rank_ridge(sums.inputs / size_in[:, None] / size_in, cross, rank, PENALTY)
    # Split the singular values evenly: factors of equal size lose least in low-precision formats.
    b, a, _ = recompress(right / weight[:, None], left.T / size_in, rank)
    return StackedFactors(a, b)
