"""Run each expert on its tokens: the tokens are sorted by expert and divided into blocks of rows for one expert.

`lax.ragged_dot` computes a dense product over all E experts on a CPU, which takes E times as long.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jcrosslora.architectures.ops import Row, on_device

# Rows of a block: few, so that little padding is computed, but enough for a fast product.
_FEWEST, _MOST = 8, 128
_PARTS = 4  # an expert's last block is computed in quarters, and empty quarters are skipped

# (rows (N, I) of one expert, its constants, its factors) -> float32 (N, O).
ExpertFunction = Callable[[jax.Array, Any, Any], jax.Array]


@flax.struct.dataclass
class Sorted:
    """The order of token rows, sorted by expert. Each of T tokens goes through K experts.

    Attributes:
        slots: int32 (T, K), the row of each pair of a token and an expert.
        pairs: int32 (T K + N,), the pair in each row, counted through (T, K); 0 in the last N, which are empty.
        starts: int32 (E,), the first row of each expert.
        sizes: int32 (E,), the rows of each expert.
        experts: int32 (E,), the experts with any rows first, in order.
        used: int32 (), the number of experts with any rows.
    """

    slots: jax.Array
    pairs: jax.Array
    starts: jax.Array
    sizes: jax.Array
    experts: jax.Array
    used: jax.Array


def block_rows(pairs: int, experts: int) -> int:
    """Return N, the rows of a block: the average rows per expert, rounded up to a power of two from 8 to 128."""
    share = max(pairs // experts, 1)
    return min(max(1 << (share - 1).bit_length(), _FEWEST), _MOST)


def sort_by_expert(chosen: jax.Array, experts: int) -> Sorted:
    """Sort tokens by their chosen experts, int32 (T, K), out of E."""
    flat = chosen.reshape(-1)
    pairs = flat.shape[0]
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    slots = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    return Sorted(
        slots=slots.reshape(chosen.shape),
        pairs=jnp.concatenate([order, jnp.zeros(block_rows(pairs, experts), jnp.int32)]),
        starts=jnp.cumsum(sizes, dtype=jnp.int32) - sizes,
        sizes=sizes,
        experts=jnp.argsort(sizes == 0, stable=True).astype(jnp.int32),
        used=jnp.sum(sizes > 0, dtype=jnp.int32),
    )


def spread(x: jax.Array, order: Sorted, scales: jax.Array | None = None) -> jax.Array:
    """Write each token x (T, H) into the rows of its experts, (T K + N, H).

    `scales`, float32 (T, K), are factors on the inputs of a token's experts; None for 1.
    """
    rows = _spread(x, order)
    if scales is None:
        return rows
    return (rows.astype(jnp.float32) * scales.reshape(-1)[order.pairs][:, None]).astype(x.dtype)


# The gradients of both gathers are gathers too, which takes much less time than a scatter.
@jax.custom_vjp
def _spread(x: jax.Array, order: Sorted) -> jax.Array:
    return x[order.pairs // order.slots.shape[1]]


def _spread_backward(order: Sorted, gradient: jax.Array) -> tuple[jax.Array, None]:
    return jnp.sum(gradient[order.slots].astype(jnp.float32), axis=1).astype(gradient.dtype), None


_spread.defvjp(lambda x, order: (_spread(x, order), order), _spread_backward)


@jax.custom_vjp
def mix(outputs: jax.Array, weights: jax.Array, order: Sorted) -> jax.Array:
    """Sum each token's expert outputs, (T K + N, H) from `run_experts`, times weights (T, K): (T, H)."""
    return jnp.sum(outputs[order.slots] * weights[:, :, None], axis=1)


def _mix_backward(kept: tuple[jax.Array, jax.Array, Sorted], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    outputs, weights, order = kept
    rows = gradient[order.pairs // order.slots.shape[1]]
    # `run_experts` ignores the gradient of rows without a token.
    by_outputs = weights.reshape(-1)[order.pairs][:, None] * rows
    return by_outputs, jnp.sum(outputs * rows, axis=1)[order.slots], None


mix.defvjp(lambda outputs, weights, order: (mix(outputs, weights, order), (outputs, weights, order)), _mix_backward)


def _by_size(function: Callable[[int], Any], rows: int, left: jax.Array) -> Any:
    """Call a function with the smallest part of a block of `rows` that holds the `left` rows."""
    step = max(rows // _PARTS, _FEWEST)
    parts = [partial(function, size) for size in range(step, rows + 1, step)]

    # Under vmap, a switch would run all branches. An accelerator waits for each switch, and empty rows cost it less.
    @custom_vmap
    def place(left: jax.Array) -> jax.Array:
        whole = partial(jnp.full_like, fill_value=len(parts) - 1)
        return lax.platform_dependent(left, cpu=lambda left: (jnp.minimum(left, rows) - 1) // step, default=whole)

    @place.def_vmap
    def _(size: int, batched: list[bool], left: jax.Array) -> tuple[jax.Array, bool]:
        del size, batched, left
        return jnp.asarray(len(parts) - 1, jnp.int32), False

    return lax.switch(place(left), parts)


# A block begins at the first row that is not done and may reach into the rows of later experts, which overwrite it.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_experts(function: ExpertFunction, rows: jax.Array, order: Sorted, constants: Any, factors: Any) -> jax.Array:
    """Run a function for each expert on its rows.

    The backward pass runs the function again, so it is best to pass one product at a time.

    Args:
        function: runs one expert; it is differentiated with respect to the rows and the factors.
        rows: (T K + N, I), from `spread`.
        constants: a pytree of arrays (E, ...), or of a `Row` of stacks of them. They get no gradient: only the factors
            are trained.
        factors: a pytree of arrays (E, ...).

    Returns:
        float32 (T K + N, O); rows without a token hold anything.
    """
    size = block_rows(order.slots.size, len(order.experts))

    def one(place: jax.Array, outputs: jax.Array) -> jax.Array:
        expert = order.experts[place]
        own, held = _of_expert(factors, expert), _of_expert(constants, expert)

        def block(number: jax.Array, outputs: jax.Array) -> jax.Array:
            start = order.starts[expert] + number * size

            def run(count: int) -> jax.Array:
                found = function(lax.dynamic_slice_in_dim(rows, start, count), held, own)
                return jnp.pad(found, ((0, size - count), (0, 0)))

            found = _by_size(run, size, order.sizes[expert] - number * size)
            return lax.dynamic_update_slice_in_dim(outputs, found, start, 0)

        return lax.fori_loop(0, -(-order.sizes[expert] // size), block, outputs)

    first = jnp.int32(0)
    whole = jax.eval_shape(lambda: function(rows, _of_expert(constants, first), _of_expert(factors, first)))
    return lax.fori_loop(0, order.used, one, jnp.zeros(whole.shape, whole.dtype))


def _run_forward(
    function: ExpertFunction, rows: jax.Array, order: Sorted, constants: Any, factors: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return run_experts(function, rows, order, constants, factors), (rows, order, constants, factors)


def _run_backward(
    function: ExpertFunction, kept: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, None, None, Any]:
    rows, order, constants, factors = kept
    size = block_rows(order.slots.size, len(order.experts))

    def one(place: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        expert = order.experts[place]
        own, held = _of_expert(factors, expert), _of_expert(constants, expert)

        def block(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            by_rows, by_factors = carry
            start, left = order.starts[expert] + number * size, order.sizes[expert] - number * size

            def pull(count: int) -> tuple[jax.Array, Any]:
                part, back = (lax.dynamic_slice_in_dim(x, start, count) for x in (rows, gradient))
                back = jnp.where(jnp.arange(count)[:, None] < left, back, 0)  # the rest belongs to later experts
                found, added = jax.vjp(lambda part, own: function(part, held, own), part, own)[1](back)
                return jnp.pad(found, ((0, size - count), (0, 0))), added

            found, added = _by_size(pull, size, left)
            by_rows = lax.dynamic_update_slice_in_dim(by_rows, found, start, 0)
            return by_rows, jax.tree.map(jnp.add, by_factors, added)

        by_rows, by_factors = carry
        first = by_rows, jax.tree.map(jnp.zeros_like, own)
        by_rows, added = lax.fori_loop(0, -(-order.sizes[expert] // size), block, first)
        return by_rows, jax.tree.map(lambda whole, part: whole.at[expert].set(part), by_factors, added)

    first = jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, factors)
    by_rows, by_factors = lax.fori_loop(0, order.used, one, first)
    return by_rows, None, None, by_factors


run_experts.defvjp(_run_forward, _run_backward)


def _of_expert(tree: Any, expert: jax.Array) -> Any:
    """Take the slice of one expert from arrays (E, ...), and from a `Row` of stacks (L, E, ...)."""

    def take(x: jax.Array | Row) -> jax.Array:
        if not isinstance(x, Row):
            return lax.dynamic_index_in_dim(x, expert, keepdims=False)
        zeros = (jnp.zeros((), jnp.int32),) * (x.stack.ndim - 2)
        found = lax.dynamic_slice(x.stack, (x.index, expert, *zeros), (1, 1, *x.stack.shape[2:]))
        return on_device(found).reshape(x.stack.shape[2:])

    return jax.tree.map(take, tree, is_leaf=lambda x: isinstance(x, Row))
