"""Answer the requests of lm-evaluation-harness: score continuations, and generate."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import Generator, Model, logits
from jcrosslora.errors import not_finite
from jcrosslora.evaluate.harness.options import Options
from jcrosslora.evaluate.log_probs import Models, Tokens, token_states
from jcrosslora.utils.progress import track

Pair = tuple[Sequence[int], Sequence[int]]
_LOGITS_AT_ONCE = 128


def judge(models: Models, pairs: Sequence[Pair], batch_tokens: int) -> list[tuple[float, bool]]:
    """Score the continuation of each pair; a context that several pairs share is run once.

    Args:
        models: one model.
        pairs: token ids of a context and its continuation, neither empty.
        batch_tokens: token positions in memory at once.

    Returns:
        The log-probability of each continuation, in nats, and whether each of its tokens is the likeliest one.
    """
    groups = _grouped(pairs, batch_tokens)
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    with track(len(pairs), "score", "continuations") as bar:
        for part in models.batches([_tokens(pairs, group) for group in groups], batch_tokens) if groups else ():
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
    base = models.model.with_adapter(None)
    found = [_compare(base, *part) for part in zip(states, tokens, strict=True)]
    values, likeliest = (
        np.concatenate(list(map(np.asarray, each)))[: len(wanted)] for each in zip(*found, strict=True)
    )
    return values, likeliest


@jax.jit
def _compare(model: Model, hidden: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores = logits(model, hidden)
    chosen = jnp.take_along_axis(scores, wanted[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1) == wanted


_NARROWEST = 8  # tokens of a prompt's row


def generate(generator: Generator, prompts: Sequence[Sequence[int]], options: Options, key: jax.Array) -> list[str]:
    """Continue prompts in one batch, which ends soon after its last stop string.

    Args:
        generator: the base with its adapter.
        prompts: token ids, none empty.
        options: where to end.
        key: from `jax.random.key`.

    Returns:
        The texts, without stop strings and special tokens.

    Raises:
        AdapterError, CheckpointError: see `Generator.continue_tokens`.
    """
    # Powers of two, since every further shape has to be compiled.
    shape = _rounded(len(prompts)), max(_NARROWEST, _rounded(max(map(len, prompts))))
    rows = generator.continue_tokens(
        prompts, options.length, options.temperature, key, shape=shape, until=options.until
    )
    return [_until(generator.tokenizer.decode(row), options.until) for row in rows]


def group_prompts(prompts: Sequence[tuple[list[int], Options]], batch_tokens: int) -> list[tuple[Options, list[int]]]:
    """Group the indices of prompts that are continued together: those with the same options, the longest first.

    Args:
        prompts: token ids and options.
        batch_tokens: token positions in memory at once; a batch has one prompt or more.
    """
    by_options: dict[Options, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index][0])):
        by_options.setdefault(prompts[index][1], []).append(index)
    groups = []
    for options, members in by_options.items():
        while members:
            count = max(1, batch_tokens // (len(prompts[members[0]][0]) + options.length))
            groups.append((options, members[:count]))
            members = members[count:]
    return groups


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()
