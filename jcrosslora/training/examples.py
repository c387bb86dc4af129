"""Training examples as tokens: a prompt and the answer that should follow it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.evaluate.examples import Example, as_completion
from jcrosslora.text import read


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
