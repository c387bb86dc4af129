"""A source behind a server, with the interface that a fit needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import AdapterInfo
from jcrosslora.checkpoint import Tokenizer, Vocabulary
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.decoder import Written
from jcrosslora.decoder.generate import UNFINISHED, as_written, cut_ids
from jcrosslora.distill.batches import DistillationBatch
from jcrosslora.distill.sources import Compared, ServedModel, answer_places, seeds_of
from jcrosslora.distill.sources.client import Answers, Client
from jcrosslora.distill.sources.connection import TEXTS, Connection, Sample, apart
from jcrosslora.distill.sources.opening import open_tokenizer
from jcrosslora.distill.sources.predictions import TokenNames, TopTokens, divergence, spread
from jcrosslora.distill.sources.replies import Fields, find_dialect
from jcrosslora.errors import CheckpointError, SourceError
from jcrosslora.text import Prompt
from jcrosslora.utils.digests import sha256
from jcrosslora.utils.progress import Track

_LOG = logging.getLogger(__name__)


class ServedWriter:
    """The base with its adapter, or the base alone, on a server."""

    def __init__(self, connection: Connection, tokenizer: Tokenizer, side: Fields, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._connection, self._side = connection, side

    def write(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        bar: Track | None = None,
    ) -> list[Written]:
        """Answer prompts, see `Writer.write`; only the last 2,048 tokens of each are read."""
        ids = cut_ids(self.tokenizer, prompts)
        seeds = (seeds_of(key, len(ids)) >> 1).tolist()  # 31 bits, which every server takes
        calls = [(row, max_new_tokens, temperature, seed) for row, seed in zip(ids, seeds, strict=True)]
        return self._connection.map(lambda call: self._answer(*call), calls, bar)

    def _answer(self, ids: np.ndarray, tokens: int, temperature: float, seed: int) -> Written:
        text, ended = self._connection.write(self._side, ids, tokens, temperature, seed)
        text = text.rstrip(UNFINISHED)
        return Written(text, len(self.tokenizer.encode(text, special=False).ids) + ended, ended)


class AmplifiedWriter(ServedWriter):
    """The base with the change that its adapter makes amplified, token by token among the likeliest ones."""

    def __init__(
        self, connection: Connection, tokenizer: Tokenizer, name: str, strength: float, plausible: float
    ) -> None:
        super().__init__(connection, tokenizer, connection.dialect.adapted, name)
        self._strength, self._plausible = strength, plausible

    def _answer(self, ids: np.ndarray, tokens: int, temperature: float, seed: int) -> Written:
        rng, row = np.random.default_rng(seed), ids
        while len(row) < len(ids) + tokens:
            sides = self._connection.dialect.adapted, self._connection.dialect.base
            adapted, base = (self._connection.predict(side, row, [len(row) - 1])[0] for side in sides)
            row = np.append(row, self._drawn(adapted, base, temperature, rng)).astype(np.int32)
            if row[-1] in self.tokenizer.stops:
                break
        return as_written(self.tokenizer, ids, row[len(ids) :])

    def _drawn(self, adapted: TopTokens, base: TopTokens, temperature: float, rng: np.random.Generator) -> int:
        likely = adapted.log_probs >= adapted.log_probs.max() + np.log(self._plausible)
        ids, own = adapted.ids[likely], adapted.log_probs[likely]
        scores = own + self._strength * (own - np.array([base.log_prob(int(token)) for token in ids]))
        if temperature == 0:
            return int(ids[scores.argmax()])
        weights = np.exp((scores - scores.max()) / temperature)
        return int(rng.choice(ids, p=weights / weights.sum()))


class ServedSource(ServedWriter):
    """A base with its adapter on a server, which returns only the probabilities of the likeliest tokens."""

    rank = None  # no server reports it

    def __init__(
        self, connection: Connection, served: ServedModel, tokenizer: Tokenizer, vocabulary: Vocabulary
    ) -> None:
        super().__init__(connection, tokenizer, connection.dialect.adapted, connection.dialect.base_name)
        self.ref, self.adapter_name, self.adapter = self.name, served.model, AdapterInfo(name=served.model)
        self._served, self._vocabulary, self._seen = served, vocabulary, self._sample()

    @classmethod
    def open(cls, served: ServedModel, answers: Path | None = None) -> ServedSource:
        """Connect to a server, and check that the adapter acts; the folder `answers` keeps answers for later runs.

        Raises SourceError if it does not answer, lacks the models, or predicts the same with the adapter and without,
        and CheckpointError if the tokenizer cannot be read.
        """
        tokenizer, vocabulary = open_tokenizer(served.tokenizer, chat_template=served.chat_template)
        if vocabulary.tokens is None:
            msg = f"{served.tokenizer}: {vocabulary.reason}, and the tokens of a server are told apart by it"
            raise CheckpointError(msg + ": give another tokenizer")
        client = Client(served)
        dialect = find_dialect(client, served)
        kept = Answers(answers, [client.url, served.model, dialect.base_name])
        connection = Connection(client, dialect, TokenNames(vocabulary), tokenizer.stops, served.top_logprobs, kept)
        found = cls(connection, served, tokenizer, vocabulary)
        seen = found._seen
        if (change := apart(seen.adapted, seen.plain)) <= seen.noise:
            msg = f"{client.url}: {served.model} predicts the same as {dialect.base_name} ({change:.2g} nats apart, "
            raise SourceError(msg + f"and noise up to {seen.noise:.2g}): check that the server loaded the adapter")
        if (most := max(connection.told)) < connection.asked:
            msg = "%s: tells the %d likeliest tokens at most, and was asked for %d: allow it more, or learn from these"
            _LOG.warning(msg, client.url, most, connection.asked)
        kept.renew(seen, seen.is_of)
        connection.check_tokenizer(dialect.base, tokenizer.encode(TEXTS[0]).ids, tokenizer.decode)
        return found

    def check_same(self) -> str | None:
        """Return a warning if the server does not answer any more.

        Raises SourceError if its predictions changed since it was opened, and drops its cached answers.
        """
        try:
            now = self._sample()
        except SourceError as error:
            return f"it is not known whether the source stayed the same while the adapter was moved ({error})"
        if not self._seen.is_of(now):
            self._connection.answers.renew(now, lambda _: False)
            msg = f"{self._served.url}: {self.adapter_name} or {self.name} predicts otherwise than at the beginning: "
            msg += "the server unloaded or changed a model while the adapter was moved, and its answers are dropped: "
            raise SourceError(msg + "run the command again, and leave the server as it is")
        return None

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the base."""
        return self._vocabulary

    def identity(self) -> Any:
        """Return the server's names of both models and a digest of the tokenizer."""
        served = self._served
        tokenizer = sha256(self.tokenizer.backend.to_str().encode())
        return ["served", served.url, served.model, self.name, served.top_logprobs, tokenizer]

    @property
    def how(self) -> str:
        """Say how it was queried, the end of a sentence."""
        mean = float(np.mean(self._connection.told))
        fewer = f" (it told {mean:.1f} on average)" if mean < self._connection.asked else ""
        most = f"{self._served.top_logprobs} likeliest tokens{fewer}"
        return f"asked as {self.adapter_name} over the OpenAI API, for the {most} at each position, and as {self.name}"

    def settings(self) -> dict[str, Any]:
        """Return the settings that query it again, by name; the address is not among them."""
        served = self._served
        names = {"model": served.model, "base_model": served.base_model, "tokenizer": str(served.tokenizer)}
        settings: dict[str, Any] = {f"source_{name}": public_name(value) for name, value in names.items()}
        most = {} if served.top_logprobs == ServedModel.top_logprobs else {"source_top_logprobs": served.top_logprobs}
        return settings | most

    def alone(self) -> ServedWriter:
        """Return the base without its adapter."""
        return ServedWriter(self._connection, self.tokenizer, self._connection.dialect.base, self.name)

    def amplified(self, strength: float, plausible: float) -> AmplifiedWriter:
        """Return the base with the change of its adapter amplified."""
        return AmplifiedWriter(self._connection, self.tokenizer, self.name, strength, plausible)

    def compare(self, texts: Sequence[np.ndarray], starts: Sequence[int], tokens: int) -> Compared:
        """Compare predictions on answers, see `Source.compare`; unknown tokens make the figures too low."""
        places = [answer_places(ids, start, tokens) for ids, start in zip(texts, starts, strict=True)]
        both = self._predict([(ids, at - 1) for ids, at in zip(texts, places, strict=True)], base=True)
        figures = Compared(*np.zeros((3, len(texts))))
        for number, (ids, at, (plain, adapted)) in enumerate(zip(texts, places, both, strict=True)):
            figures.change[number] = np.mean([divergence(a, b) for a, b in zip(adapted, plain, strict=True)])
            for nll, side in ((figures.base_nll, plain), (figures.adapted_nll, adapted)):
                nll[number] = -np.mean([top.log_prob(int(token)) for top, token in zip(side, ids[at], strict=True)])
        return figures

    def reader(self, columns: np.ndarray, ends: int) -> ServedReader:
        """Prepare predictions on columns."""
        return ServedReader(self, columns, ends)

    def _predict(
        self, rows: Sequence[tuple[np.ndarray, np.ndarray]], *, base: bool
    ) -> list[tuple[list[TopTokens], list[TopTokens]]]:
        """Return the predictions without and with the adapter at places of texts; without `base` both have it."""
        dialect = self._connection.dialect
        sides = (dialect.base, dialect.adapted) if base else (dialect.adapted,)
        calls = [(side, ids, at.tolist()) for side in sides for ids, at in rows]
        found = self._connection.map(lambda call: self._connection.predict(*call), calls)
        return list(zip(found[: len(rows)], found[-len(rows) :], strict=True))

    def _sample(self) -> Sample:
        return Sample.take(self._connection, self.tokenizer)


class ServedReader:
    """Predictions of a server on chosen columns."""

    complete = False

    def __init__(self, source: ServedSource, columns: np.ndarray, ends: int) -> None:
        self._source = source
        self._columns = len(columns) - ends + (ends > 0)
        self._place = np.full(max(source.tokenizer.vocab, int(columns.max(initial=0)) + 1), -1, np.int32)
        self._place[columns] = np.minimum(np.arange(len(columns)), self._columns - 1)

    def read(self, batch: DistillationBatch, own: jax.Array | None, *, base: bool) -> tuple[jax.Array, jax.Array]:
        """Predict at the positions of a batch, see `Reader.read`."""
        assert own is not None
        width = batch.tokens_src.shape[1]
        # Nothing is compared at the first position of a text: it stands for positions that the source does not have.
        asked = np.unique(batch.at_src[(batch.weight > 0) & (batch.at_src % width > 0)])
        rows = [(row, asked[asked // width == row] % width) for row in np.unique(asked // width).tolist()]
        texts = [(batch.tokens_src[row][batch.mask_src[row]], places) for row, places in rows]
        found = self._source._predict(texts, base=base)
        plain: dict[int, TopTokens] = {}
        adapted: dict[int, TopTokens] = {}
        for (row, places), both in zip(rows, found, strict=True):
            for known, tops in zip((plain, adapted), both, strict=True):
                known.update(zip((row * width + places).tolist(), tops, strict=True))
        read = self._filled(adapted, batch.at_src, own)
        return (self._filled(plain, batch.at_src, own) if base else read), read

    def _filled(self, known: dict[int, TopTokens], at: np.ndarray, own: jax.Array) -> jax.Array:
        """Put what is known at each position into the columns, and fill in the rest."""
        found = np.full((len(at), self._columns), -np.inf)
        rest, bound = np.zeros(len(at)), np.zeros(len(at))
        for row, place in enumerate(at.tolist()):
            top = known.get(place)
            if top is None:
                continue
            rest[row], bound[row] = np.log(top.rest), top.bound
            inside = top.ids < len(self._place)
            columns = np.where(inside, self._place[np.where(inside, top.ids, 0)], -1)
            # Several tokens that end a text are one column.
            np.logaddexp.at(found[row], columns[columns >= 0], top.log_probs[columns >= 0])
        return spread(*(jnp.asarray(values, jnp.float32) for values in (found, rest, bound)), own)
