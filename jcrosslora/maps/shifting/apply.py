"""The maths of LoRA-Shift: pure functions of maps and factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.adapter.fused import fit_to_base
from jcrosslora.errors import AdapterError, MethodError
from jcrosslora.linalg import product_energy
from jcrosslora.maps.alignment.transport import Transport, TransportGroup
from jcrosslora.maps.evidence.records import Terms


@flax.struct.dataclass
class ShiftedFactors:
    """One module's moved factors, scale inside b, and its squared Frobenius norm on the way.

    Attributes:
        a: (K', I_tgt).
        b: (O_tgt, K').
        before: (), ||dW_src||_F^2.
        mapped: (), ||.||_F^2 of what the maps make of it.
        after: (), ||dW_tgt||_F^2, after calibration.
    """

    a: jax.Array
    b: jax.Array
    before: jax.Array
    mapped: jax.Array
    after: jax.Array


def apply(transport: Transport, adapter: Adapter | Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """Move the factors of an adapter through the maps: B_tgt = P_out B and A_tgt = A P_in', term by term.

    Pure and traceable: it works under `jax.jit`, `jax.vmap` (over adapters of equal ranks and scales whose factors are
    stacked leaf by leaf) and `jax.grad`, with the transport as an argument or closed over. `shift` alone does what
    follows the maps of some methods, and moves changes of the embedding and the output head.

    Args:
        transport: from `align`.
        adapter: factors by module of the source base; fused matrices are split.

    Returns:
        Factors by module of the target base, scale 1, of rank K for each term of the maps.

    Raises:
        AdapterError: no module of the adapter feeds a module of the target, an update does not fit its module, or it is
            a stack of adapters and the call is not vmapped.
        MethodError: the method fits an update and has no maps.
    """
    whole = adapter if isinstance(adapter, Adapter) else Adapter(dict(adapter))
    modules = fit_to_base(whole, transport.source, every=False).modules
    moved: dict[str, LoRAFactors] = {}
    start = transport.method.start
    if start is None:
        msg = f"method {transport.method.name} has no maps to apply: use jcrosslora.shift, or jcrosslora.transfer"
        raise MethodError(msg)
    for group in transport.groups:
        for rows in rows_by_rank(group, modules):
            some = [modules[group.pairs[row].source] for row in rows]
            a = jnp.stack([jnp.asarray(item.a, jnp.float32) for item in some])
            b = jnp.stack([jnp.asarray(item.b, jnp.float32) * item.scale for item in some])
            found = jax.vmap(lambda terms, a, b: shift_factors(terms, a, b, start.keeps_norm))(
                terms_of(group, rows), a, b
            )
            for index, row in enumerate(rows):
                moved[group.pairs[row].target] = LoRAFactors(a=found.a[index], b=found.b[index])
    if not moved:
        msg = f"none of the {len(modules)} modules of the adapter feeds a module of the target; align for its modules"
        raise AdapterError(msg)
    order = {name: index for index, name in enumerate(transport.target.shapes)}
    return {name: moved[name] for name in sorted(moved, key=order.__getitem__)}


def shift_factors(terms: Terms, a: jax.Array, b: jax.Array, keep_norm: bool) -> ShiftedFactors:
    """Move a (K, I_src) and b (O_src, K) through every term, and put the terms side by side."""
    before = product_energy(b, a)
    b_tgt = jnp.concatenate([p_out(b) for p_out, _ in terms], axis=1)
    a_tgt = jnp.concatenate([p_in(a.T).T for _, p_in in terms], axis=0)
    mapped = after = product_energy(b_tgt, a_tgt)
    if keep_norm:
        # Nothing can be restored where the map left nothing but rounding.
        alive = after > jnp.finfo(after.dtype).eps ** 2 * before
        factor = jnp.where(alive, jnp.sqrt(before / jnp.where(alive, after, 1)), 1)
        b_tgt, after = b_tgt * factor, after * factor**2
    return ShiftedFactors(a_tgt, b_tgt, before, mapped, after)


def rows_by_rank(group: TransportGroup, modules: Mapping[str, LoRAFactors]) -> Iterator[tuple[int, ...]]:
    """Yield the rows of a group that the modules feed, those of one rank together."""
    by_rank: dict[int, list[int]] = {}
    for row, pair in enumerate(group.pairs):
        if pair.source in modules:
            by_rank.setdefault(modules[pair.source].rank, []).append(row)
    yield from map(tuple, by_rank.values())


def terms_of(group: TransportGroup, rows: Sequence[int]) -> Terms:
    """Return the maps of some rows of a group."""
    if len(rows) == len(group.pairs):
        return group.terms
    return jax.tree.map(lambda x: x[np.array(rows)], group.terms)
