"""Train a gate or a router: with all adapters at hand it is to predict what the one that owns a text predicts."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import DecoderSettings, Params, forward
from jcrosslora.decoder.log_probs import divergence
from jcrosslora.evaluate.examples import Example
from jcrosslora.shelf.composition.mixture import Mixture
from jcrosslora.shelf.composition.scoring import sum_by_answer
from jcrosslora.shelf.composition.updates import Arrays, ComposedAdapter, Rule
from jcrosslora.training.batches import Batch
from jcrosslora.training.examples import encode
from jcrosslora.training.run import train
from jcrosslora.training.settings import TrainingSettings

Owned = tuple[Example, int]
Trained = dict[str, Arrays]


def fit_arrays(
    base: BaseModel,
    settings: DecoderSettings,
    params: Params,
    tokenizer: Tokenizer,
    updates: ComposedAdapter,
    examples: Sequence[Owned],
    training: TrainingSettings,
) -> ComposedAdapter:
    """Train the arrays of a composition.

    Args:
        base: the model.
        settings: of the base.
        params: its weights.
        tokenizer: its tokenizer.
        updates: the adapters, with the arrays to start from.
        examples: each with the number of the adapter that owns it.
        training: its settings.

    Raises:
        UsageError: no example, settings out of range, or a loss that is not finite.
    """
    training.check()
    owners = np.array([owner for _, owner in examples], np.int32)

    def gradient_of(arrays: Trained, batch: Batch) -> tuple[jax.Array, Trained]:
        own = jnp.asarray(owners[np.asarray(batch.members)])
        return loss_and_gradient(settings, params, updates, arrays, batch, own, training.remat)

    # Trained arrays are used up, and these belong to the composition that was given.
    start = {role: jax.tree.map(jnp.array, one.arrays) for role, one in updates.roles.items()}
    texts = [text for text, _ in examples]
    return updates.with_arrays(train(base, texts, training, start, gradient_of, tokenizer=tokenizer))


@partial(jax.jit, static_argnums=(0, 6))
def loss_and_gradient(
    settings: DecoderSettings,
    params: Params,
    updates: ComposedAdapter,
    arrays: Trained,
    batch: Batch,
    owners: jax.Array,
    remat: bool = False,
) -> tuple[jax.Array, Trained]:
    """Compute the mean KL(owner || composition) over the answers' tokens, nats, and its gradient by the arrays.

    Args:
        settings: of the base.
        params: its weights.
        updates: N adapters.
        arrays: of the composition, by role.
        batch: B texts.
        owners: int32 (B,), the adapter of each text.
        remat: recompute each layer in the backward pass.
    """

    def loss(arrays: Trained) -> jax.Array:
        found = _token_divergence(settings, params, updates.with_arrays(arrays), batch, owners, remat)
        return jnp.sum(found) / jnp.sum(batch.used)

    return jax.value_and_grad(loss)(arrays)


def mean_divergence(
    settings: DecoderSettings,
    params: Params,
    tokenizer: Tokenizer,
    updates: ComposedAdapter,
    examples: Sequence[Example],
    owner: int,
) -> float:
    """Compute the mean KL(owner || composition) over the tokens of the examples' answers, nats.

    Args:
        settings: of the base.
        params: its weights.
        tokenizer: its tokenizer.
        updates: N adapters, all of which take part.
        examples: at least one.
        owner: the adapter that they belong to.
    """
    encoded = [encode(tokenizer, one) for one in examples]

    def values(members: np.ndarray, batch: Batch) -> jax.Array:
        owners = jnp.full(len(members), owner, jnp.int32)
        return _token_divergences(settings, params, updates, batch, owners)

    return float(sum_by_answer(encoded, values).sum() / sum(one.answer for one in encoded))


def _token_divergence(
    settings: DecoderSettings,
    params: Params,
    updates: ComposedAdapter,
    batch: Batch,
    owners: jax.Array,
    remat: bool = False,
) -> jax.Array:
    """float32 (S,): KL(owner || composition) in front of each token of an answer, 0 in empty slots."""
    count = next(iter(updates.roles.values())).a.shape[1]
    alone = jax.nn.one_hot(owners, count, dtype=jnp.float32)
    wanted = _states(settings, params, _with(updates, alone, Mixture()), batch)
    states = _states(settings, params, _with(updates, jnp.ones_like(alone), None), batch, remat)
    return divergence(settings, params, wanted, states, batch.wanted).kl * batch.used


_token_divergences = jax.jit(_token_divergence, static_argnums=0)


def _with(updates: ComposedAdapter, shares: jax.Array, how: Rule | None) -> ComposedAdapter:
    """Give the updates shares, float32 (B, N), and another rule where one is given."""
    found = updates.with_shares(shares)
    if how is None:
        return found
    return ComposedAdapter({role: dataclasses.replace(one, how=how) for role, one in found.roles.items()})


def _states(
    settings: DecoderSettings, params: Params, adapter: ComposedAdapter, batch: Batch, remat: bool = False
) -> jax.Array:
    hidden = forward(settings, params, batch.tokens, mask=batch.mask, adapter=adapter, remat=remat).hidden
    return hidden.reshape(-1, hidden.shape[-1])[batch.picked]
