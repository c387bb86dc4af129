"""Open the ways to search a shelf, and keep what they derive from the index beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import OutputError, UsageError, suggestion
from jcrosslora.shelf.derived import find_arrays, index_key, keep_arrays
from jcrosslora.shelf.encoders.encoder import Encoder
from jcrosslora.shelf.encoders.opening import NOTHING
from jcrosslora.shelf.index import Index, split_samples
from jcrosslora.shelf.retrieval.certainty import CertaintyRetriever
from jcrosslora.shelf.retrieval.mean_vectors import MeanVectors, TextRetriever, fit_means
from jcrosslora.shelf.retrieval.retrieved import Retriever
from jcrosslora.shelf.retrieval.tfidf import WordRetriever
from jcrosslora.shelf.retrieval.weight_encoder import Weights, adapter_weights
from jcrosslora.shelf.retrieval.weight_training import ProbeSettings
from jcrosslora.shelf.retrieval.weights import NAME as WEIGHTS
from jcrosslora.shelf.retrieval.weights import WeightRetriever, WeightVectors, train_weights

_TEXT_FILE, _WEIGHTS_FILE = "text.safetensors", "weights.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class Searching:
    """What searches of a shelf need; bases, adapters and encoders are opened when they are used.

    Attributes:
        index: of the shelf.
        base: opens the base.
        load: loads an adapter by its name.
        encoder: opens the encoder.
    """

    index: Index
    base: Callable[[], BaseModel]
    load: Callable[[str], Adapter]
    encoder: Callable[[], Encoder]

    def retriever(self, by: str | None) -> Retriever:
        """Open a way to search, see `Shelf.search`.

        Raises:
            UsageError: the way is unknown, or the shelf has no data for it.
        """
        by = by or ("tfidf" if self.index.head.encoder == NOTHING else "text")
        makers: dict[str, Callable[[], Retriever]] = {
            "text": self._text_retriever,
            "tfidf": lambda: WordRetriever(self.index.entries),
            "certainty": lambda: CertaintyRetriever(self.base(), self.index.entries, self.load),
            WEIGHTS: self._weight_retriever,
        }
        if by not in makers:
            msg = f"--by {by!r} is unknown{suggestion(by, makers)}; use one of {', '.join(makers)}"
            raise UsageError(msg)
        if not self.index.entries:
            msg = f"{self.index.folder}: holds no adapter; add some with `jcrosslora shelf add`"
            raise UsageError(msg)
        if by != WEIGHTS and not any(entry.samples for entry in self.index.entries):
            msg = f"{self.index.folder}: no adapter has samples: give some with `jcrosslora shelf add --samples FILE`"
            raise UsageError(msg)
        return makers[by]()

    def means(self) -> MeanVectors:
        """Return the vectors of the adapters, from beside the index or computed again."""
        path, key = self.index.folder / _TEXT_FILE, index_key(self.index.head)
        found = find_arrays(path, key)
        names = [field.name for field in dataclasses.fields(MeanVectors)]
        if found is not None and found.keys() == set(names):
            return MeanVectors(**found)
        fitted = fit_means(self.index.blocks)
        keep_arrays(path, key, {name: getattr(fitted, name) for name in names})
        return fitted

    def train(self, settings: ProbeSettings) -> list[float]:
        """Train the encoder of weights, see `Shelf.train_probes`."""
        self._check_encoder("weights")
        samples = [own for entries, vectors in self.index.blocks() for own in split_samples(vectors, entries)]
        rank = max((entry.rank for entry in self.index.entries), default=0)
        for entry in self.index.entries:
            if entry.rank == rank:
                self.load(entry.name)  # compares what the index claims with the file, before any array is that large
                break
        found, losses = train_weights(
            self.base(),
            self.index.entries,
            samples,
            self.means(),
            lambda place: self._weights_of(place, rank),
            settings,
        )
        path = self.index.folder / _WEIGHTS_FILE
        keep_arrays(path, index_key(self.index.head), found.arrays())
        if find_arrays(path, index_key(self.index.head)) is None:
            msg = f"{path}: cannot be written: make the folder writable, or free space"
            raise OutputError(msg)
        return losses

    def _text_retriever(self) -> TextRetriever:
        self._check_encoder("text")
        return TextRetriever(self.encoder(), self.means())

    def _weight_retriever(self) -> WeightRetriever:
        self._check_encoder("weights")
        folder, entries = self.index.folder, self.index.entries
        path = folder / _WEIGHTS_FILE
        arrays = find_arrays(path, None)
        trained = None if arrays is None else WeightVectors.of_arrays(arrays)
        if trained is None:
            came = f"{path}: is damaged, and" if path.exists() else f"{folder}:"
            msg = f"{came} has no trained weight probes: train them with `jcrosslora shelf train {folder}`"
            raise UsageError(msg)
        # Adapters that were added since get their vectors from the same encoder.
        found = trained.with_vectors(entries, lambda place: self._weights_of(place, entries[place].rank))
        if found is not trained:
            keep_arrays(path, index_key(self.index.head), found.arrays())
        return WeightRetriever(self.encoder(), found, entries)

    def _weights_of(self, place: int, rank: int) -> Weights:
        return adapter_weights(self.load(self.index.entries[place].name), self.base(), rank)

    def _check_encoder(self, by: str) -> None:
        if self.index.head.encoder == NOTHING:
            msg = f"{self.index.folder}: was made without an encoder, and has no vectors for --by {by}: use --by tfidf"
            raise UsageError(msg + ", or make another shelf")
