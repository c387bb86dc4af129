"""Log-likelihoods of right answers under composed adapters."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import DecoderSettings, Params, forward, target_log_probs
from jcrosslora.errors import not_finite
from jcrosslora.evaluate.examples import Example
from jcrosslora.shelf.composition.updates import ComposedAdapter
from jcrosslora.training.batches import Batch, make_batch, rounded
from jcrosslora.training.examples import Encoded, encode

_ROWS = 8
_LOGITS_AT_ONCE = 128


def answer_log_probs(
    settings: DecoderSettings,
    params: Params,
    tokenizer: Tokenizer,
    updates: ComposedAdapter,
    examples: Sequence[Example],
    shares: np.ndarray,
    names: tuple[str, str],
) -> np.ndarray:
    """Sum log p(token) over the tokens of each answer, the token that ends it included: float64 (P,), nats.

    Args:
        settings: of the base.
        params: its weights.
        tokenizer: its tokenizer.
        updates: the adapters.
        examples: P of them.
        shares: float32 (P, N).
        names: of the base and of the adapters, for errors.

    Raises:
        UsageError: an answer without a token of its own, or messages that the chat template refuses.
        AdapterError: a sum is not finite.
    """
    encoded = [encode(tokenizer, one) for one in examples]

    def log_probs(members: np.ndarray, batch: Batch) -> jax.Array:
        return _log_probs(settings, params, updates.with_shares(shares[members]), batch)

    found = sum_by_answer(encoded, log_probs)
    if not np.isfinite(found).all():
        raise not_finite(*names, values="log-probabilities")
    return found


def sum_by_answer(encoded: Sequence[Encoded], values: Callable[[np.ndarray, Batch], jax.Array]) -> np.ndarray:
    """Sum values of the tokens of each answer: float64 (P,).

    Args:
        encoded: P examples.
        values: of the numbers of examples, int (B,), and their batch: float32 (S,), 0 in empty slots.
    """
    order = np.argsort([one.length for one in encoded], kind="stable")
    slots = rounded(max(one.answer for one in encoded) * _ROWS)
    found = np.zeros(len(encoded))
    for start in range(0, len(order), _ROWS):
        used = order[start : start + _ROWS]
        # The last batch repeats an example, so that it has the shape of the others.
        members = np.concatenate([used, np.repeat(used[-1:], _ROWS - len(used))])
        width = rounded(max(encoded[index].length for index in members))
        batch = make_batch(encoded, members, width, slots)
        tokens = np.asarray(values(members, batch), np.float64)
        sums = np.bincount(np.asarray(batch.picked) // width, tokens, minlength=_ROWS)
        found[used] = sums[: len(used)]
    return found


@partial(jax.jit, static_argnums=0)
def _log_probs(settings: DecoderSettings, params: Params, adapter: ComposedAdapter, batch: Batch) -> jax.Array:
    """float32 (S,): log p of each wanted token, 0 in empty slots."""
    hidden = forward(settings, params, batch.tokens, mask=batch.mask, adapter=adapter).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[batch.picked]
    found = target_log_probs(settings, params, states[None], batch.wanted[None], chunk=_LOGITS_AT_ONCE)[0]
    return found * batch.used
