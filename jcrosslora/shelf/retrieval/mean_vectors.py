"""Retrieval by vectors: the cosine of a prompt with the mean of an adapter's samples, whitened over the shelf.

The mean of a few sample prompts is LoraRetriever's (Zhao et al., arXiv 2402.09997). Hidden states of a base lie in a
narrow cone, in which all cosines are near 1: they are centred, and scaled by the covariance within the adapters'
samples, shrunk towards a multiple of the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import scipy.linalg

from jcrosslora.shelf.encoders.encoder import Encoder
from jcrosslora.shelf.index import split_samples
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieval.thresholds import thresholds_of
from jcrosslora.text import Prompt

Blocks = Callable[[], Iterable[tuple[Sequence[ShelfEntry], np.ndarray]]]
Used = Callable[[np.ndarray], np.ndarray]  # of the places of an adapter's samples: which are used
NAME = "text"
_FOLDS = 4


@dataclass(frozen=True, eq=False)
class MeanVectors:
    """What a shelf's vectors are reduced to; N adapters, D numbers of the encoder.

    Attributes:
        center: (D,), the mean of the adapters' means.
        whiten: (D, D), lower triangular; `whitened` applies it.
        means: (N, D), of whitened samples, of length 1; zeros for an adapter without samples.
        thresholds: (N,).
    """

    center: np.ndarray
    whiten: np.ndarray
    means: np.ndarray
    thresholds: np.ndarray

    def whitened(self, vectors: np.ndarray) -> np.ndarray:
        """Whiten vectors (P, D)."""
        return (vectors - self.center) @ self.whiten.T

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """Return the cosines, float32 (P, N), of vectors (P, D) with the means."""
        found = _unit(self.whitened(vectors)) @ self.means.T
        return np.where(self.means.any(axis=1), found, -np.inf).astype(np.float32)


class TextRetriever:
    """Searches by an encoder's vectors."""

    name: ClassVar[str] = NAME

    def __init__(self, encoder: Encoder, fitted: MeanVectors) -> None:
        self._encoder, self._fitted = encoder, fitted
        self.thresholds = fitted.thresholds

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the cosines, float32 (P, N)."""
        return self._fitted.scores(self._encoder.encode(prompts))


def fit_means(blocks: Blocks) -> MeanVectors:
    """Reduce the vectors of a shelf; memory is that of one block, of the means, and of two matrices (D, D).

    The thresholds come from samples that neither the means nor the whitening have seen, a quarter at a time. Within the
    same samples the covariance makes them look more alike than new ones are.

    Args:
        blocks: gives the entries and vectors of each segment; called several times.
    """
    similarities: list[list[np.ndarray]] = []
    for fold in range(_FOLDS):
        fitted = _fit(blocks, lambda place, fold=fold: place % _FOLDS != fold)
        for place, own in enumerate(_samples(blocks, lambda place, fold=fold: place % _FOLDS == fold)):
            if not fold:
                similarities.append([])
            if len(own) and fitted.means[place].any():
                similarities[place].append(_unit(fitted.whitened(own)) @ fitted.means[place])
    thresholds = thresholds_of([np.concatenate([np.zeros(0), *parts]) for parts in similarities])
    return replace(_fit(blocks, lambda place: place >= 0), thresholds=thresholds)


def _fit(blocks: Blocks, used: Used) -> MeanVectors:
    """Fit to some of each adapter's samples; without thresholds."""
    sums, scatter, freedom = [], np.zeros((0, 0)), 0
    for own in _samples(blocks, used):
        if len(own):
            scatter = scatter if len(scatter) else np.zeros((own.shape[1],) * 2)
            mean = own.mean(axis=0, dtype=np.float64).astype(np.float32)
            centred = own - mean
            scatter += centred.T @ centred
            freedom += len(own) - 1
        sums.append(mean if len(own) else None)
    known = [mean for mean in sums if mean is not None]
    width = len(scatter)
    # A single mean less itself has no direction.
    center = np.mean(known, axis=0) if len(known) > 1 else np.zeros(width, np.float32)
    whiten = np.ascontiguousarray(_inverse_root(scatter, freedom), np.float32)
    means = np.array([center if mean is None else mean for mean in sums], np.float32).reshape(len(sums), width)
    return MeanVectors(center, whiten, _unit((means - center) @ whiten.T), np.full(len(sums), np.inf, np.float32))


def _samples(blocks: Blocks, used: Used) -> Iterator[np.ndarray]:
    """Yield of each adapter the vectors (m, D) of some of its samples."""
    for entries, vectors in blocks():
        for own in split_samples(vectors, entries):
            yield own[used(np.arange(len(own)))]


def _inverse_root(scatter: np.ndarray, freedom: int) -> np.ndarray:
    """Return L^-1 for L L' = the covariance, shrunk the more, the fewer degrees of freedom there are for D numbers."""
    width = len(scatter)
    size = np.trace(scatter) / max(1, freedom * width)
    if size <= 0:
        return np.eye(width)
    share = width / (width + freedom)
    covariance = (1 - share) * scatter / freedom + share * size * np.eye(width)
    lower = np.linalg.cholesky(covariance)
    return scipy.linalg.solve_triangular(lower, np.eye(width), lower=True)


def _unit(rows: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 0)
