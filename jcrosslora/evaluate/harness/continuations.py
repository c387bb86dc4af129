"""Score continuations of contexts: log-probability, and whether each token is the likeliest one."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import DecoderSettings, Params, logits
from jcrosslora.errors import not_finite
from jcrosslora.evaluate.log_probs import Models, token_states
from jcrosslora.evaluate.question_batches import Tokens, batches
from jcrosslora.utils.progress import track

Pair = tuple[Sequence[int], Sequence[int]]
_LOGITS_AT_ONCE = 128


def judge(models: Models, pairs: Sequence[Pair], batch_tokens: int, *, progress: bool) -> list[tuple[float, bool]]:
    """Score the continuation of each pair; a context that several pairs share is run once.

    Args:
        models: one model.
        pairs: token ids of a context and its continuation, neither empty.
        batch_tokens: token positions in memory at once.
        progress: whether to show a progress bar.

    Returns:
        The log-probability of each continuation, in nats, and whether each of its tokens is the likeliest one.
    """
    groups = _grouped(pairs, batch_tokens)
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    with track(len(pairs), "score", "continuations", show=progress) as bar:
        for part in batches([_tokens(pairs, group) for group in groups], batch_tokens) if groups else ():
            states = token_states(models, part)
            found, likeliest = _judged(models, states.hidden[0], states.wanted)
            owners = np.array([groups[item][choice] for item, choice in states.places])
            np.add.at(sums, owners, found.astype(np.float64))
            np.logical_and.at(greedy, owners, likeliest)
            bar.update(len(set(owners)))
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def check_finite(found: Sequence[tuple[float, bool]], base: BaseModel, adapter: Adapter | None) -> None:
    """Check that all values are finite.

    Raises:
        CheckpointError: one is not, and there is no adapter.
        AdapterError: one is not, with the adapter.
    """
    if not all(math.isfinite(value) for value, _ in found):
        raise not_finite(base.name, None if adapter is None else adapter.info.name, values="log-probabilities")


def _grouped(pairs: Sequence[Pair], batch_tokens: int) -> list[list[int]]:
    """Group the indices of pairs with the same context, so that no group is larger than a batch."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(index)
    groups = []
    for context, found in by_context.items():
        # Each continuation has a copy of the context's keys and values.
        size = max(1, batch_tokens // (len(context) + max(len(pairs[index][1]) for index in found)))
        groups += [found[start : start + size] for start in range(0, len(found), size)]
    return groups


def _tokens(pairs: Sequence[Pair], group: list[int]) -> Tokens:
    context = np.array(pairs[group[0]][0], np.int32)
    tails = tuple(np.concatenate([context[-1:], np.array(pairs[index][1], np.int32)]) for index in group)
    return Tokens(context[:-1], tails, (1,) * len(group))


def _judged(models: Models, hidden: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (S,) and bool (S,), from states (S, H) in front of tokens (S,)."""
    padding = -len(wanted) % _LOGITS_AT_ONCE
    states = np.pad(hidden, ((0, padding), (0, 0))).reshape(-1, _LOGITS_AT_ONCE, hidden.shape[-1])
    tokens = np.pad(wanted, (0, padding)).reshape(-1, _LOGITS_AT_ONCE)
    found = [_compare(models.settings, models.params, *part) for part in zip(states, tokens, strict=True)]
    values, likeliest = (
        np.concatenate(list(map(np.asarray, each)))[: len(wanted)] for each in zip(*found, strict=True)
    )
    return values, likeliest


@partial(jax.jit, static_argnames="settings")
def _compare(
    settings: DecoderSettings, params: Params, hidden: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    scores = logits(settings, params, hidden)
    chosen = jnp.take_along_axis(scores, wanted[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1) == wanted
