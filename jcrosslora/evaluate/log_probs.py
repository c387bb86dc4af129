"""Log-probabilities of the choices of questions, under a base with several adapters at once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import (
    AppliedAdapter,
    Model,
    forward,
    init_cache,
    likeliest,
    load_model,
    logits,
    stack_adapters,
)
from jcrosslora.decoder.forward import extend_behind
from jcrosslora.decoder.layout import Layout
from jcrosslora.decoder.model import StackedAdapter
from jcrosslora.decoder.row_adapters import RowAdapters
from jcrosslora.errors import UsageError, not_finite
from jcrosslora.evaluate.examples import Question
from jcrosslora.evaluate.packing import Batch, Tokens, packed, unpacked
from jcrosslora.utils.progress import Track, track

_LOGITS_AT_ONCE = 128  # hidden states per call of the output head, over all models


@dataclass(frozen=True, eq=False)
class Models:
    """A base with A adapters, stacked."""

    model: Model
    names: tuple[str, ...]  # (A,)

    @classmethod
    def of(cls, base: BaseModel, adapters: Sequence[Adapter], model: Model | None, dtype: DTypeLike) -> "Models":
        """Stack adapters after one of zeros, which is the base alone; load the base unless `model` is given."""
        stacked = stack_adapters([Adapter(modules={}), *adapters], base)
        loaded = (model or load_model(base, dtype)).with_adapter(stacked)
        return cls(loaded, (base.name, *(adapter.info.name for adapter in adapters)))

    @property
    def count(self) -> int:
        """The number of models, A."""
        return len(self.names)

    def one(self, place: int) -> Model:
        """Return the base with one of the adapters."""
        return self.model.with_adapter(jax.tree.map(lambda leaf: leaf[place], self.model.adapter))

    def by_row(self) -> Model | None:
        """Return a model that applies one adapter per row, or None if they cannot be batched."""
        stacked = self.model.adapter
        assert isinstance(stacked, StackedAdapter)
        adapters = RowAdapters.of(jax.tree.map(lambda leaf: leaf[1:], stacked))
        return None if adapters is None else self.model.with_adapter(adapters)

    def batches(self, items: Sequence[Tokens], positions: int) -> Iterator[Batch]:
        """Batch questions; choices with different rotary embeddings share no tokens."""
        settings = self.model.settings
        switches = settings.switches
        items = [one.unshared() if any(map(one.straddles, switches)) else one for one in items]
        return unpacked(items, positions) if settings.recurrent else packed(items, positions, share=not switches)


class Scored(NamedTuple):
    """Predictions of A models for S scored tokens.

    Attributes:
        places: int64 (S, 2), question and choice of each.
        wanted: int32 (S,), the tokens.
        log_probs: float32 (A, S), in nats.
        likeliest: int32 (A, S), the tokens that the models would write instead.
    """

    places: np.ndarray
    wanted: np.ndarray
    log_probs: np.ndarray
    likeliest: np.ndarray


def log_prob_sums(
    models: Models, items: Sequence[Tokens], batch_tokens: int, *, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the log-probabilities of the scored tokens of each choice of n questions with C choices at most.

    All models run in one pass, with `batch_tokens` token positions in memory over all models. `unit` is the unit of the
    progress bar, in the plural.

    Returns:
        See `summed`, with the same errors.
    """
    with track(len(items), "score", unit) as bar:
        return summed(models, items, scored_tokens(models, items, batch_tokens, bar))


def summed(models: Models, items: Sequence[Tokens], scored: Iterable[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Sum the log-probabilities of each choice from `scored_tokens`.

    Returns:
        float64 (A, n, C), nats, NaN if a question has fewer choices; int64 (n, C), the scored tokens.

    Raises:
        AdapterError: the sums with an adapter are not finite.
        CheckpointError: the base's sums are not finite.
    """
    # A row of log-probabilities for each model, and a last row of ones, which counts the tokens.
    sums = np.zeros((models.count + 1, len(items), max(len(one.tails) for one in items)))
    for found in scored:
        for one, values in zip(sums, [*found.log_probs, np.ones(len(found.places))], strict=True):
            np.add.at(one, tuple(found.places.T), values)
    tokens = sums[-1].astype(np.int64)
    log_probs = np.where(tokens > 0, sums[:-1], np.nan)
    for index, (one, name) in enumerate(zip(log_probs, models.names, strict=True)):
        if not np.isfinite(one[tokens > 0]).all():
            # The base was checked first.
            raise not_finite(models.names[0], name if index else None, values="log-probabilities", sound=True)
    return log_probs, tokens


def scored_tokens(models: Models, items: Sequence[Tokens], batch_tokens: int, bar: Track) -> Iterator[Scored]:
    """Run all models over questions, with `batch_tokens` token positions in memory over all models.

    Only the states before scored tokens go through the head, which costs more than the layers if the vocabulary is
    large. They are collected over batches, so that the head is compiled for one shape. The bar advances by one for each
    question.
    """
    size, head = max(8, _LOGITS_AT_ONCE // models.count), models.model.with_adapter(None)

    def predicted(states: np.ndarray, wanted: np.ndarray, places: np.ndarray) -> Scored:
        padding = (0, size - len(wanted))
        given = np.pad(states, (padding, (0, 0), (0, 0))).swapaxes(0, 1), np.pad(wanted, padding)
        return Scored(places, wanted, *(np.asarray(one)[:, : len(wanted)] for one in _predictions(head, *given)))

    waiting: list[np.ndarray] = []  # states (S, A, H), tokens and places
    for part in models.batches(items, max(1, batch_tokens // models.count)) if items else ():
        states = np.asarray(_row_states(models.model, models.count, *part.given))
        states = states.reshape(models.count, -1, states.shape[-1])[:, part.picked]
        new = [states.swapaxes(0, 1), part.wanted, part.places]
        waiting = [np.concatenate(pair) for pair in zip(waiting, new, strict=True)] if waiting else new
        while len(waiting[1]) >= size:
            yield predicted(*(one[:size] for one in waiting))
            waiting = [one[size:] for one in waiting]
        bar.update(part.questions)
    if waiting and len(waiting[1]):
        yield predicted(*waiting)


def likeliest_by_question(scored: Sequence[Scored], questions: int) -> list[np.ndarray]:
    """Return int32 (A, T) for each of n questions with one choice: the models' argmax at its scored tokens.

    Each prediction follows the right tokens before it (teacher forcing).
    """
    places = np.concatenate([one.places[:, 0] for one in scored])
    tokens = np.concatenate([one.likeliest for one in scored], axis=1)
    ordered = tokens[:, np.argsort(places, kind="stable")]
    return np.split(ordered, np.cumsum(np.bincount(places, minlength=questions))[:-1], axis=1)


@partial(jax.jit, static_argnames="count")
def _row_states(
    model: Model,
    count: int,
    rows: jax.Array,
    layout: Layout,
    beginnings: tuple[jax.Array, jax.Array] | None,
    owners: jax.Array,
) -> jax.Array:
    """Compute the hidden states (A, R, T, H) of rows under each of A adapters, see `Batch`."""

    def one(adapter: AppliedAdapter | None) -> jax.Array:
        own = model.with_adapter(adapter)
        if beginnings is None:
            return forward(own, rows, layout=layout).hidden
        (groups, length), dtype = beginnings[0].shape, model.params.stream_dtype
        cache = init_cache(model.settings, groups, length + rows.shape[1], dtype)
        return extend_behind(own, cache, beginnings, owners, (rows, layout))[0]

    return jax.vmap(one, axis_size=count)(model.adapter)


@jax.jit
def _predictions(model: Model, states: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute float32 (A, S) log-probabilities of tokens (S,) from states (A, S, H), and the likeliest tokens."""
    scores = logits(model, states)
    chosen = jnp.take_along_axis(scores, wanted[None, :, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1), likeliest(scores)


def tokenize(tokenizer: Tokenizer, question: Question) -> Tokens:
    """Tokenize the prompt with each choice as one text.

    The answer starts after the last token that ends in the prompt: a token that covers the end of the prompt and the
    start of the answer belongs to the answer.

    Raises:
        UsageError: a choice without a separate token, or without a token before it.
    """
    encoded = [tokenizer.encode(f"{question.prompt} {choice}") for choice in question.choices]
    length = len(question.prompt)
    firsts = [int(np.flatnonzero((one.ends >= 0) & (one.ends <= length)).max(initial=-1)) + 1 for one in encoded]
    for one, first, choice in zip(encoded, firsts, question.choices, strict=True):
        if not 1 <= first < len(one.ids):
            msg = f"choice {choice[:60]!r}: the tokenizer of {tokenizer.ref} gives it no separate token: reword it"
            raise UsageError(msg)
    shared = min(_common([one.ids for one in encoded]), *firsts) - 1
    cut = max(shared, 0)
    tails = tuple(one.ids[cut:] for one in encoded)
    return Tokens(encoded[0].ids[:cut], tails, tuple(first - cut for first in firsts))


def _common(rows: Sequence[np.ndarray]) -> int:
    """Count the tokens that all rows start with."""
    shortest = min(map(len, rows))
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))
