"""The interface of a fit to its source, with and without adapter; and sources that our decoder does not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import jax
import numpy as np

from jcrosslora.errors import UsageError
from jcrosslora.utils.settings import Settings

if TYPE_CHECKING:  # a command that describes a source does not run one
    from jcrosslora.adapter import AdapterInfo
    from jcrosslora.checkpoint import Tokenizer, Vocabulary
    from jcrosslora.decoder import Written
    from jcrosslora.distill.batches import DistillationBatch
    from jcrosslora.text import Prompt
    from jcrosslora.utils.progress import Track


class Writer(Protocol):
    """Something that answers prompts. `name` is the base's name, for messages."""

    @property
    def tokenizer(self) -> Tokenizer: ...  # noqa: D102

    @property
    def name(self) -> str: ...  # noqa: D102

    def write(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        bar: Track | None = None,
    ) -> list[Written]:
        """Answer any number of prompts, texts or conversations; the beginning of very long ones may be cut off.

        A temperature of 0 takes the likeliest token. The bar advances by one for each prompt.
        """
        ...


class Compared(NamedTuple):
    """Predictions with an adapter and without on n answers: float64 (n,) each, nats, means over an answer's tokens.

    They are KL(with adapter || without), and -log p(token) without it and with it.
    """

    change: np.ndarray
    base_nll: np.ndarray
    adapted_nll: np.ndarray


def answer_places(ids: np.ndarray, start: int, tokens: int) -> np.ndarray:
    """Return the indices of the first answer tokens that have a token before them, int (n,).

    If the answer's first token also covers the end of the prompt, it counts as an answer token.
    """
    return np.arange(max(1, min(start, len(ids) - 1)), len(ids))[:tokens]


def seeds_of(key: jax.Array, count: int) -> np.ndarray:
    """Draw uint32 seeds from a key, for samplers that have no keys."""
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return np.random.SeedSequence(words).generate_state(count)


class Reader(Protocol):
    """The predictions of a source on chosen columns.

    It is complete if every column's probability is known. If a source returns only its likeliest tokens, `read` needs
    the predictions of another model to fill in the rest.
    """

    @property
    def complete(self) -> bool: ...  # noqa: D102

    def read(self, batch: DistillationBatch, own: jax.Array | None, *, base: bool) -> tuple[jax.Array, jax.Array]:
        """Predict at the positions of a batch.

        `own` float32 (P, C) are log-probabilities of another model; the mass of unknown columns is distributed in
        proportion to them. A complete reader ignores them. `base` says whether to predict without the adapter as well.

        Returns:
            float32 (P, C) log-probabilities without and with the adapter, normalised over the columns; the first is the
            second unless `base`. Values at positions of weight 0 are undefined.
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

        Only the first `tokens` tokens of each answer are compared.
        """
        ...

    def reader(self, columns: np.ndarray, ends: int) -> Reader:
        """Prepare predictions on columns of token ids, int32; the last `ends` of them end a text and are one column."""
        ...


class QueriedSource(Source, Protocol):
    """A source that can only be queried, such as a served model, with the facts about it for reports."""

    @property
    def adapter(self) -> AdapterInfo: ...  # noqa: D102

    @property
    def rank(self) -> int | None:
        """The rank of the adapter, None if it is not known."""
        ...

    @property
    def how(self) -> str:
        """Say how it was queried, the end of a sentence."""
        ...

    def check_same(self) -> str | None:
        """Raise SourceError if it is no longer what it was when it was opened; return a warning if it cannot tell."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings that query it again, by name; no addresses and no paths of this machine."""
        ...


@dataclass(frozen=True)
class ServedModel(Settings):
    """A base with an adapter that an OpenAI-compatible server runs: vLLM, SGLang, llama.cpp's or another.

    A key for the server is taken from the environment, JCROSSLORA_SOURCE_KEY or else OPENAI_API_KEY, and sent to this
    server alone.

    Attributes:
        url: such as http://host:8000/v1.
        model: the server's name of the base with the adapter.
        tokenizer: of the base: a folder with tokenizer.json, a GGUF file, or a hub id.
        base_model: the server's name of the base alone; None finds it: the adapter's parent (vLLM, SGLang), or the
            model with the adapter switched off (llama.cpp).
        chat_template: a file with a chat template that replaces the tokenizer's.
        top_logprobs: how many of the likeliest tokens to request; servers allow 20 by default.
        requests: the maximum number of concurrent requests.
        timeout: seconds that a whole answer may take.
    """

    url: str
    model: str
    tokenizer: str | Path
    base_model: str | None = None
    chat_template: str | Path | None = None
    top_logprobs: int = 20
    requests: int = 8
    timeout: float = 120.0

    def __post_init__(self) -> None:
        """Raise UsageError if the address is none, or holds a password or a query, or a number is out of range."""
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise UsageError(f"source_url is {self.url[:200]!r}, expected an address such as http://host:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            msg = "source_url holds a name, a password or a query, which do not belong there: give a key by the "
            raise UsageError(msg + "environment variable JCROSSLORA_SOURCE_KEY or OPENAI_API_KEY")
        for name in ("top_logprobs", "requests"):
            if getattr(self, name) < 1:
                raise UsageError(f"source_{name} is {getattr(self, name)}, expected 1 or more")
        if not self.timeout > 0:
            raise UsageError(f"the timeout of the source is {self.timeout}, expected a positive number of seconds")


@dataclass(frozen=True)
class TorchModel(Settings):
    """A base that transformers runs.

    Attributes:
        ref: a folder, a GGUF file or a hub id.
        tokenizer: a folder, a file or a hub id; None takes the one next to the weights.
        chat_template: a file with the template that takes the place of the tokenizer's own.
        device: such as "cpu" or "cuda:1"; None takes a GPU if torch has one.
    """

    ref: str | Path
    revision: str | None = None
    tokenizer: str | Path | None = None
    chat_template: str | Path | None = None
    device: str | None = None
