"""Retrieval by words, the control: cosines of TF-IDF vectors, with no model at all.

Terms are words in lower case; idf = ln((1 + n) / (1 + df)) + 1 over the n samples of the shelf, and every vector has
length 1, as in scikit-learn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import scipy.sparse

from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieval.thresholds import similarity_to_others, thresholds_of
from jcrosslora.text import Prompt
from jcrosslora.text.completion import prompt_text

_WORD = re.compile(r"\w+")
NAME = "tfidf"


class WordRetriever:
    """Searches by the words of the samples."""

    name: ClassVar[str] = NAME

    def __init__(self, entries: Sequence[ShelfEntry]) -> None:
        counts = [Counter(_words(sample)) for entry in entries for sample in entry.samples]
        seen = Counter(word for count in counts for word in count)
        self._columns = {word: column for column, word in enumerate(seen)}
        self._idf = np.log((1 + len(counts)) / (1 + np.array(list(seen.values()), np.float64))) + 1
        samples = self._vectors(counts)
        owners = np.repeat(np.arange(len(entries)), [len(entry.samples) for entry in entries])
        ones = np.ones(len(owners))
        places = (owners, np.arange(len(owners)))
        sums = scipy.sparse.csr_array((ones, places), shape=(len(entries), len(owners))) @ samples
        self._means = _unit(sums)
        products = np.asarray(samples.multiply(sums[owners]).sum(axis=1)).ravel() if len(owners) else ones
        squares, totals = _squares(samples), _squares(sums)
        ends = np.cumsum([len(entry.samples) for entry in entries])
        similarities = []
        for entry, end, total in zip(entries, ends, totals, strict=True):
            own = slice(end - len(entry.samples), end) if len(entry.samples) > 1 else slice(0)
            similarities.append(similarity_to_others(products[own], squares[own], total))
        self.thresholds = thresholds_of(similarities)

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the cosines, float32 (P, N); -inf where no word is common."""
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
