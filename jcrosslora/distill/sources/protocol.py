"""What a fit asks of a source: what it writes and what it predicts, with its adapter and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jcrosslora.adapter import AdapterInfo
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.decoder import Written
from jcrosslora.distill.batches import DistillationBatch
from jcrosslora.text import Prompt
from jcrosslora.utils.progress import Track


class Writer(Protocol):
    """Something that answers prompts."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base."""
        ...

    @property
    def name(self) -> str:
        """The name of the base, for messages."""
        ...

    def write(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        bar: Track | None = None,
    ) -> list[Written]:
        """Answer prompts.

        Args:
            prompts: any number, texts or conversations; the beginning of very long ones may be cut off.
            max_new_tokens: the most tokens of an answer.
            temperature: of the sampling; 0 takes the likeliest token.
            key: from `jax.random.key`.
            bar: a progress bar that advances by one for each prompt.
        """
        ...


class Compared(NamedTuple):
    """Predictions with an adapter and without on n answers: float64 (n,) each, nats, means over an answer's tokens.

    Attributes:
        change: KL(with adapter || without).
        base_nll: -log p(token) without it.
        adapted_nll: the same with it.
    """

    change: np.ndarray
    base_nll: np.ndarray
    adapted_nll: np.ndarray


class Reader(Protocol):
    """The predictions of a source on chosen columns.

    Attributes:
        complete: whether every column's probability is known. Where a source tells only its likeliest tokens, `read`
            needs predictions of another model.
    """

    @property
    def complete(self) -> bool: ...  # noqa: D102

    def read(self, batch: DistillationBatch, own: jax.Array | None, *, base: bool) -> tuple[jax.Array, jax.Array]:
        """Predict at the positions of a batch.

        Args:
            batch: the texts.
            own: float32 (P, C), log-probabilities of the columns by which the mass of those that are not known is
                spread; not used by a complete reader.
            base: whether to predict without the adapter as well.

        Returns:
            float32 (P, C) log-probabilities without and with the adapter, normalised over the columns; the first is the
            second unless `base`. What stands at positions without a weight is of no use.
        """
        ...


class Source(Writer, Protocol):
    """A source with its adapter; `write` answers with it."""

    @property
    def ref(self) -> str:
        """What was opened, for messages."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the base."""
        ...

    def identity(self) -> Any:
        """Return what its predictions depend on, as a JSON value."""
        ...

    def alone(self) -> Writer:
        """Return the base without its adapter."""
        ...

    def amplified(self, strength: float, plausible: float) -> Writer:
        """Return the base with the change that its adapter makes amplified; see `AmplifiedGenerator`."""
        ...

    def compare(self, texts: Sequence[np.ndarray], starts: Sequence[int], tokens: int) -> Compared:
        """Compare the predictions with and without the adapter on the answers in texts of int32 (T,) token ids.

        At most `tokens` tokens of an answer are looked at, from the one at its start.

        Returns:
            The figures of each text.
        """
        ...

    def reader(self, columns: np.ndarray, ends: int) -> Reader:
        """Prepare predictions on columns of token ids, int32; the last `ends` of them end a text and are one column."""
        ...


class QueriedSource(Source, Protocol):
    """A source that can only be queried, such as a served model, with what reports say of it.

    Attributes:
        adapter: what is known of its adapter.
        rank: of the adapter, None if it is not known.
    """

    @property
    def adapter(self) -> AdapterInfo: ...  # noqa: D102

    @property
    def rank(self) -> int | None: ...  # noqa: D102

    @property
    def how(self) -> str:
        """Say how it was queried, the end of a sentence."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings that query it again, by name; no addresses and no paths of this machine."""
        ...
