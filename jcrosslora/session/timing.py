"""Turn counts into seconds: time one matrix of each shape and a few layers of each base on this machine."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import starmap
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.architectures.blocks.block import LayerInputWeights
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import DecoderSettings, Model, Params, StackedAdapter, fast_dtype, forward, settings_of
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.linalg import decompose
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.methods import Method
from jcrosslora.utils.cost import Cost

_COMPILING = 12  # seconds that a step which runs the bases takes to compile, about the same for models of any size
_READ, _WRITTEN = (8, 64), (48, 1)  # texts and tokens of a pass that is timed
# A token with the key-value cache takes 1.5 times as long as a layer's pass over as many tokens, measured with
# SmolLM2-135M on one core (4.3 ms instead of 2.8 for 48 texts).
_CACHED = 1.5
_VOCABULARY = 512  # rows of the embedding of the layers that are timed
# Layers that are timed together: the overhead of a call is a fifth of the time of one small layer. Large layers are
# timed alone, to save memory.
_LAYERS, _MOST_WEIGHTS = 4, 1 << 26
_SVD_SIDE = 512  # side of the square matrix whose full SVD is timed
_RUNS = 3  # after compilation; the fastest counts
_PERIOD = 4093  # period of the numbers in made-up weights, a prime
_CLOCK = time.perf_counter
_KNOWN: dict[Any, float] = {}  # seconds of what this process has timed


def seconds_of(costs: Mapping[str, Cost | None], pair: BasePair, method: Method) -> dict[str, float | None]:
    """Turn the counts of the steps of a transfer into seconds; None stays None.

    Timings are kept for the next estimate of the same sizes. Raises CheckpointError if the bases have to run and the
    decoder does not support one of them.
    """
    found, before = dict[str, float | None](), 0.0
    for name, cost in costs.items():
        found[name] = None if cost is None else max(_seconds(cost, pair, method), (cost.budget or 0.0) - before)
        before = found[name] or 0.0
    return found


def _seconds(cost: Cost, pair: BasePair, method: Method) -> float:
    dtype, total = jnp.float32 if cost.precise else fast_dtype(), 0.0
    for base, tokens, predicted in zip(pair, (cost.source, cost.target), cost.predicted, strict=True):
        if tokens:
            layers = base.dims.layers * tokens + _head(base) * predicted
            total += layers / prod(_READ) * time_layer(base, _READ, dtype)
    if cost.written:
        layers = (pair.source.dims.layers + _head(pair.source)) * cost.written
        total += _CACHED * layers * time_layer(pair.source, _WRITTEN, fast_dtype())
    if cost.stepped:
        layers = pair.target.dims.layers * cost.stepped
        total += layers / prod(_READ) * _time_gradient(pair.target, method)
    total += sum(starmap(_time_decomposition, cost.decomposed))
    if cost.svd:  # full SVDs of activations would take minutes
        total += cost.svd / _SVD_SIDE**3 * _time_full_svd()
    return total + (_COMPILING if cost.runs_bases else 0)


def _time_decomposition(shape: tuple[int, int], rank: int, vectors: bool) -> float:
    """Time the truncated SVD of a matrix (O, I); `vectors` says whether single singular vectors matter."""

    def make() -> Callable[[], Any]:
        matrix = jax.random.normal(jax.random.key(0), (1, *shape))
        return lambda: decompose(matrix, rank, vectors=vectors)[0]

    return _fastest((shape, rank, vectors), make, 1)


def _time_full_svd() -> float:
    def make() -> Callable[[], Any]:
        return partial(jnp.linalg.svd, jax.random.normal(jax.random.key(0), (_SVD_SIDE, _SVD_SIDE)))

    return _fastest("full SVD", make, _RUNS)


def time_layer(base: BaseModel, shape: tuple[int, int], dtype: DTypeLike) -> float:
    """Time the forward pass of a layer like the base's last on tokens (B, T)."""
    few = _few_layers(base)

    def make() -> Callable[[], Any]:
        return partial(_pass, _made_up_model(few, base, dtype), _tokens(shape))

    return _fastest((few, shape, jnp.dtype(dtype).name), make, _RUNS) / few.layers


def _time_gradient(base: BaseModel, method: Method) -> float:
    """Time a layer like the base's last, forward and backward, for factors of the method's roles and rank."""
    # Imported here: methods that look at weights alone need no optimiser.
    from jcrosslora.distill.fit import first_state

    few, usual = _few_layers(base), DistillSettings()
    fit = replace(usual, **{name: getattr(method, name, getattr(usual, name)) for name in ("roles", "fit_rank")})

    def make() -> Callable[[], Any]:
        model = _made_up_model(few, base, fast_dtype())
        factors = jax.eval_shape(lambda: first_state(model, fit).factors)
        factors = jax.tree.map(lambda one: jnp.asarray(_numbers(one.shape, one.dtype)), factors)
        return partial(_gradient, model, factors, _tokens(_READ))

    return _fastest((few, fast_dtype().name, fit.roles, fit.fit_rank), make, _RUNS) / few.layers


def _fastest(key: Any, make: Callable[[], Callable[[], Any]], runs: int) -> float:
    if key not in _KNOWN:
        run, found = make(), []
        jax.block_until_ready(run())  # compiles
        for _ in range(runs):
            start = _CLOCK()
            jax.block_until_ready(run())
            found.append(_CLOCK() - start)
        _KNOWN[key] = min(found)
    return _KNOWN[key]


def _head(base: BaseModel) -> float:
    """Return the size of the output head in layers; time is proportional to size."""
    return base.dims.vocab * base.dims.hidden / _layer_size(base)


def _layer_size(base: BaseModel) -> int:
    """Count the parameters of the linear modules of one layer."""
    return sum(prod(module.shape) for module in base.modules.values()) // base.dims.layers


def _few_layers(base: BaseModel) -> DecoderSettings:
    settings, layers = settings_of(base), max(1, min(_LAYERS, _MOST_WEIGHTS // _layer_size(base)))
    return replace(
        settings,
        layers=layers,
        vocab=_VOCABULARY,
        windows=layers * settings.windows[-1:],
        layer_ropes=layers * settings.layer_ropes[-1:],
        stack=layers * settings.stack[-1:],
    )


@jax.jit
def _pass(model: Model, tokens: jax.Array) -> jax.Array:
    return forward(model, tokens).hidden


@jax.jit
def _gradient(model: Model, factors: StackedAdapter, tokens: jax.Array) -> StackedAdapter:
    return jax.grad(lambda own: jnp.sum(forward(model.with_adapter(own), tokens).hidden))(factors)


def _tokens(shape: tuple[int, int]) -> jax.Array:
    return jnp.asarray(np.zeros(shape, np.int32))


def _numbers(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Repeat a few random numbers; drawing all in JAX would compile a program for each shape."""
    few = 0.02 * np.random.default_rng(0).standard_normal(_PERIOD)
    return np.resize(few.astype(dtype), shape)


def _made_up_model(settings: DecoderSettings, base: BaseModel, dtype: DTypeLike) -> Model:
    """Make the layers as `load_model` would: bfloat16 as bits, norms as float32."""
    layers, own, width = settings.layers, settings.stack[0], base.architecture.layer_inputs

    def matrix(*shape: int, packed: bool = False) -> jax.Array:
        numbers = _numbers(shape, dtype)
        return jnp.asarray(numbers.view(np.uint16) if packed else numbers)

    def ones(*shape: int) -> jax.Array:
        return jnp.asarray(np.ones(shape, np.float32))

    shapes = {role: (layers, *base.architecture.role_shapes[role]) for role in own.shapes}
    params = Params(
        embedding=matrix(settings.vocab, settings.hidden),
        head=None,
        final_norm=ones(settings.hidden),
        weights={role: matrix(*shape, packed=dtype == jnp.bfloat16) for role, shape in shapes.items()},
        biases={role: matrix(*shape[:2]) for role, shape in shapes.items() if role in settings.biased_roles},
        norms={place: ones(layers, size) for place, (_, size) in base.architecture.norms_of(own)},
        activation=tuple(ones(layers, 1) for _ in base.family.activation_tensors),
        tensors={name: ones(layers, *tensor.shape) for name, tensor in own.tensors.items()},
        layer_inputs=LayerInputWeights(
            matrix(settings.vocab, layers * width), matrix(layers * width, settings.hidden), ones(width)
        )
        if width
        else None,
    )
    return Model(settings, params)
