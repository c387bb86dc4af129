"""An encoder of adapters by their weights: learned probes that are sent through every update.

The weight-probe encoder of AutoLoRA (arXiv 2508.02107): for each module probes x, e = LN(x A' B'), a linear map for
each role, and a transformer over all modules whose [CLS] token becomes the vector. B adapters, L layers of a role,
p probes of a module, d width of the transformer, E width of the vectors, D numbers of a prompt's vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import stack_adapter

PROBES, WIDTH, VECTOR, HEADS = 2, 64, 64, 4
_EPS = 1e-6
_HIGHEST = jax.lax.Precision.HIGHEST

Weights = dict[str, tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]]  # role -> a (L, K, I), b (L, O, K)
Tree = dict[str, Any]


def adapter_weights(adapter: Adapter, base: BaseModel, rank: int) -> Weights:
    """Stack the factors of all roles of a base, with zeros up to `rank` and where there is no update.

    Updates of experts are left out.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    stacked, found = stack_adapter(adapter, base).roles, {}
    for role in dense_roles(base):
        rows, columns = base.role_shape(role)
        layers = len(base.layers_with(role))
        a, b = np.zeros((layers, rank, columns), np.float32), np.zeros((layers, rows, rank), np.float32)
        if role in stacked:
            own = stacked[role].a.shape[-2]
            a[:, :own], b[:, :, :own] = stacked[role].a, stacked[role].b
        found[role] = a, b
    return found


def dense_roles(base: BaseModel) -> list[str]:
    """Return the roles of modules that some layer has."""
    return [role for role in base.family.roles if base.layers_with(role)]


def first_parameters(base: BaseModel, width: int, seed: int) -> Tree:
    """Draw the parameters.

    Args:
        base: of the adapters.
        width: D, of the prompts' vectors.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)

    def drawn(*shape: int, size: float | None = None) -> jax.Array:
        scale = size if size is not None else shape[-2] ** -0.5
        return jnp.asarray((rng.standard_normal(shape) * scale).astype(np.float32))

    found: Tree = {"cls": drawn(1, WIDTH, size=0.02), "text": drawn(width, VECTOR), "out": drawn(WIDTH, VECTOR)}
    for role in dense_roles(base):
        rows, columns = base.role_shape(role)
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


def encode_texts(parameters: Mapping[str, jax.Array], vectors: jax.Array) -> jax.Array:
    """Map the vectors (..., D) of prompts to where those of adapters lie, (..., E) of length 1."""
    return _unit(vectors @ parameters["text"])


def _attend(parameters: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    q, k, v = ((x @ parameters[name]).reshape(len(x), HEADS, -1) for name in ("query", "key", "value"))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * (WIDTH // HEADS) ** -0.5
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, -1), v).reshape(len(x), WIDTH) @ parameters["mixed"]


def _normed(x: jax.Array) -> jax.Array:
    """Apply layer norm without gain; an update of zeros stays zero."""
    centred = x - x.mean(axis=-1, keepdims=True)
    # Updates differ in size by orders of magnitude, so that the guard is relative to the largest number.
    size = jnp.maximum(jnp.abs(centred).max(axis=-1, keepdims=True), 1e-30)
    scaled = centred / jax.lax.stop_gradient(size)
    return scaled * jax.lax.rsqrt(jnp.mean(scaled**2, axis=-1, keepdims=True) + _EPS)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + _EPS)
