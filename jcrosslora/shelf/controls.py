"""Two controls of the search: by the words of the samples, and by how much an adapter changes the base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.sources.models import with_own_template
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieved import similarity_to_others, thresholds_of
from jcrosslora.shelf.samples import spread
from jcrosslora.text import Message, Prompt
from jcrosslora.text.completion import prompt_text
from jcrosslora.text.reading import prompt_ids
from jcrosslora.utils.progress import track

_WORD = re.compile(r"\w+")
_PREDICTIONS = 16  # at the end of a prompt, the answer's first token among them
_BACKGROUND = 16  # samples of the whole shelf
_OF_ADAPTER = 8  # samples of an adapter, for its threshold
_LEAST = 1e-6  # nats; an adapter that changes less changes nothing


class WordRetriever:
    """Searches by the cosines of TF-IDF vectors of the samples, with no model at all.

    Terms are words in lower case; idf = ln((1 + n) / (1 + df)) + 1 over the n samples of the shelf, and every vector
    has length 1, as in scikit-learn.
    """

    def __init__(self, entries: Sequence[ShelfEntry]) -> None:
        counts = [Counter(_words(sample)) for entry in entries for sample in entry.samples]
        seen = Counter(word for count in counts for word in count)
        self._columns = {word: column for column, word in enumerate(seen)}
        self._idf = np.log((1 + len(counts)) / (1 + np.array(list(seen.values()), np.float64))) + 1
        samples = self._vectors(counts)
        owners = np.repeat(np.arange(len(entries)), [len(entry.samples) for entry in entries])
        ones = np.ones(len(owners))
        indices = (owners, np.arange(len(owners)))
        sums = scipy.sparse.csr_array((ones, indices), shape=(len(entries), len(owners))) @ samples
        self._means = _unit(sums)
        products = np.asarray(samples.multiply(sums[owners]).sum(axis=1)).ravel() if len(owners) else ones
        squares, totals = _squares(samples), _squares(sums)
        ends = np.cumsum([len(entry.samples) for entry in entries])
        similarities = []
        for entry, end, total in zip(entries, ends, totals, strict=True):
            rows = slice(end - len(entry.samples), end) if len(entry.samples) > 1 else slice(0)
            similarities.append(similarity_to_others(products[rows], squares[rows], total))
        self.thresholds = thresholds_of(similarities)

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the cosines, float32 (P, N); -inf if no word is common."""
        found = (self._vectors([Counter(_words(prompt)) for prompt in prompts]) @ self._means.T).toarray()
        return np.where(found > 0, found, -np.inf).astype(np.float32)

    def _vectors(self, counts: Sequence[Counter[str]]) -> scipy.sparse.csr_array:
        known = [
            (row, self._columns[word], number)
            for row, count in enumerate(counts)
            for word, number in count.items()
            if word in self._columns
        ]
        rows, columns, numbers = (
            (np.array(part) for part in zip(*known, strict=True)) if known else (np.zeros(0, int),) * 3
        )
        values = numbers * self._idf[columns] if known else np.zeros(0)
        return _unit(scipy.sparse.csr_array((values, (rows, columns)), shape=(len(counts), len(self._columns))))


def _words(prompt: Prompt) -> list[str]:
    return _WORD.findall(prompt_text(prompt).lower())


def _squares(rows: scipy.sparse.csr_array) -> np.ndarray:
    return np.asarray(rows.multiply(rows).sum(axis=1)).ravel()


def _unit(rows: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    size = np.sqrt(_squares(rows))
    return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / np.where(size > 0, size, 1)) @ rows)


class CertaintyRetriever:
    """Searches by how much every adapter changes what the base predicts at the end of a prompt.

    It needs no encoder, but an adapter of a format changes its base wherever an answer may begin, whatever the prompt
    is about (docs/shelf.md has figures). Adapters differ in size, so that each one's change is divided by its mean
    change on samples of the whole shelf. Nothing is kept: every search loads and runs every adapter.
    """

    def __init__(self, base: BaseModel, entries: Sequence[ShelfEntry], load: Callable[[str], Adapter]) -> None:
        """Run every adapter on samples; `load` loads one by its name."""
        self._base, self._entries, self._load = base, entries, load
        self._tokenizer, self._model = load_tokenizer(base), load_model(base, fast_dtype())
        samples = [(number, one) for number, entry in enumerate(entries) for one in entry.samples]
        background = spread(samples, _BACKGROUND)
        self._usual = np.ones(len(entries))
        scores = []
        for number, source in self._sources("measure adapters on samples"):
            changes = self._changes(source, entries[number], [one for _, one in background])
            # An adapter's samples would make its usual change large, and the fewer adapters there are, the larger.
            foreign = [change for change, (owner, _) in zip(changes, background, strict=True) if owner != number]
            self._usual[number] = np.mean(foreign) if foreign else 1.0
            of_adapter = spread(entries[number].samples, _OF_ADAPTER)
            scores.append(self._scores(number, self._changes(source, entries[number], of_adapter)))
        self.thresholds = thresholds_of(scores)

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return float32 (P, N): log of an adapter's change on a prompt over its usual change."""
        found = np.zeros((len(prompts), len(self._entries)), np.float32)
        for number, source in self._sources("run adapters on prompts"):
            found[:, number] = self._scores(number, self._changes(source, self._entries[number], prompts))
        return found

    def _sources(self, description: str) -> Iterator[tuple[int, DecoderSource]]:
        with track(len(self._entries), description, "adapters") as bar:
            for number, entry in enumerate(self._entries):
                adapter = self._load(entry.name)
                tokenizer = with_own_template(self._tokenizer, adapter.info.chat_template)
                yield number, DecoderSource.of(self._base, adapter, model=self._model, tokenizer=tokenizer)
                bar.update()

    def _changes(self, source: DecoderSource, entry: ShelfEntry, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return KL(with adapter || base), float64 (P,), over the last predictions of each prompt, in nats."""
        if not prompts:
            return np.zeros(0)
        ids = [prompt_ids(source.tokenizer, _as_asked(prompt, entry)) for prompt in prompts]
        # The token after a prompt stands for the prediction of the answer's first token; its value does not matter.
        texts = [np.append(row, np.int32(0)) for row in ids]
        starts = [max(1, len(text) - _PREDICTIONS) for text in texts]
        return source.compare(texts, starts, _PREDICTIONS)[0]

    def _scores(self, number: int, changes: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(changes, _LEAST) / max(self._usual[number], _LEAST)).astype(np.float32)


def _as_asked(prompt: Prompt, entry: ShelfEntry) -> Prompt:
    """Read a text as the message of a user if the adapter's samples are conversations."""
    chats = any(not isinstance(one, str) for one in entry.samples)
    return (Message("user", prompt),) if chats and isinstance(prompt, str) else prompt
