"""Search results, thresholds without labels, and the searches by vectors and by words.

The threshold of an adapter is the score that 95% of its samples exceed; each sample is scored against the adapter's
other samples. As in LoraRetriever (Zhao et al., arXiv 2402.09997), the mean of a few sample prompts represents an
adapter. Hidden states of a base lie in a narrow cone, with all cosines near 1, so they are centred and whitened by the
covariance within the adapters' samples, shrunk towards a multiple of the identity.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import scipy.sparse

from jcrosslora.errors import UsageError
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.text import Prompt, prompt_text

_MISSED = 0.05  # share of an adapter's samples below its threshold
_ENOUGH = 8  # samples from which an adapter gets a threshold; with fewer it takes that of the whole shelf
_FOLDS = 4
_MOST = 1 << 15  # samples whose covariance is taken, evenly spread over the adapters
_WORD = re.compile(r"\w+")
Blocks = Callable[[], Iterable[tuple[Sequence[ShelfEntry], np.ndarray]]]
Used = Callable[[np.ndarray], np.ndarray]  # tells from the numbers of an adapter's samples which ones are used


@dataclass(frozen=True, eq=False)
class Retrieved:
    """The adapters of a shelf for P prompts; a `count` below 1 raises UsageError.

    Attributes:
        scores: float32 (P, N), how well each suits; -inf if nothing is known of an adapter.
        thresholds: float32 (N,), the least score of a prompt that counts as one of the adapter's task.
    """

    names: tuple[str, ...]
    scores: np.ndarray
    thresholds: np.ndarray

    @property
    def accepted(self) -> np.ndarray:
        """Whether a prompt counts as one of an adapter's task, bool (P, N)."""
        return np.isfinite(self.scores) & (self.scores >= self.thresholds)

    def ranked(self, count: int = 1) -> np.ndarray:
        """Return int (P, min(count, N)): the adapters with the best scores, the best first, accepted or not."""
        return _best(self.scores, count)

    def best(self, count: int = 1) -> list[list[tuple[str, float]]]:
        """Return for each prompt the names and scores of at most `count` accepted adapters, the best first.

        A prompt of no adapter's task has none: the base alone should answer it.
        """
        accepted = self.accepted
        return [
            [(self.names[number], float(self.scores[row, number])) for number in numbers if accepted[row, number]]
            for row, numbers in enumerate(_best(np.where(accepted, self.scores, -np.inf), count))
        ]

    def weights(self, count: int = 1) -> np.ndarray:
        """Return float32 (P, N): equal weights, of sum 1, on the best `count` accepted adapters of each prompt.

        A row of zeros stands for the base alone.
        """
        found, accepted = np.zeros(self.scores.shape, np.float32), self.accepted
        best = _best(np.where(accepted, self.scores, -np.inf), count)
        np.put_along_axis(found, best, np.float32(1), axis=1)
        found *= accepted
        return found / np.maximum(found.sum(axis=1, keepdims=True), 1)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    if count < 1:
        raise UsageError(f"{count} adapters were asked for; expected 1 or more")
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


@dataclass(frozen=True, eq=False)
class Retriever:
    """Finds adapters for prompts: `scores` gives those of P prompts, float32 (P, N); see `Retrieved`."""

    scores: Callable[[Sequence[Prompt]], np.ndarray]
    thresholds: np.ndarray


def similarity_to_others(products: np.ndarray, squares: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Compute the cosine of each of m vectors x with the sum of the m - 1 others.

    The arguments are scalar products with the sum M of all: `products` (m,) x M, `squares` (m,) x x, `total` M M.
    """
    products, squares = np.asarray(products, np.float64), np.asarray(squares, np.float64)
    others = np.maximum(total - 2 * products + squares, 0)
    size = np.sqrt(squares * others)
    return np.divide(products - squares, size, out=np.zeros_like(size), where=size > 0)


def thresholds_of(similarities: Sequence[np.ndarray]) -> np.ndarray:
    """Choose the thresholds, float32 (N,), by the similarities of each adapter's samples.

    It is infinity, which accepts nothing, if neither the adapter nor the shelf has samples.
    """
    pooled = np.concatenate([np.zeros(0), *similarities])
    common = np.quantile(pooled, _MISSED) if len(pooled) else np.inf
    found = [np.quantile(each, _MISSED) if len(each) >= _ENOUGH else common for each in similarities]
    return np.array(found, np.float32)


@dataclass(frozen=True, eq=False)
class MeanVectors:
    """The vectors of N adapters, whitened over the shelf; D numbers of the encoder.

    Attributes:
        center: (D,), the mean of the adapters' means.
        whiten: (D, D), lower triangular; `whitened` applies it.
        means: (N, D), of whitened samples, of length 1; zeros for an adapter without samples.
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
        for first, _, owner, vectors in _parts(blocks, lambda number, fold=fold: number % _FOLDS == fold):
            if len(vectors):
                means = fitted.means[first + owner]
                known = means.any(axis=1)  # False for an adapter whose only sample is held out
                owners.append(first + owner[known])
                similarities.append(np.einsum("sd,sd->s", unit_rows(fitted.whitened(vectors)), means)[known])
    found = _fit(blocks, lambda number: number >= 0, stride)
    owner, similarity = np.concatenate([np.zeros(0, int), *owners]), np.concatenate([np.zeros(0), *similarities])
    ends = np.cumsum(np.bincount(owner, minlength=len(found.means)))
    by_adapter = np.split(similarity[np.argsort(owner, kind="stable")], ends[:-1])
    return replace(found, thresholds=thresholds_of(by_adapter))


def _parts(blocks: Blocks, used: Used) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield the number of a block's first adapter, how many there are, and the used samples of all of them.

    For S samples these are the places of their adapters in the block, int (S,), ascending, and vectors float32 (S, D).
    """
    first = 0
    for entries, vectors in blocks():
        counts = np.array([len(entry.samples) for entry in entries], int)
        kept = used(np.concatenate([np.arange(count) for count in counts]))
        yield first, len(entries), np.repeat(np.arange(len(entries)), counts)[kept], vectors[kept]
        first += len(entries)


def _fit(blocks: Blocks, used: Used, stride: int) -> MeanVectors:
    """Fit means and whitening, without thresholds, to some of each adapter's samples."""
    means: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    scatter, freedom = np.zeros((0, 0)), 0
    for first, count, owner, vectors in _parts(blocks, used):
        sums = np.zeros((count, vectors.shape[1]), np.float32)
        if len(starts := np.flatnonzero(np.diff(owner, prepend=-1))):
            sums[owner[starts]] = np.add.reduceat(vectors, starts, axis=0)
        counts.append(np.bincount(owner, minlength=count))
        means.append(sums / np.maximum(counts[-1], 1).astype(np.float32)[:, None])
        chosen = (first + owner) % stride == 0
        if chosen.any():
            centred = vectors[chosen] - means[-1][owner[chosen]]
            scatter = scatter + centred.T @ centred if len(scatter) else centred.T @ centred
            freedom += len(centred) - len(np.unique(owner[chosen]))
    width, known = max((each.shape[1] for each in means), default=0), np.concatenate(counts) > 0
    if not len(scatter):  # no adapter has a sample, or each has one that was left out
        scatter = np.zeros((width, width))
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


def word_retriever(entries: Sequence[ShelfEntry]) -> Retriever:
    """Search by the cosines of TF-IDF vectors of the samples, with no model at all; -inf if no word is common.

    Terms are words in lower case; idf = ln((1 + n) / (1 + df)) + 1 over the n samples of the shelf, and every vector
    has length 1, as in scikit-learn.
    """
    counts = _word_counts(sample for entry in entries for sample in entry.samples)
    seen = Counter(word for count in counts for word in count)
    number_of = {word: column for column, word in enumerate(seen)}
    idf = np.log((1 + len(counts)) / (1 + np.array(list(seen.values()), np.float64))) + 1

    def vectors(counts: Sequence[Counter[str]]) -> scipy.sparse.csr_array:
        known = [
            (row, number_of[word], number)
            for row, count in enumerate(counts)
            for word, number in count.items()
            if word in number_of
        ]
        rows, columns, numbers = np.array(known, int).reshape(-1, 3).T
        return _unit(scipy.sparse.csr_array((numbers * idf[columns], (rows, columns)), shape=(len(counts), len(idf))))

    samples = vectors(counts)
    sizes = [len(entry.samples) for entry in entries]
    owners = np.repeat(np.arange(len(entries)), sizes)
    ones = np.ones(len(owners))
    indices = (owners, np.arange(len(owners)))
    sums = scipy.sparse.csr_array((ones, indices), shape=(len(entries), len(owners))) @ samples
    means = _unit(sums)
    products = np.asarray(samples.multiply(sums[owners]).sum(axis=1)).ravel() if len(owners) else ones
    squares, similarities = _squares(samples), []
    for size, end, total in zip(sizes, np.cumsum(sizes), _squares(sums), strict=True):
        rows = slice(end - size, end) if size > 1 else slice(0)
        similarities.append(similarity_to_others(products[rows], squares[rows], total))

    def scores(prompts: Sequence[Prompt]) -> np.ndarray:
        found = (vectors(_word_counts(prompts)) @ means.T).toarray()
        return np.where(found > 0, found, -np.inf).astype(np.float32)

    return Retriever(scores, thresholds_of(similarities))


def _word_counts(prompts: Iterable[Prompt]) -> list[Counter[str]]:
    return [Counter(_WORD.findall(prompt_text(prompt).lower())) for prompt in prompts]


def _squares(rows: scipy.sparse.csr_array) -> np.ndarray:
    return np.asarray(rows.multiply(rows).sum(axis=1)).ravel()


def _unit(rows: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    size = np.sqrt(_squares(rows))
    return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / np.where(size > 0, size, 1)) @ rows)
