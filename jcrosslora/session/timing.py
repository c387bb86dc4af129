"""Time one matrix of each shape and one layer of each base on this machine, with random numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.family.parts import holds
from jcrosslora.checkpoint.layout import norm_sizes
from jcrosslora.decoder import DecoderSettings, Params, forward, settings_of
from jcrosslora.decoder.layer_inputs import LayerInputWeights
from jcrosslora.linalg import decompose

_VOCABULARY = 512  # rows of the embedding of the layer that is timed
SVD_SIDE = 512  # of the square matrix whose full SVD is timed
_RUNS = 3  # after compilation; the fastest counts


class Stopwatch:
    """Measures seconds, and keeps them for the next estimate of the same sizes.

    Args:
        clock: seconds from any point in time on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._known = clock, dict[Any, float]()

    def decomposition(self, shape: tuple[int, int], rank: int, *, vectors: bool) -> float:
        """Time the truncated SVD of a matrix (O, I); `vectors` says whether single singular vectors matter."""

        def make() -> Callable[[], Any]:
            matrix = jax.random.normal(jax.random.key(0), (1, *shape))
            return lambda: decompose(matrix, rank, vectors=vectors)[0]

        return self._fastest((shape, rank, vectors), make, 1)

    def full_svd(self) -> float:
        """Time the full SVD of a square matrix with `SVD_SIDE` rows."""

        def make() -> Callable[[], Any]:
            matrix = jax.random.normal(jax.random.key(0), (SVD_SIDE, SVD_SIDE))
            return lambda: jnp.linalg.svd(matrix)

        return self._fastest("full SVD", make, _RUNS)

    def layer(self, base: BaseModel, shape: tuple[int, int], dtype: DTypeLike) -> float:
        """Time the forward pass of one layer of a base, of the parts of its last, on tokens (B, T).

        Raises:
            CheckpointError: the decoder does not support the base.
        """
        settings = settings_of(base)
        one = dataclasses.replace(
            settings,
            layers=1,
            vocab=_VOCABULARY,
            windows=settings.windows[-1:],
            layer_ropes=settings.layer_ropes[-1:],
            parts=settings.parts[-1:],
        )

        def make() -> Callable[[], Any]:
            return partial(_pass, one, _random_params(one, base, dtype), jnp.zeros(shape, jnp.int32))

        return self._fastest((one, shape, jnp.dtype(dtype).name), make, _RUNS)

    def _fastest(self, key: Any, make: Callable[[], Callable[[], Any]], runs: int) -> float:
        if key not in self._known:
            run, found = make(), []
            jax.block_until_ready(run())  # compiles
            for _ in range(runs):
                start = self._clock()
                jax.block_until_ready(run())
                found.append(self._clock() - start)
            self._known[key] = min(found)
        return self._known[key]


def layer_size(base: BaseModel) -> int:
    """Count the parameters of the linear modules of one layer."""
    return sum(prod(module.shape) for module in base.modules.values()) // base.dims.layers


def parameters(base: BaseModel) -> int:
    """Count the parameters of the linear modules, the embedding and the output head."""
    matrices = 1 if base.tied else 2
    return layer_size(base) * base.dims.layers + matrices * base.dims.vocab * base.dims.hidden


@partial(jax.jit, static_argnums=0)
def _pass(settings: DecoderSettings, params: Params, tokens: jax.Array) -> jax.Array:
    return forward(settings, params, tokens).hidden


def _random_params(settings: DecoderSettings, base: BaseModel, dtype: DTypeLike) -> Params:
    """Make the weights of one layer as `load_params` would: bfloat16 as bits, norms as float32."""
    packed = dtype == jnp.bfloat16

    def matrix(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(jax.random.key(0), shape, dtype)

    (parts,), family = settings.parts, base.family
    weights = {role: matrix(1, *base.role_shape(role)) for role in family.roles if holds(parts, role)}
    norms = norm_sizes(family, base.dims, base.config)
    tensors = {name: tensor for name, tensor in family.layer_tensors(base.config).items() if holds(parts, name)}
    return Params(
        embedding=matrix(settings.vocab, settings.hidden),
        head=None,
        final_norm=jnp.ones(settings.hidden),
        weights={role: jax.lax.bitcast_convert_type(w, jnp.uint16) if packed else w for role, w in weights.items()},
        biases={
            role: jnp.zeros((1, weights[role].shape[1]), dtype) for role in settings.biased_roles if role in weights
        },
        norms={name: jnp.ones((1, size)) for name, size in norms.items() if holds(parts, name)},
        activation=tuple(jnp.ones((1, 1)) for _ in family.activation_tensors),
        tensors={name: jnp.ones((1, *tensor.shape(base.dims, base.config))) for name, tensor in tensors.items()},
        layer_inputs=None
        if (width := settings.layer_inputs) == 0
        else LayerInputWeights(matrix(settings.vocab, width), matrix(width, settings.hidden), jnp.ones(width)),
    )
