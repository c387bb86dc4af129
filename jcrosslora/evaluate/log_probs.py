"""Log-probabilities of the scored tokens of question batches, under a base with several adapters at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import AppliedAdapter, Model, init_cache, target_log_probs
from jcrosslora.decoder.forward import extend_behind
from jcrosslora.errors import not_finite
from jcrosslora.evaluate.question_batches import Batch, Tokens, batches
from jcrosslora.utils.progress import Track, track

_STATES_AT_ONCE = 512  # states that the head gets in one call, over all models
_LOGITS_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class Models:
    """A base with several adapters.

    Attributes:
        model: the base, with adapters stacked over A.
        count: A.
    """

    model: Model
    count: int

    def one(self, place: int) -> Model:
        """Return the base with one of the adapters."""
        return self.model.with_adapter(jax.tree.map(lambda leaf: leaf[place], self.model.adapter))

    def batches(self, items: Sequence[Tokens], positions: int) -> Iterator[Batch]:
        """Batch questions as `question_batches.batches` does; choices that are rotated apart share no tokens."""
        switches = [rope.switch for rope in self.model.settings.ropes if rope.switch is not None]
        return batches([one.unshared() if any(map(one.straddles, switches)) else one for one in items], positions)


@dataclass(frozen=True, eq=False)
class TokenStates:
    """Hidden states in front of scored tokens.

    Attributes:
        hidden: float (A, S, H).
        wanted: int32 (S,), the tokens.
        places: int64 (S, 2), question and choice of each token.
    """

    hidden: np.ndarray
    wanted: np.ndarray
    places: np.ndarray

    def part(self, start: int, stop: int) -> "TokenStates":
        """Take the tokens from `start` to `stop`."""
        return TokenStates(self.hidden[:, start:stop], self.wanted[start:stop], self.places[start:stop])

    def then(self, other: "TokenStates") -> "TokenStates":
        """Append other tokens."""
        hidden = np.concatenate([self.hidden, other.hidden], axis=1)
        return TokenStates(
            hidden, np.concatenate([self.wanted, other.wanted]), np.concatenate([self.places, other.places])
        )


def log_prob_sums(
    models: Models, names: Sequence[str], items: Sequence[Tokens], batch_tokens: int, *, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the log-probabilities of the scored tokens of each choice of n questions with C choices at most.

    Args:
        models: a base, as an adapter of zeros, and its adapters; they run in one pass.
        names: of the base and of each adapter, for errors.
        items: the questions as tokens.
        batch_tokens: token positions in memory at once, over all models.
        unit: what is counted while it runs, in the plural.

    Returns:
        float64 (A, n, C), nats, NaN where a question has fewer choices; int64 (n, C), the scored tokens.

    Raises:
        AdapterError: the sums with an adapter are not finite.
        CheckpointError: those of the base are not finite.
    """
    # A row of log-probabilities for each model, and a last row of ones, which counts the tokens.
    sums = np.zeros((models.count + 1, len(items), max(len(one.tails) for one in items)))
    parts = models.batches(items, max(1, batch_tokens // models.count))
    with track(len(items), "score", unit) as bar:
        for places, values in _token_log_probs(models, parts, bar):
            for one, found in zip(sums, [*values, np.ones(len(places))], strict=True):
                np.add.at(one, tuple(places.T), found)
    tokens = sums[-1].astype(np.int64)
    log_probs = np.where(tokens > 0, sums[:-1], np.nan)
    for index, (one, name) in enumerate(zip(log_probs, names, strict=True)):
        if not np.isfinite(one[tokens > 0]).all():
            # The base comes first and was found finite.
            raise not_finite(names[0], name if index else None, values="log-probabilities", sound=True)
    return log_probs, tokens


def _token_log_probs(models: Models, parts: Iterator[Batch], bar: Track) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places int64 (S, 2), question and choice, and log-probabilities float32 (A, S) of scored tokens.

    Only the states in front of scored tokens go through the head, which costs more than the layers where the
    vocabulary is large. They are collected over batches, so that the head is compiled for one shape.
    """
    size = max(8, _STATES_AT_ONCE // models.count)
    rest = None
    for part in parts:
        found = token_states(models, part)
        rest = found if rest is None else rest.then(found)
        while len(rest.wanted) >= size:
            yield _finish(models, rest.part(0, size), size)
            rest = rest.part(size, len(rest.wanted))
        bar.update(part.questions)
    if rest is not None and len(rest.wanted):
        yield _finish(models, rest, size)


def token_states(models: Models, part: Batch) -> TokenStates:
    """Run the layers over a batch."""
    prefixes, tails = (part.prefix, part.prefix_mask), (part.tails, part.tail_mask)
    hidden = np.asarray(_tail_states(models.model, models.count, prefixes, part.owner, tails))
    return TokenStates(hidden.reshape(models.count, -1, hidden.shape[-1])[:, part.picked], part.wanted, part.places)


def _finish(models: Models, states: TokenStates, size: int) -> tuple[np.ndarray, np.ndarray]:
    used = len(states.wanted)
    hidden = np.pad(states.hidden, ((0, 0), (0, size - used), (0, 0)))
    wanted = np.pad(states.wanted, (0, size - used))
    return states.places, np.asarray(_log_probs(models.model.with_adapter(None), hidden, wanted))[:, :used]


@partial(jax.jit, static_argnames="count")
def _tail_states(
    model: Model,
    count: int,
    prefixes: tuple[jax.Array, jax.Array],
    owner: jax.Array,
    tails: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """(A, R, T, H): hidden states of the tails, each behind the prefix of its question; tokens and masks of both."""
    slots = prefixes[0].shape[1] + tails[0].shape[1]

    def one(adapter: AppliedAdapter | None) -> jax.Array:
        cache = init_cache(model.settings, prefixes[0].shape[0], slots, model.params.stream_dtype)
        return extend_behind(model.with_adapter(adapter), cache, prefixes, owner, tails)[0]

    return jax.vmap(one, axis_size=count)(model.adapter)


@jax.jit
def _log_probs(model: Model, states: jax.Array, wanted: jax.Array) -> jax.Array:
    """float32 (A, S): log-probabilities of tokens (S,) from states (A, S, H) in front of them."""
    targets = jnp.broadcast_to(wanted, states.shape[:2])
    return target_log_probs(model, states, targets, chunk=_LOGITS_AT_ONCE)
