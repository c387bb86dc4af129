"""Retrieval by weights: the cosine of a prompt's vector with vectors that a trained encoder makes of adapters' weights.

Once it is trained on some adapters, it also finds others that have no samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import UsageError
from jcrosslora.shelf.encoders import Encoder
from jcrosslora.shelf.mean_vectors import MeanVectors, unit_rows
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieved import thresholds_of
from jcrosslora.shelf.weight_probes import (
    ProbeSettings,
    Tree,
    Weights,
    encode_texts,
    encode_weights,
    first_parameters,
    train_encoder,
)
from jcrosslora.text import Prompt

_PARAMETER = "parameter."
_HELD_OUT = 4  # every fourth sample is left out of the training, and sets the threshold
_encode = jax.jit(encode_weights)


@dataclass(frozen=True, eq=False)
class WeightVectors:
    """A trained encoder with the vectors of adapters.

    Attributes:
        parameters: of the encoder.
        center: (D,), and
        whiten: (D, D), by which the vectors of prompts were whitened in the training.
        threshold: float32 (1,), of all adapters.
        digests: uint8 (M, 32), of the weights files of the adapters that have a vector.
        vectors: float32 (M, E).
    """

    parameters: Tree
    center: np.ndarray
    whiten: np.ndarray
    threshold: np.ndarray
    digests: np.ndarray
    vectors: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all fields as named arrays."""
        named = {name: getattr(self, name) for name in ("center", "whiten", "threshold", "digests", "vectors")}
        return named | {_PARAMETER + name: np.asarray(value) for name, value in self.parameters.items()}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> WeightVectors | None:
        """Undo `arrays`; None if they are not of this form."""
        parameters = {
            name.removeprefix(_PARAMETER): jnp.asarray(value)
            for name, value in arrays.items()
            if name.startswith(_PARAMETER)
        }
        others = {name: value for name, value in arrays.items() if not name.startswith(_PARAMETER)}
        wanted = {field.name for field in fields(cls)} - {"parameters"}
        return cls(parameters=parameters, **others) if parameters and others.keys() == wanted else None

    def with_vectors(self, entries: Sequence[ShelfEntry], load: Callable[[int], Weights]) -> WeightVectors:
        """Add the vectors of adapters that have none."""
        known = {digest.tobytes() for digest in self.digests}
        lacking = [number for number, entry in enumerate(entries) if _bytes(entry) not in known]
        if not lacking:
            return self
        fresh = np.stack([np.asarray(_encode(self.parameters, load(number))) for number in lacking])
        digests = np.stack([np.frombuffer(_bytes(entries[number]), np.uint8) for number in lacking])
        return replace(
            self,
            digests=np.concatenate([self.digests, digests]),
            vectors=np.concatenate([self.vectors, fresh.astype(np.float32)]),
        )

    def texts(self, vectors: np.ndarray) -> np.ndarray:
        """Map an encoder's vectors (P, D) of prompts to (P, E)."""
        whitened = unit_rows((vectors - self.center) @ self.whiten.T)
        return np.asarray(encode_texts(self.parameters, jnp.asarray(whitened, jnp.float32)))


class WeightRetriever:
    """Searches by vectors of weights."""

    def __init__(self, encoder: Encoder, fitted: WeightVectors, entries: Sequence[ShelfEntry]) -> None:
        rows = {digest.tobytes(): row for row, digest in enumerate(fitted.digests)}
        self._encoder, self._fitted = encoder, fitted
        self._vectors = fitted.vectors[[rows[_bytes(entry)] for entry in entries]]
        self.thresholds = np.repeat(fitted.threshold, len(entries))

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the cosines, float32 (P, N)."""
        return self._fitted.texts(self._encoder.encode(prompts)) @ self._vectors.T


def train_weights(
    base: BaseModel,
    entries: Sequence[ShelfEntry],
    samples: Sequence[np.ndarray],
    means: MeanVectors,
    load: Callable[[int], Weights],
    settings: ProbeSettings,
) -> tuple[WeightVectors, list[float]]:
    """Train an encoder on the adapters of a shelf that have samples.

    Returns the encoder with the vectors of all N adapters, and the loss of each step. `samples` are the vectors (m, D)
    of each adapter's samples, `means` has the whitening, and `load` loads the weights of an adapter by its number.

    Raises:
        UsageError: fewer than two adapters have samples, or a setting is out of range.
    """
    used = [number for number, vectors in enumerate(samples) if len(vectors)]
    if len(used) < 2:
        msg = f"{len(used)} adapters with samples, 2 are wanted to tell them apart: give --samples with `shelf add`"
        raise UsageError(msg)
    whitened = [unit_rows(means.whitened(samples[number])).astype(np.float32) for number in used]
    held_out = [np.arange(len(vectors)) % _HELD_OUT == _HELD_OUT - 1 for vectors in whitened]
    shown = [vectors[~held] for vectors, held in zip(whitened, held_out, strict=True)]
    parameters = first_parameters(base, len(means.center), settings.seed)
    parameters, losses = train_encoder(parameters, shown, lambda number: load(used[number]), settings)
    none = np.zeros((0, 32), np.uint8), np.zeros((0, parameters["out"].shape[1]), np.float32)
    found = WeightVectors(parameters, means.center, means.whiten, np.zeros(1, np.float32), *none)
    found = found.with_vectors(entries, load)
    # Very few samples have none left out; those of the training are better than no threshold.
    judged = [vectors[held] if held.any() else vectors for vectors, held in zip(whitened, held_out, strict=True)]
    texts = [np.asarray(encode_texts(parameters, jnp.asarray(vectors))) for vectors in judged]
    scores = [each @ found.vectors[number] for each, number in zip(texts, used, strict=True)]
    return replace(found, threshold=thresholds_of([np.concatenate(scores)])), losses


def _bytes(entry: ShelfEntry) -> bytes:
    return bytes.fromhex(entry.digest.partition(":")[2])
