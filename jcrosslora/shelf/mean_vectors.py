"""Retrieval by vectors: the cosine of a prompt with the mean of an adapter's samples, whitened over the shelf.

The mean of a few sample prompts is LoraRetriever's (Zhao et al., arXiv 2402.09997). Hidden states of a base lie in a
narrow cone, in which all cosines are near 1: they are centred, and scaled by the covariance within the adapters'
samples, shrunk towards a multiple of the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from jcrosslora.shelf.encoders import Encoder
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieved import thresholds_of
from jcrosslora.text import Prompt

Blocks = Callable[[], Iterable[tuple[Sequence[ShelfEntry], np.ndarray]]]
Used = Callable[[np.ndarray], np.ndarray]  # tells from the numbers of an adapter's samples which ones are used
_FOLDS = 4
_MOST = 1 << 15  # samples whose covariance is taken, evenly spread over the adapters


@dataclass(frozen=True, eq=False)
class MeanVectors:
    """The vectors of N adapters, whitened over the shelf; D numbers of the encoder.

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
        found = unit_rows(self.whitened(vectors)) @ self.means.T
        return np.where(self.means.any(axis=1), found, -np.inf).astype(np.float32)


class TextRetriever:
    """Searches by an encoder's vectors."""

    def __init__(self, encoder: Encoder, fitted: MeanVectors) -> None:
        self._encoder, self._fitted = encoder, fitted
        self.thresholds = fitted.thresholds

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the cosines, float32 (P, N)."""
        return self._fitted.scores(self._encoder.encode(prompts))


def fit_means(blocks: Blocks) -> MeanVectors:
    """Fit means and whitening; the memory is that of one block, the means, and two matrices (D, D).

    The thresholds come from samples that neither the means nor the whitening have seen, a quarter at a time. The
    samples that a covariance was fitted to look more alike under it than new ones are. `blocks` is called several
    times, and returns the entries and vectors of each segment.
    """
    total = sum(len(vectors) for _, vectors in blocks())
    stride = -(-total // _MOST)  # the covariance is that of every stride-th adapter
    owners: list[np.ndarray] = []
    similarities: list[np.ndarray] = []
    for fold in range(_FOLDS):
        fitted = _fit(blocks, lambda number, fold=fold: number % _FOLDS != fold, stride)
        for part in _parts(blocks, lambda number, fold=fold: number % _FOLDS == fold):
            if not len(part.vectors):
                continue
            means = fitted.means[part.owner]
            known = means.any(axis=1)  # False for an adapter whose only sample is held out
            owners.append(part.owner[known])
            similarities.append(np.einsum("sd,sd->s", unit_rows(fitted.whitened(part.vectors)), means)[known])
    found = _fit(blocks, lambda number: number >= 0, stride)
    owner, similarity = np.concatenate([np.zeros(0, int), *owners]), np.concatenate([np.zeros(0), *similarities])
    ends = np.cumsum(np.bincount(owner, minlength=len(found.means)))
    by_adapter = np.split(similarity[np.argsort(owner, kind="stable")], ends[:-1])
    return replace(found, thresholds=thresholds_of(by_adapter))


@dataclass(frozen=True, eq=False)
class _Part:
    """Some samples of a block of adapters."""

    adapters: range  # numbers of the block's adapters on the shelf
    owner: np.ndarray  # int (S,), the number of each sample's adapter, ascending
    vectors: np.ndarray  # float32 (S, D)


def _parts(blocks: Blocks, used: Used) -> Iterator[_Part]:
    first = 0
    for entries, vectors in blocks():
        counts = np.array([len(entry.samples) for entry in entries], int)
        kept = used(np.concatenate([np.arange(count) for count in counts]))
        owner = np.repeat(np.arange(first, first + len(entries)), counts)
        yield _Part(range(first, first + len(entries)), owner[kept], vectors[kept])
        first += len(entries)


def _fit(blocks: Blocks, used: Used, stride: int) -> MeanVectors:
    """Fit means and whitening, without thresholds, to some of each adapter's samples."""
    means: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    scatter, freedom = np.zeros((0, 0)), 0
    for part in _parts(blocks, used):
        first, count = part.adapters.start, len(part.adapters)
        sums = np.zeros((count, part.vectors.shape[1]), np.float32)
        if len(starts := np.flatnonzero(np.diff(part.owner, prepend=-1))):
            sums[part.owner[starts] - first] = np.add.reduceat(part.vectors, starts, axis=0)
        counts.append(np.bincount(part.owner - first, minlength=count))
        means.append(sums / np.maximum(counts[-1], 1).astype(np.float32)[:, None])
        chosen = part.owner % stride == 0
        if chosen.any():
            centred = part.vectors[chosen] - means[-1][part.owner[chosen] - first]
            scatter = scatter + centred.T @ centred if len(scatter) else centred.T @ centred
            freedom += len(centred) - len(np.unique(part.owner[chosen]))
    width, known = len(scatter), np.concatenate(counts) > 0
    # A block without samples does not know the width.
    whole = np.concatenate([each if each.shape[1] else np.zeros((len(each), width), np.float32) for each in means])
    # A single mean minus itself has no direction.
    center = whole[known].mean(axis=0) if known.sum() > 1 else np.zeros(width, np.float32)
    whiten = np.ascontiguousarray(_inverse_root(scatter.astype(np.float64), freedom), np.float32)
    directions = np.where(known[:, None], unit_rows((whole - center) @ whiten.T), np.float32(0))
    return MeanVectors(center, whiten, directions, np.full(len(whole), np.inf, np.float32))


def _inverse_root(scatter: np.ndarray, freedom: int) -> np.ndarray:
    """Return L^-1 for L L' = the covariance, shrunk more if there are fewer degrees of freedom for the D numbers."""
    width = len(scatter)
    size = np.trace(scatter) / max(1, freedom * width)
    if size <= 0:
        return np.eye(width)
    share = width / (width + freedom)
    covariance = (1 - share) * scatter / freedom + share * size * np.eye(width)
    lower = np.linalg.cholesky(covariance)
    return scipy.linalg.solve_triangular(lower, np.eye(width), lower=True)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; rows of zeros stay."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 0)
