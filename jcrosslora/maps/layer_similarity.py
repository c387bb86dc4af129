"""The depth map `similar`: pair layers in order by the similarity of their residual streams (LoRASuite, 2505.13515)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import LayerCapture, Model, forward, load_model
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.probes import PROBE_TOKENS, ProbeBatch
from jcrosslora.linalg import dot
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import each

# The unbiased estimate divides by n - 3.
_FEWEST_POSITIONS = 4


def similarity_cost(texts: int) -> Cost:
    """Count the passes of both bases over probe texts."""
    return Cost(source=texts * PROBE_TOKENS, target=texts * PROBE_TOKENS, precise=True)


def layer_similarity(pair: BasePair, batches: Sequence[ProbeBatch]) -> np.ndarray:
    """Compute the linear CKA between the residual streams after every layer of two bases, at matched positions.

    CKA(X, Y) = HSIC(XX', YY') / sqrt(HSIC(XX', XX') HSIC(YY', YY')). HSIC is estimated batch by batch without bias
    (Song et al. 2012; minibatch CKA, Nguyen et al. 2021): a batch has fewer positions than the streams have
    dimensions, and the biased estimate is then near 1 for any two streams. Batches are weighted by their positions.
    HSIC includes centring: adding a constant to all rows of X does not change it. Dimensions are not scaled: if a few
    positions are far larger than the rest in one base only, the similarity is low.

    Memory: the weights of both bases as float32, and for one batch of P positions the streams of all layers and a P x P
    matrix for each layer.

    Returns float64 (L_src, L_tgt): 1 for streams that are equal up to rotation, scale and shift; about 0 for unrelated
    ones. Raises UsageError if no batch has four matched positions, and CheckpointError if weights cannot be read, or
    the decoder does not know a model.
    """
    models = load_model(pair.source), load_model(pair.target)
    names = ("tokens_src", "mask_src", "tokens_tgt", "mask_tgt", "at_src", "at_tgt", "valid")
    totals = [0.0, 0.0, 0.0]
    for batch in each(batches, "compare layers", "batches"):
        sums = _batch_sums(models, {name: jnp.asarray(getattr(batch, name)) for name in names})
        totals = [total + np.asarray(part, np.float64) for total, part in zip(totals, sums, strict=True)]
    cross, own_src, own_tgt = (np.asarray(total) for total in totals)
    if not (own_src.ndim and own_src.max() > 0 and own_tgt.max() > 0):
        msg = f"no batch of probe texts has {_FEWEST_POSITIONS} positions that both bases share; give longer texts"
        raise UsageError(msg)
    sizes = np.sqrt(np.maximum(own_src, 0))[:, None] * np.sqrt(np.maximum(own_tgt, 0))
    return np.divide(cross, sizes, out=np.zeros_like(cross), where=sizes > 0)


def ordered_layers(similarity: np.ndarray) -> tuple[int, ...]:
    """Return the source layer of every target layer, ascending, with the largest total similarity (L_src, L_tgt).

    All layers of the shallower base are used. Consecutive target layers have different source layers, as published;
    if the target is the deeper base (the published map then leaves target layers empty), they may share one.
    """
    layers_src, layers_tgt = similarity.shape
    repeats = layers_src < layers_tgt
    # best[t, s]: the largest total of target layers 0..t where t has source layer s.
    # before[t, s]: the source layer of t - 1 in that total.
    best = np.full((layers_tgt, layers_src), -np.inf)
    before = np.zeros((layers_tgt, layers_src), int)
    best[0, : 1 if repeats else layers_src] = similarity[: 1 if repeats else layers_src, 0]
    for t in range(1, layers_tgt):
        for s in range(layers_src):
            choices = range(max(s - 1, 0), s + 1) if repeats else range(s)
            if choices:
                before[t, s] = max(choices, key=lambda k: best[t - 1, k])
                best[t, s] = best[t - 1, before[t, s]] + similarity[s, t]
    last = layers_src - 1 if repeats else int(best[-1].argmax())
    path = [last]
    for t in range(layers_tgt - 1, 0, -1):
        path.append(int(before[t, path[-1]]))
    return tuple(reversed(path))


@jax.jit
def _batch_sums(models: tuple[Model, Model], batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute HSIC times n of one batch: (L_src, L_tgt) of both bases, (L_src,) and (L_tgt,) of each with itself."""
    grams = []
    for side, model in zip(("src", "tgt"), models, strict=True):
        at = batch[f"at_{side}"]

        def rows(seen: LayerCapture, at: jax.Array = at) -> jax.Array:
            return seen.residual.reshape(-1, seen.residual.shape[-1])[at].astype(jnp.float32)

        tokens, mask = batch[f"tokens_{side}"], batch[f"mask_{side}"]
        streams = forward(model, tokens, mask=mask, reduce=rows).reduced
        centred = jax.vmap(centred_gram, in_axes=(0, None))(streams, batch["valid"])
        grams.append(centred.reshape(centred.shape[0], -1))
    count = jnp.sum(batch["valid"].astype(jnp.float32))
    weight = jnp.where(count >= _FEWEST_POSITIONS, 1 / jnp.maximum(count - 3, 1), 0)
    src, tgt = grams
    return weight * dot(src, tgt.T), weight * jnp.sum(src**2, axis=1), weight * jnp.sum(tgt**2, axis=1)


def centred_gram(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Centre the Gram matrix of n valid rows of x (P, H): two have the inner product n (n - 3) times the unbiased HSIC.

    The result (P, P) is zero on the diagonal and in invalid rows and columns; every row and column sums to zero.
    """
    valid = valid.astype(x.dtype)
    count = jnp.sum(valid)
    # Subtract the mean for accuracy only: the mean of a stream is many times larger than its variation.
    x = (x - jnp.sum(x * valid[:, None], axis=0) / jnp.maximum(count, 1)) * valid[:, None]
    apart = valid[:, None] * valid * (1 - jnp.eye(x.shape[0], dtype=x.dtype))
    gram = dot(x, x.T) * apart
    sums = jnp.sum(gram, axis=0) / jnp.maximum(count - 2, 1)
    return (gram - sums[:, None] - sums + jnp.sum(sums) / jnp.maximum(count - 1, 1)) * apart
