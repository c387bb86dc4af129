"""Training examples as tokens, and batches of them: of few shapes, in an order that the seed decides."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.evaluate.examples import Example, as_completion
from jcrosslora.text import read

_MULTIPLE = 16  # of widths and of answer slots: every further shape has to be compiled
_RARE = 1 / 16  # share of the steps below which it takes longer to compile for a width than it saves
_WINDOW = 16  # batches among which examples of similar length are put together


@dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of an example.

    Attributes:
        ids: int32 (T,), prompt and answer, with the token that ends the answer.
        first: index of the answer's first token, 1 or more.
    """

    ids: np.ndarray
    first: int

    @property
    def length(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def answer(self) -> int:
        """Number of the answer's tokens."""
        return len(self.ids) - self.first


def encode(tokenizer: Tokenizer, example: Example) -> Encoded:
    """Tokenize a prompt and its right answer.

    Raises:
        UsageError: the answer has no token of its own, or the base's chat template refuses the messages.
    """
    found = read(tokenizer, as_completion(example))
    return Encoded(found.ids, found.answer)


def digest(examples: Sequence[Encoded]) -> str:
    """Return the SHA-256 (hex) of the tokens of all examples in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.array([len(example.ids), example.first], "<i8").tobytes())
        found.update(example.ids.astype("<i4").tobytes())
    return found.hexdigest()


@flax.struct.dataclass
class Batch:
    """Examples padded on the right; B examples, T tokens, S slots for answer tokens.

    Attributes:
        tokens: int32 (B, T).
        mask: bool (B, T), False at padding.
        picked: int32 (S,), index into the flattened (B, T): the position in front of each answer token.
        wanted: int32 (S,), the answer tokens.
        used: float32 (S,), 1 for a token, 0 for an empty slot.
        members: int32 (B,), the number of each example.
    """

    tokens: jax.Array
    mask: jax.Array
    picked: jax.Array
    wanted: jax.Array
    used: jax.Array
    members: jax.Array


class Plan:
    """All batches of a run, known from the start, so that a run can continue at any step.

    Each pass over the examples is a new permutation. Among the examples of every 16 batches those of similar length are
    put together, so that less of a batch is padding; the order of these batches is random again.
    """

    def __init__(self, examples: Sequence[Encoded], batch: int, steps: int, seed: int):
        """Decide the order of `steps` batches of `batch` examples each."""
        self._examples = examples
        lengths, answers = (np.array([getattr(one, name) for one in examples]) for name in ("length", "answer"))
        self.members = _order(lengths, batch, steps, seed)
        self.widths = _widths(lengths[self.members].max(axis=1))
        found = answers[self.members].sum(axis=1)
        self._slots = {int(width): rounded(found[self.widths == width].max()) for width in np.unique(self.widths)}

    def batch(self, step: int) -> Batch:
        """Make the batch of a step, counted from 0."""
        width = int(self.widths[step])
        return make_batch(self._examples, self.members[step], width, self._slots[width])


def make_batch(examples: Sequence[Encoded], members: np.ndarray, width: int, slots: int) -> Batch:
    """Pad some of the examples.

    Args:
        examples: all of them.
        members: int (B,), which ones.
        width: T, at least the tokens of each.
        slots: S, at least the tokens of all their answers.
    """
    tokens, mask = np.zeros((len(members), width), np.int32), np.zeros((len(members), width), bool)
    picked = np.zeros(slots, np.int32)
    wanted, used = np.zeros_like(picked), np.zeros(picked.shape, np.float32)
    filled = 0
    for row, one in enumerate(examples[index] for index in members):
        tokens[row, : len(one.ids)], mask[row, : len(one.ids)] = one.ids, True
        place = slice(filled, filled + one.answer)
        picked[place] = row * width + np.arange(one.first - 1, len(one.ids) - 1)
        wanted[place], used[place] = one.ids[one.first :], 1
        filled += one.answer
    return Batch(*map(jnp.asarray, (tokens, mask, picked, wanted, used, members.astype(np.int32))))


def _order(lengths: np.ndarray, batch: int, steps: int, seed: int) -> np.ndarray:
    """int64 (steps, batch): the examples of each batch."""
    rng = np.random.default_rng(seed)
    total = steps * batch
    passes = [rng.permutation(len(lengths)) for _ in range(-(-total // len(lengths)))]
    order = np.concatenate(passes)[:total]
    window = _WINDOW * batch
    for start in range(0, total, window):
        part = order[start : start + window]
        by_length = part[np.argsort(lengths[part], kind="stable")].reshape(-1, batch)
        order[start : start + window] = rng.permutation(by_length).reshape(-1)
    return order.reshape(steps, batch)


def _widths(lengths: np.ndarray) -> np.ndarray:
    """int64 (steps,): widths for batches of these lengths; a rare width is replaced by the next wider one."""
    widths = np.array([rounded(length) for length in lengths])
    for width in np.unique(widths)[:-1]:
        here = widths == width
        if here.sum() < _RARE * len(widths):
            widths[here] = widths[widths > width].min()
    return widths


def rounded(length: int) -> int:
    """Round a width or a number of slots up, so that few shapes are compiled."""
    return -(-int(length) // _MULTIPLE) * _MULTIPLE
