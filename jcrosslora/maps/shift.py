"""LoRA-Shift (arXiv 2508.05232, section 3): apply maps to adapters, the same for all methods."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, Carried, LoRAFactors, fit_to_base, update_norm
from jcrosslora.adapter.records import as_adapter, left_out, restrict
from jcrosslora.adapter.save import carried_by
from jcrosslora.errors import AdapterError, MethodError, PairingError, UsageError
from jcrosslora.linalg import array_module, map_on_host, product_energy
from jcrosslora.maps.align import align_groups
from jcrosslora.maps.evidence import Terms
from jcrosslora.maps.groups import TransportGroup
from jcrosslora.maps.method import Method, Plan
from jcrosslora.maps.moved import ModuleRow, Moved, UnmappedSource, none_if_nan
from jcrosslora.maps.other_changes import carry_experts, carry_tokens
from jcrosslora.maps.transport import Transport
from jcrosslora.relation.pairing import Pair


@flax.struct.dataclass
class ShiftedFactors:
    """One module's moved factors, with the scale inside b, and the update's squared Frobenius norm at each step.

    Attributes:
        a: (K', I_tgt), where `b` is (O_tgt, K').
        before: (), ||dW_src||_F^2. It is `mapped` after the maps, and `after` when calibration is done too.
    """

    a: jax.Array
    b: jax.Array
    before: jax.Array
    mapped: jax.Array
    after: jax.Array


def apply(transport: Transport, adapter: Adapter | Mapping[str, LoRAFactors] | Any) -> dict[str, LoRAFactors]:
    """Move the factors of an adapter through the maps: B_tgt = P_out B and A_tgt = A P_in', term by term.

    Pure and traceable: it works under `jax.jit`, `jax.grad` and `jax.vmap` (over adapters of equal ranks and scales,
    with factors stacked leaf by leaf), with the transport as an argument or closed over. Only `shift` runs the steps
    that some methods do after the maps, and moves experts and changes of the embedding and the output head.

    Args:
        adapter: factors by module of the source base; fused matrices are split.

    Returns:
        Factors by module of the target base, scale 1, of rank K for each term of the maps.

    Raises:
        AdapterError: no module of the adapter feeds a module of the target, an update does not fit its module, or a
            stack of adapters is given without `jax.vmap`.
        MethodError: the method has no maps, because it fits an update.
    """
    modules = fit_to_base(as_adapter(adapter), transport.source, every=False).modules
    method = transport.method.map_method
    if method is None:
        msg = f"method {transport.method.name} has no maps to apply: use jcrosslora.shift, or jcrosslora.transfer"
        raise MethodError(msg)
    moved: dict[str, LoRAFactors] = {}
    for group in transport.groups:
        by_rank: dict[int, list[int]] = {}
        for row, pair in enumerate(group.pairs):
            if pair.source in modules:
                by_rank.setdefault(modules[pair.source].rank, []).append(row)
        for rows in by_rank.values():
            some = [modules[group.pairs[row].source] for row in rows]
            a = jnp.stack([jnp.asarray(item.a, jnp.float32) for item in some])
            b = jnp.stack([jnp.asarray(item.b, jnp.float32) * item.scale for item in some])
            every, picked = len(rows) == len(group.pairs), np.array(rows)
            terms = group.terms if every else jax.tree.map(lambda x, picked=picked: x[picked], group.terms)
            found = jax.vmap(partial(_shift_factors, keep_norm=method.is_control))(terms, a, b)
            for index, row in enumerate(rows):
                moved[group.pairs[row].target] = LoRAFactors(a=found.a[index], b=found.b[index])
    if not moved:
        msg = f"none of the {len(modules)} modules of the adapter feeds a module of the target; align for its modules"
        raise AdapterError(msg)
    return {name: moved[name] for name in transport.target.shapes if name in moved}


def checked_adapter(plan: Plan, profile: str) -> Adapter:
    """Return the part of the plan's adapter that the method, the output profile and the scale allow to move.

    Raises:
        AdapterError: no update of a linear layer or an expert can be moved, or the invocation is not translated yet.
        UsageError: the scale is zero or not finite, the calibration is unknown, or the method uses neither.
    """
    adapter, method = plan.adapter, plan.method
    _check_settings(method, plan.calibrate, plan.scale)
    name = adapter.info.name
    if adapter.info.invocation is not None and adapter.info.invocation_target is None:
        msg = f"adapter {name} acts only after tokens of its base; write them in the target's first, by "
        raise AdapterError(msg + "jcrosslora.maps.other_changes.with_invocation(adapter, source, target)")
    for carried, why in _limits(plan, profile):
        adapter = restrict(adapter, carried, why)
    if not (adapter.modules or adapter.experts):
        left = "; ".join(adapter.info.ignored).rstrip(".") or "it is empty"
        msg = f"adapter {name} has no update of a linear layer, and nothing else of it is moved ({left}): use "
        raise AdapterError(msg + "method distill, or copy or select, in profile peft, for a copy of its base")
    return adapter


def _limits(plan: Plan, profile: str) -> Iterator[tuple[Carried, str]]:
    """Yield the kinds of change that each limit lets move, with the reason why the rest does not."""
    method = plan.method
    if Carried.TOKENS in method.carries:
        yield carried_by(profile)
    why = f"method {method.name} does not keep the coordinates of the residual stream"
    yield method.carries | ~Carried.TOKENS, why
    yield method.carries, f"method {method.name} does not move them"
    if plan.scale != 1:
        yield Carried.LINEAR, f"scale {plan.scale:g} is of linear layers alone"


def map_adapter(plan: Plan) -> Moved:
    """Return the adapter of a plan after the maps of its method; see `map_together`."""
    return map_together([plan], plan)[0]


def map_together(plans: Sequence[Plan], alignment: Plan) -> list[Moved]:
    """Align the modules group by group, and move the adapters of all plans through a group before it is dropped.

    `alignment` is the plan of the alignment that all plans share, with its text.

    Raises:
        PairingError: no update of one of the adapters was moved.
        CheckpointError: weights cannot be read or are not finite.
    """
    kernels, found = list[str](), [_Mapping(plan) for plan in plans]
    for group in align_groups(alignment) if alignment.groups is None else alignment.groups:
        _add_to_all(found, group)
        kernels += group.kernels
    return [one.finish(tuple(kernels)) for one in found]


class _Mapping:
    """Collects the mapped modules of one adapter, group by group."""

    def __init__(self, plan: Plan) -> None:
        self.adapter, self.plan = plan.adapter, plan
        self.rows: list[ModuleRow] = []
        self.modules: dict[str, LoRAFactors] = {}

    def finish(self, kernels: tuple[str, ...]) -> Moved:
        """Put the modules in the target's order, move experts and token rows, and return all with their account."""
        plan, adapter = self.plan, self.adapter
        method, pair = plan.method, plan.pair
        experts, notes = (), ()
        if adapter.experts and not method.fits_update:
            experts, notes = carry_experts(adapter, pair, method)
        if not (self.modules or experts or (method.fits_update and adapter.experts)):
            msg = f"none of the {len(adapter.modules)} modules of {adapter.info.name} is carried over"
            raise PairingError("; ".join([msg, *notes, "choose another depth map or method"]))
        tokens, token_rows, reason = (), (), ""
        if adapter.tokens:
            tokens, token_rows, reason = carry_tokens(adapter, pair, method)
        left = left_out(adapter, ~Carried.TOKENS, reason) if reason else ()
        order = {name: index for index, name in enumerate(plan.target.modules)}
        modules = {name: self.modules[name] for name in order if name in self.modules}
        energies = {name: update_norm(item) ** 2 for name, item in adapter.modules.items()}
        used, total = {row.source for row in self.rows}, sum(energies.values())
        return Moved(
            Adapter(modules=modules, tokens=tokens, experts=experts),
            rows=tuple(sorted(self.rows, key=lambda row: order[row.target])),
            tokens=token_rows,
            unmapped=tuple(
                UnmappedSource(name, energy / (total or 1.0)) for name, energy in energies.items() if name not in used
            ),
            kernels=kernels,
            warnings=(*(f"not moved: {sentence}" for sentence in left), *notes),
        )

    def take(self, pair: Pair, agreement: Mapping[str, Any], moved: ShiftedFactors) -> None:
        """Keep the moved factors of a pair, times the plan's scale, and their row for the report."""
        scale = self.plan.scale
        b = moved.b if scale == 1 else moved.b * np.float32(scale)
        self.modules[pair.target] = LoRAFactors(a=moved.a, b=b)
        before = float(moved.before)
        figures = {
            **agreement,
            "energy": before,
            "kept": float(moved.mapped) / before if before > 0 else 1.0,
            "norm_before": float(np.sqrt(moved.before)),
            "norm_after": float(np.sqrt(moved.after)) * abs(scale),
        }
        known: dict[str, Any] = {name: none_if_nan(value) for name, value in figures.items()}
        self.rows.append(ModuleRow(pair.target, pair.source, pair.role, **known))


def _add_to_all(mappings: Sequence[_Mapping], group: TransportGroup) -> None:
    """Move the updates of several adapters for the pairs of a group, on the host.

    The products are thin and have many shapes: numpy finishes them before XLA could compile a program for each.
    """
    terms, agreement = jax.tree.map(np.asarray, (group.terms, group.agreement))

    def move(row: int) -> list[tuple[_Mapping, ShiftedFactors]]:
        maps, found = jax.tree.map(lambda x: x[row], terms), []
        for one in mappings:
            if (item := one.adapter.modules.get(group.pairs[row].source)) is not None:
                a, b = (np.asarray(factor, np.float32) for factor in (item.a, item.b))
                scaled = b * np.float32(item.scale)
                found.append((one, _shift_factors(maps, a, scaled, keep_norm=one.plan.keeps_norm)))
        return found

    for row, found in enumerate(map_on_host(move, range(len(group.pairs)))):
        figures = {key: x[row].item() for key, x in agreement.items()}
        for one, moved in found:
            one.take(group.pairs[row], figures, moved)


def _shift_factors(terms: Terms, a: Any, b: Any, *, keep_norm: bool) -> ShiftedFactors:
    """Move a (K, I_src) and b (O_src, K) through every term, and concatenate the results (JAX or numpy)."""
    xp, before = array_module(b), product_energy(b, a)
    b_tgt = xp.concatenate([p_out(b) for p_out, _ in terms], axis=1)
    a_tgt = xp.concatenate([p_in(a.T).T for _, p_in in terms], axis=0)
    mapped = after = product_energy(b_tgt, a_tgt)
    if keep_norm:
        # The norm cannot be restored if the map left only rounding errors.
        alive = after > xp.finfo(after.dtype).eps ** 2 * before
        factor = xp.where(alive, xp.sqrt(before / xp.where(alive, after, 1)), 1)
        b_tgt, after = b_tgt * factor, after * factor**2
    return ShiftedFactors(a_tgt, b_tgt, before, mapped, after)


def _check_settings(method: Method, calibrate: str | None, scale: float) -> None:
    if calibrate not in (None, "none", "frobenius"):
        raise UsageError(f"calibration {calibrate!r} is unknown; use none or frobenius")
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(f"scale {scale:g} is out of range; it must be a finite number other than 0")
    given = "calibration frobenius" if calibrate == "frobenius" else f"scale {scale:g}" if scale != 1 else None
    if given is not None and method.fits_update:
        msg = f"{given} has no part in method {method.name}, which fits the size of the update as well; "
        raise UsageError(msg + "leave it out, or use another method")
