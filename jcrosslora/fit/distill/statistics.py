"""The sums behind a step: for each module the gradient of the loss and the two factors of its Fisher matrix.

The loss is L = sum over positions of w KL(teacher || student). With x the input of a module at a position and f the
gradient of L with respect to its output there, the gradient with respect to its weight is the sum of f x'. The Fisher
matrix of the weight, which is the Gauss-Newton matrix of L, is approximated by A (x) G with A = sum x x' and G = sum
s s', where s is the gradient of -log p(y) for a token y drawn from the student itself (Martens and Grosse 2015, K-FAC,
arXiv 1503.05671).
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder import INPUT_SITES, DecoderSettings, LayerCapture, Params, StackedAdapter, forward
from jcrosslora.fit.distill.teacher import TaughtBatch, shared_scores, weighted_kl

_HIGHEST = lax.Precision.HIGHEST


@flax.struct.dataclass
class Statistics:
    """Sums over positions, float32, of the L layers that have a site or role.

    Attributes:
        inputs: site -> (L, I, I), A.
        outputs: role -> (L, O, O), G.
        gradients: role -> (L, O, I), the gradient; of batches before the last step the part that steps left over.
        loss: (), each batch's loss at the update with which it was read.
    """

    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    gradients: dict[str, jax.Array]
    loss: jax.Array


def zero_statistics(params: Params, roles: tuple[str, ...]) -> Statistics:
    """Zero-initialise the sums."""
    shapes = {role: params.weights[role].shape for role in roles}
    return Statistics(
        inputs={INPUT_SITES[role]: jnp.zeros((layers, i, i)) for role, (layers, _, i) in shapes.items()},
        outputs={role: jnp.zeros((layers, o, o)) for role, (layers, o, _) in shapes.items()},
        gradients={role: jnp.zeros(shape) for role, shape in shapes.items()},
        loss=jnp.zeros(()),
    )


@partial(jax.jit, static_argnums=0, static_argnames=("remat", "ends"), donate_argnums=1)
def add_batch(
    settings: DecoderSettings,
    totals: Statistics,
    params: Params,
    adapter: StackedAdapter,
    batch: TaughtBatch,
    key: jax.Array,
    *,
    remat: bool = False,
    ends: int = 0,
) -> Statistics:
    """Add a batch to the sums, whose memory the result takes over; with `remat` layers recompute their activations.

    The last `ends` rows of the head are one symbol, the end of the text.
    """
    roles = tuple(totals.gradients)
    perturbations = {role: _output_perturbation(params, role, batch.tokens.shape) for role in roles}

    def run(perturbations: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        perturbed = dataclasses.replace(params, biases={**params.biases, **perturbations})
        sites = tuple(totals.inputs)

        def reduce(seen: LayerCapture) -> dict[str, jax.Array]:
            return {site: seen.inputs[site] for site in sites if site in seen.inputs}

        out = forward(settings, perturbed, batch.tokens, mask=batch.mask, adapter=adapter, reduce=reduce, remat=remat)
        states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.at]
        return shared_scores(settings, params, states, ends), out.reduced

    scores, pull, inputs = jax.vjp(run, perturbations, has_aux=True)
    student = jax.nn.log_softmax(scores, axis=-1)
    weight = batch.weight[:, None]
    drawn = jax.nn.one_hot(jax.random.categorical(key, scores), scores.shape[-1], dtype=scores.dtype)
    (gradients,) = pull(weight * (jnp.exp(student) - jnp.exp(batch.teacher)))
    (sampled,) = pull(jnp.sqrt(weight) * (jnp.exp(student) - drawn))
    # The first position has huge activations without meaning, and says nothing about what a module's output is good
    # for.
    seen = batch.mask.astype(jnp.float32)[..., None]
    later = seen * (jnp.arange(batch.mask.shape[1]) > 0).astype(jnp.float32)[:, None]
    reads = {site: inputs[site] * seen for site in inputs}
    draws = {role: sampled[role] * later for role in roles}
    pulled = {role: gradients[role] * later for role in roles}
    return Statistics(
        inputs={site: _add_products(totals.inputs[site], x, x) for site, x in reads.items()},
        outputs={role: _add_products(totals.outputs[role], s, s) for role, s in draws.items()},
        gradients={
            role: _add_products(totals.gradients[role], f, inputs[INPUT_SITES[role]]) for role, f in pulled.items()
        },
        loss=totals.loss + weighted_kl(batch.teacher, student, batch.weight)[0],
    )


def _output_perturbation(params: Params, role: str, shape: tuple[int, ...]) -> jax.Array:
    """A bias (L, B, T, O) for every position: the derivative by it is that by the module's output there."""
    layers, width, _ = params.weights[role].shape
    zeros = jnp.zeros((layers, *shape, width))
    return zeros + params.biases[role].astype(jnp.float32)[:, None, None] if role in params.biases else zeros


def _add_products(total: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Add the sum over positions of x y' to total (L, M, N), from x (L, B, T, M) and y (L, B, T, N).

    Layers are added one after another, in the total's own memory: all at once would take as much again.
    """

    def one(layer: jax.Array, total: jax.Array) -> jax.Array:
        return total.at[layer].add(jnp.einsum("btm,btn->mn", x[layer], y[layer], precision=_HIGHEST))

    return lax.fori_loop(0, len(total), one, total)
