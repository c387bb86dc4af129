"""Retrieval by weights: a trained encoder of adapters, with learned probes that are sent through every update.

The weight-probe encoder of AutoLoRA (arXiv 2508.02107): for each module probes x, e = LN(x A' B'), a linear map for
each role, and a transformer over all modules, whose [CLS] token becomes the vector. It is trained contrastively with
the vectors of the adapters' samples; trained on some adapters, it also finds others without samples.

Shapes: B adapters, L layers of a role, p probes of a module, d width of the transformer, E width of the vectors, D
width of a prompt's vector.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import stack_adapter
from jcrosslora.errors import UsageError
from jcrosslora.shelf.encoders import Encoder
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieval import MeanVectors, Retriever, thresholds_of, unit_rows
from jcrosslora.text import Prompt
from jcrosslora.utils.progress import track

PROBES, WIDTH, VECTOR, HEADS = 2, 64, 64, 4
_EPS = 1e-6
_HIGHEST = jax.lax.Precision.HIGHEST
_SHARPNESS = 10.0  # of the cosines, as published
_HELD_BYTES = 1 << 30  # of weights that are kept in memory between steps
_HELD_OUT = 4  # every fourth sample is left out of the training, and sets the threshold
_PARAMETER = "parameter."

Weights = dict[str, tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]]  # role -> a (L, K, I), b (L, O, K)
Tree = dict[str, Any]


def adapter_weights(adapter: Adapter, base: BaseModel, rank: int) -> Weights:
    """Stack the factors of all roles of a base, padded with zeros to `rank`; updates of experts are left out."""
    stacked, found = stack_adapter(adapter, base).roles, {}
    for role in dense_roles(base):
        rows, columns = base.architecture.role_shapes[role]
        layers = len(base.layers_with(role))
        a, b = np.zeros((layers, rank, columns), np.float32), np.zeros((layers, rows, rank), np.float32)
        if role in stacked:
            size = stacked[role].a.shape[-2]
            a[:, :size], b[:, :, :size] = stacked[role].a, stacked[role].b
        found[role] = a, b
    return found


def dense_roles(base: BaseModel) -> list[str]:
    """Return the roles of modules that some layer has."""
    return list(base.architecture.role_shapes)


def first_parameters(base: BaseModel, width: int, seed: int) -> Tree:
    """Draw the parameters for prompts' vectors of `width` D."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int, size: float | None = None) -> jax.Array:
        scale = size if size is not None else shape[-2] ** -0.5
        return jnp.asarray((rng.standard_normal(shape) * scale).astype(np.float32))

    found: Tree = {"cls": drawn(1, WIDTH, size=0.02), "text": drawn(width, VECTOR), "out": drawn(WIDTH, VECTOR)}
    for role in dense_roles(base):
        rows, columns = base.architecture.role_shapes[role]
        layers = len(base.layers_with(role))
        found[f"probe.{role}"] = drawn(layers, PROBES, columns, size=columns**-0.5)
        found[f"role.{role}"] = drawn(rows, WIDTH)
        found[f"place.{role}"] = drawn(layers, 1, WIDTH, size=0.02)
    for name in ("query", "key", "value", "mixed"):
        found[name] = drawn(WIDTH, WIDTH)
    return found | {"up": drawn(WIDTH, 4 * WIDTH), "down": drawn(4 * WIDTH, WIDTH)}


def encode_weights(parameters: Mapping[str, jax.Array], weights: Weights) -> jax.Array:
    """Encode one adapter, float32 (E,) of length 1."""
    tokens = [parameters["cls"]]
    for role, (a, b) in weights.items():
        inner = jnp.einsum("lpi,lki->lpk", parameters[f"probe.{role}"], a, precision=_HIGHEST)
        e = _normed(jnp.einsum("lpk,lok->lpo", inner, b, precision=_HIGHEST))
        tokens.append((e @ parameters[f"role.{role}"] + parameters[f"place.{role}"]).reshape(-1, WIDTH))
    x = jnp.concatenate(tokens)
    x = x + _attend(parameters, _normed(x))
    x = x + jax.nn.gelu(_normed(x) @ parameters["up"]) @ parameters["down"]
    return _unit(_normed(x[0]) @ parameters["out"])


_encode = jax.jit(encode_weights)


def encode_texts(parameters: Mapping[str, jax.Array], vectors: jax.Array) -> jax.Array:
    """Map the vectors (..., D) of prompts into the space of the adapters' vectors, (..., E) of length 1."""
    return _unit(vectors @ parameters["text"])


def _attend(parameters: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    q, k, v = ((x @ parameters[name]).reshape(len(x), HEADS, -1) for name in ("query", "key", "value"))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * (WIDTH // HEADS) ** -0.5
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, -1), v).reshape(len(x), WIDTH) @ parameters["mixed"]


def _normed(x: jax.Array) -> jax.Array:
    """Apply layer norm without gain; an update of zeros stays zero."""
    centred = x - x.mean(axis=-1, keepdims=True)
    # Updates differ in size by orders of magnitude, so the guard is relative to the largest number.
    size = jnp.maximum(jnp.abs(centred).max(axis=-1, keepdims=True), 1e-30)
    scaled = centred / jax.lax.stop_gradient(size)
    return scaled * jax.lax.rsqrt(jnp.mean(scaled**2, axis=-1, keepdims=True) + _EPS)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + _EPS)


@dataclass(frozen=True)
class ProbeSettings:
    """How the encoder of weights is trained, by AdamW.

    Attributes:
        batch: adapters of a step, with one sample each.
        rate: the highest learning rate; it falls by half a cosine.
    """

    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError if a setting is out of range."""
        if self.steps < 1 or self.batch < 2 or not 0 < self.rate < float("inf"):
            came = f"steps {self.steps}, batch {self.batch}, rate {self.rate}"
            raise UsageError(f"{came}: expected 1 step or more, 2 adapters or more in a batch, and a rate above 0")


def contrastive_loss(parameters: Mapping[str, jax.Array], weights: Weights, texts: jax.Array) -> jax.Array:
    """Return the symmetric cross-entropy of 10 times the cosines of B adapters and B prompts, pair by pair.

    The weights are stacked, with a first axis of B; `texts` (B, D) are the vectors of a prompt of each adapter.
    """
    adapters = jax.vmap(encode_weights, in_axes=(None, 0))(parameters, weights)
    scores = _SHARPNESS * encode_texts(parameters, texts) @ adapters.T
    pairs = jnp.arange(len(scores))
    both = (jax.nn.log_softmax(each, axis=-1)[pairs, pairs].mean() for each in (scores, scores.T))
    return -sum(both, start=jnp.float32(0)) / 2


def train_encoder(
    parameters: Tree, samples: Sequence[np.ndarray], load: Callable[[int], Weights], settings: ProbeSettings
) -> tuple[Tree, list[float]]:
    """Train on the samples of N adapters, vectors (m, D) each; return the parameters and the loss of each step.

    `load` loads the weights of an adapter by its number, for each step; at most 1 GB of them is kept. Raises UsageError
    if a setting is out of range, or a loss is not finite.
    """
    settings.check()
    schedule = optax.cosine_decay_schedule(settings.rate, settings.steps)
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    size = sum(array.nbytes for pair in load(0).values() for array in pair)
    held = lru_cache(maxsize=max(settings.batch, _HELD_BYTES // size))(load)

    @lru_cache(maxsize=1)  # on a small shelf every step has all adapters
    def stacked(numbers: tuple[int, ...]) -> Weights:
        return jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *map(held, numbers))

    rng, state, losses = np.random.default_rng(settings.seed), optimizer.init(parameters), []

    @jax.jit
    def step(parameters: Tree, state: Any, weights: Weights, texts: jax.Array) -> tuple[Tree, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(contrastive_loss)(parameters, weights, texts)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss  # pyright: ignore[reportReturnType]

    with track(settings.steps, "train weight probes", "steps") as bar:
        for _ in range(settings.steps):
            chosen = sorted(rng.permutation(len(samples))[: settings.batch].tolist())
            texts = np.stack([samples[number][rng.integers(len(samples[number]))] for number in chosen])
            parameters, state, loss = step(parameters, state, stacked(tuple(chosen)), jnp.asarray(texts))
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                msg = f"the loss of the weight probes is {losses[-1]} at step {len(losses)}: lower the rate, which is "
                raise UsageError(msg + f"{settings.rate:g}")
            bar.update()
    return parameters, losses


@dataclass(frozen=True, eq=False)
class WeightVectors:
    """A trained encoder with the vectors of adapters.

    Attributes:
        center: (D,), subtracted from the vectors of prompts in the training.
        whiten: (D, D), then multiplied with them, see `MeanVectors`.
        threshold: float32 (1,), of all adapters.
        digests: uint8 (M, 32), of the weights files of the adapters that have a vector.
        vectors: float32 (M, E), of the adapters.
    """

    parameters: Tree
    center: np.ndarray
    whiten: np.ndarray
    threshold: np.ndarray
    digests: np.ndarray
    vectors: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all fields as named arrays."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "parameters"}
        return named | {_PARAMETER + name: np.asarray(value) for name, value in self.parameters.items()}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "WeightVectors | None":
        """Undo `arrays`; None if they are not of this form."""
        others = {name: value for name, value in arrays.items() if not name.startswith(_PARAMETER)}
        rest = arrays.keys() - others.keys()
        parameters = {name.removeprefix(_PARAMETER): jnp.asarray(arrays[name]) for name in sorted(rest)}
        wanted = {field.name for field in fields(cls)} - {"parameters"}
        return cls(parameters=parameters, **others) if parameters and others.keys() == wanted else None

    def with_vectors(self, entries: Sequence[ShelfEntry], load: Callable[[int], Weights]) -> "WeightVectors":
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

    def retriever(self, encode: Encoder, entries: Sequence[ShelfEntry]) -> Retriever:
        """Search N adapters, all of which have a vector, by the cosines with an encoder's vectors of prompts."""
        rows = {digest.tobytes(): row for row, digest in enumerate(self.digests)}
        adapters = self.vectors[[rows[_bytes(entry)] for entry in entries]]

        def scores(prompts: Sequence[Prompt]) -> np.ndarray:
            whitened = unit_rows((encode(prompts) - self.center) @ self.whiten.T)
            return np.asarray(encode_texts(self.parameters, jnp.asarray(whitened, jnp.float32))) @ adapters.T

        return Retriever(scores, np.repeat(self.threshold, len(entries)))


def train_weights(
    base: BaseModel,
    entries: Sequence[ShelfEntry],
    samples: Sequence[np.ndarray],
    means: MeanVectors,
    load: Callable[[int], Weights],
    settings: ProbeSettings,
) -> tuple[WeightVectors, list[float]]:
    """Train an encoder on the adapters of a shelf that have samples; there must be two.

    Returns the encoder with the vectors of all N adapters, and the loss of each step. `samples` are the vectors (m, D)
    of each adapter's samples, `means` has the whitening, and `load` loads the weights of an adapter by its number.
    """
    used = [number for number, vectors in enumerate(samples) if len(vectors)]
    if len(used) < 2:
        msg = f"{len(used)} adapters with samples, 2 are needed to tell them apart: give --prompts with `shelf add`"
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
