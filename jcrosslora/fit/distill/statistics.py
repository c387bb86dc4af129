"""What a step is computed from: for each module the gradient of the loss and the two factors of its Fisher matrix.

The loss is L = sum over positions of w KL(teacher || student). With x the input of a module at a position and f the
gradient of L with respect to its output there, the gradient with respect to its weight is the sum of f x'. The Fisher
matrix of the weight, which is the Gauss-Newton matrix of L, is approximated by A (x) G with A = sum x x' and G = sum
s s', where s is the gradient of -log p(y) for a token y drawn from the student itself (Martens and Grosse 2015, K-FAC,
arXiv 1503.05671).
"""

import dataclasses
import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder import INPUT_SITES, DecoderSettings, LayerCapture, Params, StackedAdapter, forward, logits
from jcrosslora.fit.distill.reduced_base import weighted_kl

_HIGHEST = lax.Precision.HIGHEST
# Bytes that the layers may keep for the two backward passes: to compute them again takes two more forward passes.
_KEPT = 4 * 2**30


@flax.struct.dataclass
class Statistics:
    """Sums over positions, float32, of L layers.

    Attributes:
        inputs: site -> (L, I, I), A.
        outputs: role -> (L, O, O), G.
        gradients: role -> (L, O, I), the gradient, of earlier batches what steps left over of it.
        loss: (), the loss of each batch where it was read.
    """

    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    gradients: dict[str, jax.Array]
    loss: jax.Array


@flax.struct.dataclass
class Read:
    """A batch as the student reads it.

    Attributes:
        tokens: int32 (B, T), rows of the embedding.
        mask: bool (B, T).
        at: int32 (P,), flat positions.
        weight: float32 (P,).
        teacher: float32 (P, V), log-probabilities.
    """

    tokens: jax.Array
    mask: jax.Array
    at: jax.Array
    weight: jax.Array
    teacher: jax.Array


def no_statistics(params: Params, roles: tuple[str, ...]) -> Statistics:
    """Sums of nothing."""
    shapes = {role: params.weights[role].shape for role in roles}
    return Statistics(
        inputs={INPUT_SITES[role]: jnp.zeros((layers, i, i)) for role, (layers, _, i) in shapes.items()},
        outputs={role: jnp.zeros((layers, o, o)) for role, (layers, o, _) in shapes.items()},
        gradients={role: jnp.zeros(shape) for role, shape in shapes.items()},
        loss=jnp.zeros(()),
    )


def keeps_much(settings: DecoderSettings, shape: tuple[int, ...]) -> bool:
    """Whether what the layers keep for the backward passes of a batch of (B, T) tokens takes more than 4 GB.

    At a position about four times the MLP's width and eight times those of the stream and of attention, in float32: so
    XLA's memory analysis has it for bases of 0.1B to 8B parameters.
    """
    width = 4 * settings.intermediate + 8 * (settings.hidden + settings.heads * settings.head_dim)
    return 4 * settings.layers * math.prod(shape) * width > _KEPT


@partial(jax.jit, static_argnums=0, static_argnames="remat", donate_argnums=1)
def add_batch(
    settings: DecoderSettings,
    totals: Statistics,
    params: Params,
    adapter: StackedAdapter,
    read: Read,
    key: jax.Array,
    *,
    remat: bool = False,
) -> Statistics:
    """Add a batch to the sums, whose memory is used for the result; with `remat` layers keep nothing (`keeps_much`)."""
    roles = tuple(totals.gradients)
    output_perturbations = {role: _nudge(params, role, read.tokens.shape) for role in roles}

    def run(output_perturbations: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        # A bias for every position: the derivative by it is the derivative by the module's output there.
        nudged = dataclasses.replace(params, biases={**params.biases, **output_perturbations})
        sites = tuple(totals.inputs)

        def reduce(seen: LayerCapture) -> dict[str, jax.Array]:
            return {site: seen.inputs[site] for site in sites}

        out = forward(settings, nudged, read.tokens, mask=read.mask, adapter=adapter, reduce=reduce, remat=remat)
        states = out.hidden.reshape(-1, out.hidden.shape[-1])[read.at]
        return logits(settings, params, states), out.reduced

    scores, pull, inputs = jax.vjp(run, output_perturbations, has_aux=True)
    student = jax.nn.log_softmax(scores, axis=-1)
    weight = read.weight[:, None]
    drawn = jax.nn.one_hot(jax.random.categorical(key, scores), scores.shape[-1], dtype=scores.dtype)
    (gradients,) = pull(weight * (jnp.exp(student) - jnp.exp(read.teacher)))
    (sampled,) = pull(jnp.sqrt(weight) * (jnp.exp(student) - drawn))
    # The first position has huge activations of no meaning: it tells nothing of what a module's output is good for.
    seen = read.mask.astype(jnp.float32)[..., None]
    later = seen * (jnp.arange(read.mask.shape[1]) > 0).astype(jnp.float32)[:, None]
    return Statistics(
        inputs={site: _add_products(totals.inputs[site], inputs[site] * seen, inputs[site] * seen) for site in inputs},
        outputs={
            role: _add_products(totals.outputs[role], sampled[role] * later, sampled[role] * later) for role in roles
        },
        gradients={
            role: _add_products(totals.gradients[role], gradients[role] * later, inputs[INPUT_SITES[role]])
            for role in roles
        },
        loss=totals.loss + weighted_kl(read.teacher, student, read.weight)[0],
    )


def _nudge(params: Params, role: str, shape: tuple[int, ...]) -> jax.Array:
    layers, width, _ = params.weights[role].shape
    output_perturbation = jnp.zeros((layers, *shape, width))
    if role in params.biases:
        output_perturbation = output_perturbation + params.biases[role].astype(jnp.float32)[:, None, None]
    return output_perturbation


def _add_products(total: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """(L, M, N): total, and the sum over positions of x y', from (L, B, T, M) and (L, B, T, N).

    One layer after another, in the total's own memory: the sums of all modules at once would take as much again.
    """

    def one(layer: jax.Array, total: jax.Array) -> jax.Array:
        return total.at[layer].add(jnp.einsum("btm,btn->mn", x[layer], y[layer], precision=_HIGHEST))

    return lax.fori_loop(0, len(total), one, total)
