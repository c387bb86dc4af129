"""Log-probabilities of the choices of questions, under a base with several adapters at once.

The tokens that all choices of a question share are run once, then each choice continues them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, pad_right
from jcrosslora.decoder import AppliedAdapter, Model, init_cache, load_model, stack_adapters, target_log_probs
from jcrosslora.decoder.forward import extend_behind
from jcrosslora.decoder.model import StackedAdapter
from jcrosslora.decoder.prompt_batches import common_beginnings
from jcrosslora.decoder.row_adapters import RowAdapters
from jcrosslora.errors import UsageError, not_finite
from jcrosslora.evaluate.examples import Question
from jcrosslora.utils.progress import Track, track

_STATES_AT_ONCE = 512  # states that the head gets in one call, over all models
_LOGITS_AT_ONCE = 128
_SMALLEST = 8  # tokens that a shape is padded to


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a question and its choices.

    Attributes:
        prefix: int32 (P,), the tokens that all choices share.
        tails: int32 (T,) for each choice, the rest of its tokens; the first one is only read, never scored.
        scored: for each choice the index of the answer's first token in its tail, 1 or more.
    """

    prefix: np.ndarray
    tails: tuple[np.ndarray, ...]
    scored: tuple[int, ...]

    def straddles(self, length: int) -> bool:
        """Tell whether the text of one choice is longer than a length, and that of another is not."""
        return len({len(self.prefix) + len(tail) > length for tail in self.tails}) > 1

    def unshared(self) -> "Tokens":
        """Return the same with all tokens of each choice in its tail."""
        tails = tuple(np.concatenate([self.prefix, tail]) for tail in self.tails)
        return Tokens(self.prefix[:0], tails, tuple(first + len(self.prefix) for first in self.scored))


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions padded to one shape: Q questions, R rows with a choice each; S scored tokens.

    Attributes:
        prefix: int32 (Q, P), or (1, P) if all questions begin alike.
        prefix_mask: bool (Q, P).
        tails: int32 (R, T).
        tail_mask: bool (R, T).
        owner: int32 (R,), the question of each row.
        picked: int64 (S,), index into the flattened (R, T): the position before each scored token.
        wanted: int32 (S,), the scored tokens.
        places: int64 (S, 2), question (of the task) and choice of each scored token.
        questions: number of questions without padding.
    """

    prefix: np.ndarray
    prefix_mask: np.ndarray
    tails: np.ndarray
    tail_mask: np.ndarray
    owner: np.ndarray
    picked: np.ndarray
    wanted: np.ndarray
    places: np.ndarray
    questions: int


@dataclass(frozen=True, eq=False)
class Models:
    """A base with A adapters, stacked."""

    model: Model
    names: tuple[str, ...]  # (A,)

    @classmethod
    def of(cls, base: BaseModel, adapters: Sequence[Adapter], model: Model | None, dtype: DTypeLike) -> "Models":
        """Stack adapters after one of zeros, which is the base alone; load the base unless it is loaded already."""
        stacked = stack_adapters([Adapter(modules={}), *adapters], base)
        loaded = (model or load_model(base, dtype)).with_adapter(stacked)
        return cls(loaded, (base.name, *(adapter.info.name for adapter in adapters)))

    @property
    def count(self) -> int:
        """A."""
        return len(self.names)

    def one(self, place: int) -> Model:
        """Return the base with one of the adapters."""
        return self.model.with_adapter(jax.tree.map(lambda leaf: leaf[place], self.model.adapter))

    def by_row(self) -> Model | None:
        """Return the base with all adapters, of which each row of a batch has one; None if that is no `RowAdapters`."""
        stacked = self.model.adapter
        assert isinstance(stacked, StackedAdapter)
        adapters = RowAdapters.of(jax.tree.map(lambda leaf: leaf[1:], stacked))
        return None if adapters is None else self.model.with_adapter(adapters)

    def batches(self, items: Sequence[Tokens], positions: int) -> Iterator[Batch]:
        """Batch questions as `batches` does; choices that are rotated apart share no tokens."""
        switches = [rope.switch for rope in self.model.settings.ropes if rope.switch is not None]
        if not switches and not self.model.settings.recurrent:
            return batches(_behind_beginnings(items), positions)
        return batches([one.unshared() if any(map(one.straddles, switches)) else one for one in items], positions)


@dataclass(frozen=True, eq=False)
class TokenStates:
    """Hidden states before scored tokens.

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
    models: Models, items: Sequence[Tokens], batch_tokens: int, *, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the log-probabilities of the scored tokens of each choice of n questions with C choices at most.

    All models run in one pass, with `batch_tokens` token positions in memory at once, over all of them; `unit` is what
    is counted while it runs, in the plural.

    Returns:
        float64 (A, n, C), nats, NaN if a question has fewer choices; int64 (n, C), the scored tokens.

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
    for index, (one, name) in enumerate(zip(log_probs, models.names, strict=True)):
        if not np.isfinite(one[tokens > 0]).all():
            # The base comes first and was found finite.
            raise not_finite(models.names[0], name if index else None, values="log-probabilities", sound=True)
    return log_probs, tokens


def _token_log_probs(models: Models, parts: Iterator[Batch], bar: Track) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places int64 (S, 2), question and choice, and log-probabilities float32 (A, S) of scored tokens.

    Only the states before scored tokens go through the head, which costs more than the layers if the
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
    """(A, R, T, H): hidden states of the tails, each after the prefix of its question; tokens and masks of both."""
    slots = prefixes[0].shape[1] + tails[0].shape[1]

    def one(adapter: AppliedAdapter | None) -> jax.Array:
        cache = init_cache(model.settings, prefixes[0].shape[0], slots, model.params.stream_dtype)
        return extend_behind(model.with_adapter(adapter), cache, prefixes, owner, tails)[0]

    return jax.vmap(one, axis_size=count)(model.adapter)


@jax.jit
def _log_probs(model: Model, states: jax.Array, wanted: jax.Array) -> jax.Array:
    """float32 (A, S): log-probabilities of tokens (S,) from states (A, S, H) before them."""
    targets = jnp.broadcast_to(wanted, states.shape[:2])
    return target_log_probs(model, states, targets, chunk=_LOGITS_AT_ONCE)


def in_pieces(function: Callable[..., Any], size: int, *arrays: np.ndarray) -> Any:
    """Call a function of rows with `size` rows at a time, so that it is compiled once, and join what it returns."""
    count = len(arrays[0])
    padded = [np.pad(array, ((0, -count % size), *[(0, 0)] * (array.ndim - 1))) for array in arrays]
    found = [function(*(array[start : start + size] for array in padded)) for start in range(0, count, size)]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[:count], *found)


def tokenize(tokenizer: Tokenizer, question: Question) -> Tokens:
    """Encode prompt and choice as one text for each choice.

    The answer's tokens are those after the last token that ends in the prompt: a token that covers the end of the
    prompt and the start of the answer belongs to the answer.

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


def batches(items: Sequence[Tokens], positions: int) -> Iterator[Batch]:
    """Batch all questions in few shapes, the longest first, so that memory runs out at once or never.

    A batch has at most `positions` token positions, padding included, or a single question.
    """
    shapes: dict[tuple[int, int, bytes | None], list[int]] = {}
    owners = Counter(item.prefix.tobytes() for item in items if _alone(item))
    for index, item in enumerate(items):
        common = item.prefix.tobytes() if _alone(item) and owners[item.prefix.tobytes()] > 1 else None
        key = _rounded(len(item.prefix)), _rounded(max(map(len, item.tails))), common
        shapes.setdefault(key, []).append(index)
    choices = round(np.mean([len(item.tails) for item in items]))
    for (prefix, tail, common), members in sorted(shapes.items(), key=lambda entry: -sum(entry[0][:2])):
        usual = choices if common is None else 1
        fitting = max(1, positions // (prefix + usual * tail) if common is None else (positions - prefix) // tail)
        count = min(1 << (fitting.bit_length() - 1), 1 << (len(members) - 1).bit_length())
        rows = max(count * usual, *(len(items[index].tails) for index in members))
        for group in _packed(items, members, count, rows):
            yield _batch(items, group, (count if common is None else 1, prefix), (rows, tail))


def _alone(item: Tokens) -> bool:
    return len(item.tails) == 1 and len(item.prefix) > 0


def _behind_beginnings(items: Sequence[Tokens]) -> list[Tokens]:
    """Cut questions with one choice behind what several of them begin with, which is then read once for all."""
    found, places = list(items), [place for place, item in enumerate(items) if len(item.tails) == 1]
    whole = [items[place].unshared() for place in places]
    for group in common_beginnings([one.tails[0][: one.scored[0]] for one in whole]):
        for own in group.places:
            (tail,), (first,) = whole[own].tails, whole[own].scored
            found[places[own]] = Tokens(tail[: group.length], (tail[group.length :],), (first - group.length,))
    return found


def _packed(items: Sequence[Tokens], members: list[int], count: int, rows: int) -> Iterator[list[int]]:
    group: list[int] = []
    used = 0
    for index in members:
        need = len(items[index].tails)
        if group and (len(group) == count or used + need > rows):
            yield group
            group, used = [], 0
        group.append(index)
        used += need
    yield group


def _batch(items: Sequence[Tokens], group: list[int], head: tuple[int, int], body: tuple[int, int]) -> Batch:
    # Questions behind one beginning have one prefix together.
    prefix, prefix_mask = pad_right([items[index].prefix for index in group][: head[0]], head)
    tails, tail_mask = pad_right([tail for index in group for tail in items[index].tails], body)
    owner = np.zeros(body[0], np.int32)
    picked, wanted, places, row = [], [], [], 0
    for place, index in enumerate(group):
        for choice, (tail, first) in enumerate(zip(items[index].tails, items[index].scored, strict=True)):
            owner[row] = min(place, head[0] - 1)
            picked.append(row * body[1] + np.arange(first - 1, len(tail) - 1))
            wanted.append(tail[first:])
            places.append(np.tile([index, choice], (len(tail) - first, 1)))
            row += 1
    return Batch(
        *(prefix, prefix_mask, tails, tail_mask, owner),
        picked=np.concatenate(picked),
        wanted=np.concatenate(wanted),
        places=np.concatenate(places),
        questions=len(group),
    )


def _common(rows: Sequence[np.ndarray]) -> int:
    """Count the tokens that all rows start with."""
    shortest = min(map(len, rows))
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def _rounded(length: int) -> int:
    """Round up to 8, 16, 32, ...: every further shape has to be compiled, which costs more than the padding."""
    return max(_SMALLEST, 1 << (length - 1).bit_length()) if length else _SMALLEST
