"""Run a function of single experts on tokens, sorted by expert and in blocks of rows of one expert.

`lax.ragged_dot` is a dense product over all experts on a CPU: it takes E times as long.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.ops import Row

# Rows of a block: few, so that little is computed for nothing, and enough for a product to be fast.
_FEWEST, _MOST = 8, 128

# Of rows (N, H) of one expert, its constants and its factors: float32 (N, H).
ExpertFunction = Callable[[jax.Array, Any, Any], jax.Array]


@flax.struct.dataclass
class Blocks:
    """Where the rows of tokens lie, sorted by expert, each expert's in blocks of N rows.

    Each of T tokens goes through K experts; there are S slots for rows.

    Attributes:
        slots: int32 (T, K), the slot of each pair of a token and an expert.
        pairs: int32 (S,), the pair in each slot, counted through (T, K); 0 in empty slots.
        filled: bool (S,), False in empty slots.
        experts: int32 (E,), those with any tokens first.
        used: int32 (), how many have any.
        starts: int32 (E,), the first block of each expert.
        counts: int32 (E,), the number of blocks of each expert.
    """

    slots: jax.Array
    pairs: jax.Array
    filled: jax.Array
    experts: jax.Array
    used: jax.Array
    starts: jax.Array
    counts: jax.Array


def block_rows(pairs: int, experts: int) -> int:
    """Return N, the rows of a block: a power of two near half of what one of E experts has on average."""
    share = max(pairs // (2 * experts), 1)
    return min(max(1 << (share - 1).bit_length(), _FEWEST), _MOST)


def sort_by_expert(chosen: jax.Array, experts: int) -> Blocks:
    """Sort tokens by their experts.

    Args:
        chosen: int32 (T, K), the experts of each token.
        experts: E.
    """
    flat = chosen.reshape(-1)
    pairs, rows = flat.shape[0], block_rows(flat.shape[0], experts)
    size = (pairs // rows + min(experts, pairs)) * rows  # each expert with tokens leaves less than a block empty
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    counts = -(-sizes // rows)
    first, starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes, jnp.cumsum(counts, dtype=jnp.int32) - counts
    own = flat[order]
    places = jnp.arange(pairs, dtype=jnp.int32) - first[own] + starts[own] * rows
    slots = jnp.zeros(pairs, jnp.int32).at[order].set(places)
    return Blocks(
        slots=slots.reshape(chosen.shape),
        pairs=jnp.zeros(size, jnp.int32).at[slots].set(jnp.arange(pairs, dtype=jnp.int32)),
        filled=jnp.zeros(size, bool).at[slots].set(True),
        experts=jnp.argsort(sizes == 0, stable=True).astype(jnp.int32),
        used=jnp.sum(sizes > 0, dtype=jnp.int32),
        starts=starts,
        counts=counts,
    )


def run_experts(
    function: ExpertFunction, experts: int, x: jax.Array, chosen: jax.Array, constants: Any, factors: Any
) -> jax.Array:
    """Run each token through its experts.

    Args:
        function: of one expert. It is derived by the rows and by the factors.
        experts: E.
        x: (T, H).
        chosen: int32 (T, K), from `route`.
        constants: a tree of arrays (E, ...), or of a `Row` of stacks of them. They have no derivatives: what is trained
            are factors.
        factors: a tree of arrays (E, ...).

    Returns:
        float32 (T, K, H).
    """
    blocks = sort_by_expert(chosen, experts)
    return _collect(_run(function, _spread(x, blocks), blocks, constants, factors), blocks)


# The gradients of both gathers are gathers too, which takes much less time than a scatter.
@jax.custom_vjp
def _spread(x: jax.Array, blocks: Blocks) -> jax.Array:
    return x[blocks.pairs // blocks.slots.shape[1]]


def _spread_backward(blocks: Blocks, gradient: jax.Array) -> tuple[jax.Array, None]:
    return jnp.sum(gradient[blocks.slots].astype(jnp.float32), axis=1).astype(gradient.dtype), None


_spread.defvjp(lambda x, blocks: (_spread(x, blocks), blocks), _spread_backward)


@jax.custom_vjp
def _collect(outputs: jax.Array, blocks: Blocks) -> jax.Array:
    return outputs[blocks.slots]


def _collect_backward(blocks: Blocks, gradient: jax.Array) -> tuple[jax.Array, None]:
    rows = gradient.reshape(-1, gradient.shape[-1])[blocks.pairs]
    return jnp.where(blocks.filled[:, None], rows, 0), None


_collect.defvjp(lambda outputs, blocks: (_collect(outputs, blocks), blocks), _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(function: ExpertFunction, rows: jax.Array, blocks: Blocks, constants: Any, factors: Any) -> jax.Array:
    """Run the function on rows (S, H); empty slots of blocks that are not used stay zero."""
    size = block_rows(blocks.slots.size, len(blocks.experts))

    def one(place: jax.Array, outputs: jax.Array) -> jax.Array:
        expert = blocks.experts[place]
        own, held = _of_expert(factors, expert), _of_expert(constants, expert)

        def block(number: jax.Array, outputs: jax.Array) -> jax.Array:
            found = function(lax.dynamic_slice_in_dim(rows, number * size, size), held, own)
            return lax.dynamic_update_slice_in_dim(outputs, found, number * size, 0)

        start = blocks.starts[expert]
        return lax.fori_loop(start, start + blocks.counts[expert], block, outputs)

    return lax.fori_loop(0, blocks.used, one, jnp.zeros(rows.shape, jnp.float32))


def _run_forward(
    function: ExpertFunction, rows: jax.Array, blocks: Blocks, constants: Any, factors: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _run(function, rows, blocks, constants, factors), (rows, blocks, constants, factors)


def _run_backward(
    function: ExpertFunction, kept: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, None, None, Any]:
    rows, blocks, constants, factors = kept
    size = block_rows(blocks.slots.size, len(blocks.experts))

    def one(place: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        expert = blocks.experts[place]
        own, held = _of_expert(factors, expert), _of_expert(constants, expert)

        def block(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            by_rows, by_factors = carry
            part, back = (lax.dynamic_slice_in_dim(x, number * size, size) for x in (rows, gradient))
            _, pull = jax.vjp(lambda part, own: function(part, held, own), part, own)
            found, added = pull(back)
            by_rows = lax.dynamic_update_slice_in_dim(by_rows, found, number * size, 0)
            return by_rows, jax.tree.map(jnp.add, by_factors, added)

        start, (by_rows, by_factors) = blocks.starts[expert], carry
        first = by_rows, jax.tree.map(jnp.zeros_like, own)
        by_rows, added = lax.fori_loop(start, start + blocks.counts[expert], block, first)
        return by_rows, jax.tree.map(lambda whole, part: whole.at[expert].set(part), by_factors, added)

    first = jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, factors)
    by_rows, by_factors = lax.fori_loop(0, blocks.used, one, first)
    return by_rows, None, None, by_factors


_run.defvjp(_run_forward, _run_backward)


def _of_expert(tree: Any, expert: jax.Array) -> Any:
    """Take the arrays of one expert out of arrays (E, ...), and out of rows of stacks (L, E, ...)."""

    def take(x: jax.Array | Row) -> jax.Array:
        if not isinstance(x, Row):
            return lax.dynamic_index_in_dim(x, expert, keepdims=False)
        zeros = (jnp.zeros((), jnp.int32),) * (x.stack.ndim - 2)
        found = lax.dynamic_slice(x.stack, (x.index, expert, *zeros), (1, 1, *x.stack.shape[2:]))
        return found.reshape(x.stack.shape[2:])

    return jax.tree.map(take, tree, is_leaf=lambda x: isinstance(x, Row))
