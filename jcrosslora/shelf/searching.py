"""Open a search of a shelf by its name, and store the arrays that it derives from the index."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import OutputError, UsageError, suggestion
from jcrosslora.shelf.encoders import NOTHING, Encoder
from jcrosslora.shelf.index import Head, Index, split_samples
from jcrosslora.shelf.retrieval import MeanVectors, Retriever, fit_means, word_retriever
from jcrosslora.shelf.weight_probes import ProbeSettings, Weights, WeightVectors, adapter_weights, train_weights
from jcrosslora.utils.digests import digest_of
from jcrosslora.utils.files import regular_size, write_whole

_TEXT_FILE, _WEIGHTS_FILE = "text.safetensors", "weights.safetensors"
_KEY, _SEAL = "index", "sha256"  # the metadata of these files


@dataclasses.dataclass(frozen=True, eq=False)
class Searching:
    """What searches of a shelf need: the index, and functions that open the base, an adapter by name, the encoder."""

    index: Index
    base: Callable[[], BaseModel]
    load: Callable[[str], Adapter]
    encoder: Callable[[], Encoder]

    def retriever(self, by: str | None) -> Retriever:
        """Open a way to search; raise UsageError if it is unknown or the shelf has no data for it."""
        by = by or ("tfidf" if self.index.head.encoder == NOTHING else "text")
        makers: dict[str, Callable[[], Retriever]] = {
            "text": self._by_text,
            "tfidf": lambda: word_retriever(self.index.entries),
            "weights": self._by_weights,
        }
        if by not in makers:
            raise UsageError(f"--by {by!r} is unknown{suggestion(by, makers)}; use one of {', '.join(makers)}")
        if not self.index.entries:
            raise UsageError(f"{self.index.folder}: holds no adapter; add some with `jcrosslora shelf add`")
        if by != "weights" and not any(entry.samples for entry in self.index.entries):
            msg = f"{self.index.folder}: no adapter has samples: give some with `jcrosslora shelf add --prompts FILE`"
            raise UsageError(msg)
        if by in ("text", "weights"):
            self._check_encoder(by)
        return makers[by]()

    def means(self) -> MeanVectors:
        """Return the vectors of the adapters, stored or computed again."""
        path, key = self.index.folder / _TEXT_FILE, _index_key(self.index.head)
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
        samples = [each for entries, vectors in self.index.blocks() for each in split_samples(vectors, entries)]
        rank = max((entry.rank for entry in self.index.entries), default=0)
        for entry in self.index.entries:
            if entry.rank == rank:
                self.load(entry.name)  # compares what the index claims with the file, before any array is that large
                break
        of_shelf = self.base(), self.index.entries, samples, self.means()
        found, losses = train_weights(*of_shelf, lambda number: self._weights_of(number, rank), settings)
        path = self.index.folder / _WEIGHTS_FILE
        keep_arrays(path, _index_key(self.index.head), found.arrays())
        if find_arrays(path, _index_key(self.index.head)) is None:
            raise OutputError(f"{path}: cannot be written: make the folder writable, or free space")
        return losses

    def _by_text(self) -> Retriever:
        means, encode = self.means(), self.encoder()
        return Retriever(lambda prompts: means.scores(encode(prompts)), means.thresholds)

    def _by_weights(self) -> Retriever:
        folder, entries = self.index.folder, self.index.entries
        path = folder / _WEIGHTS_FILE
        arrays = find_arrays(path, None)
        trained = None if arrays is None else WeightVectors.of_arrays(arrays)
        if trained is None:
            came = f"{path}: is damaged, and" if path.exists() else f"{folder}:"
            raise UsageError(f"{came} has no trained weight probes: train them with `jcrosslora shelf train {folder}`")
        # Adapters that were added later get their vectors from the same encoder.
        found = trained.with_vectors(entries, lambda number: self._weights_of(number, entries[number].rank))
        if found is not trained:
            keep_arrays(path, _index_key(self.index.head), found.arrays())
        return found.retriever(self.encoder(), entries)

    def _weights_of(self, number: int, rank: int) -> Weights:
        return adapter_weights(self.load(self.index.entries[number].name), self.base(), rank)

    def _check_encoder(self, by: str) -> None:
        if self.index.head.encoder == NOTHING:
            msg = f"{self.index.folder}: was made without an encoder, and has no vectors for --by {by}: use --by tfidf"
            raise UsageError(msg + ", or make another shelf")


def _index_key(head: Head) -> str:
    """Return a key that every change of the index changes, as numbers of segments are not used twice."""
    return digest_of(head.base.digest, head.encoder, head.segments)


def find_arrays(path: Path, key: str | None) -> dict[str, np.ndarray] | None:
    """Read arrays; None if they are missing, damaged or of another key. A key of None accepts any."""
    try:
        regular_size(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if key is not None and metadata.get(_KEY) != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return arrays if metadata.get(_SEAL) == _digest(arrays) else None


def keep_arrays(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with a digest; a shelf that cannot be written to is searched without them."""
    # safetensors writes the bytes as they lie in memory, in any order of the array.
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with suppress(OSError):
        write_whole(path, save(ordered, metadata={_KEY: key, _SEAL: _digest(ordered)}))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name!r} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()
