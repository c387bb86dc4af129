"""The compiled functions behind scores and fits of composed adapters: log-likelihoods, divergences and gradients."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.decoder import Model, divergence, forward, target_log_probs
from jcrosslora.evaluate import Example
from jcrosslora.shelf.composition.composition import Arrays, ComposedAdapter
from jcrosslora.shelf.composition.ways import Mixture
from jcrosslora.text import Reading
from jcrosslora.training import Batch, encode, make_batch
from jcrosslora.training.batches import rounded

_ROWS = 8
_LOGITS_AT_ONCE = 128
Trained = dict[str, Arrays]


def sum_by_answer(encoded: Sequence[Reading], values: Callable[[np.ndarray, Batch], jax.Array]) -> np.ndarray:
    """Sum values over the tokens of each of P answers: float64 (P,).

    `values` gets the numbers of B examples and their batch, and returns float32 (S,), 0 in empty slots.
    """
    order = np.argsort([len(one.ids) for one in encoded], kind="stable")
    slots = rounded(max(one.answer_tokens for one in encoded) * _ROWS)
    found = np.zeros(len(encoded))
    for start in range(0, len(order), _ROWS):
        used = order[start : start + _ROWS]
        # The last batch repeats an example, so that it has the shape of the others.
        members = np.concatenate([used, np.repeat(used[-1:], _ROWS - len(used))])
        width = rounded(max(len(encoded[index].ids) for index in members))
        batch = make_batch(encoded, members, width, slots)
        tokens = np.asarray(values(members, batch), np.float64)
        sums = np.bincount(np.asarray(batch.picked) // width, tokens, minlength=_ROWS)
        found[used] = sums[: len(used)]
    return found


@jax.jit
def answer_log_probs(model: Model, batch: Batch) -> jax.Array:
    """Return log p of each wanted token, the token that ends an answer included: float32 (S,), 0 in empty slots."""
    states = _states(model, batch)
    return target_log_probs(model, states[None], batch.wanted[None], chunk=_LOGITS_AT_ONCE)[0] * batch.used


@partial(jax.jit, static_argnames="remat")
def loss_and_gradient(
    model: Model, updates: ComposedAdapter, arrays: Trained, batch: Batch, owners: jax.Array, remat: bool = False
) -> tuple[jax.Array, Trained]:
    """Compute the mean KL(owner || composition) over the answers' tokens, nats, and its gradient by the arrays.

    `owners` are int32 (B,), the adapter of each text; `remat` recomputes each layer in the backward pass.
    """

    def loss(arrays: Trained) -> jax.Array:
        found = _token_divergence(model, updates.with_arrays(arrays), batch, owners, remat)
        return jnp.sum(found) / jnp.sum(batch.used)

    return jax.value_and_grad(loss)(arrays)


def mean_divergence(
    model: Model, tokenizer: Tokenizer, updates: ComposedAdapter, examples: Sequence[Example], owner: int
) -> float:
    """Compute the mean KL(owner || composition of all) over the tokens of an owner's examples' answers, nats."""
    encoded = [encode(tokenizer, one) for one in examples]

    def values(members: np.ndarray, batch: Batch) -> jax.Array:
        return _token_divergences(model, updates, batch, jnp.full(len(members), owner, jnp.int32))

    return float(sum_by_answer(encoded, values).sum() / sum(one.answer_tokens for one in encoded))


def _token_divergence(
    model: Model, updates: ComposedAdapter, batch: Batch, owners: jax.Array, remat: bool = False
) -> jax.Array:
    """float32 (S,): KL(owner || composition) before each token of an answer, 0 in empty slots."""
    count = next(iter(updates.roles.values())).a.shape[1]
    alone = jax.nn.one_hot(owners, count, dtype=jnp.float32)
    wanted = _states(model.with_adapter(updates.with_shares(alone, Mixture())), batch)
    states = _states(model.with_adapter(updates.with_shares(jnp.ones_like(alone))), batch, remat)
    return divergence(model, wanted, states, batch.wanted).kl * batch.used


_token_divergences = jax.jit(_token_divergence)


def _states(model: Model, batch: Batch, remat: bool = False) -> jax.Array:
    hidden = forward(model, batch.tokens, mask=batch.mask, remat=remat).hidden
    return hidden.reshape(-1, hidden.shape[-1])[batch.picked]
