"""LoRA-Shift: a transport and an adapter in, the adapter for the other base out. The same for all methods."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors, fuse, split_fused, update_norm
from jcrosslora.adapter.ignored import drop_token_updates
from jcrosslora.adapter.kinds.dora import DORA
from jcrosslora.adapter.truncation import RankRule, Truncation, check_rule, truncate_by_rule
from jcrosslora.alignment.transport import BaseInfo, Transport, TransportGroup
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import AdapterError, PairingError, UsageError
from jcrosslora.evidence.records import Terms
from jcrosslora.linalg import product_energy
from jcrosslora.lineage.pairing import Pair
from jcrosslora.methods import get_method
from jcrosslora.report.record import ModuleRow, TransferReport, UnmappedSource
from jcrosslora.shifting.token_rows import carry_tokens

Calibration = Literal["none", "frobenius"]


@flax.struct.dataclass(repr=False)
class MovedAdapter(Adapter):
    """An adapter that was moved, with the account of what became of it.

    Attributes:
        report: static, see `TransferReport`.
        target: static, the base that it is now for.
    """

    report: TransferReport | None = flax.struct.field(pytree_node=False, default=None)
    target: BaseInfo | None = flax.struct.field(pytree_node=False, default=None)


def shift(
    transport: Transport,
    adapter: Adapter,
    *,
    calibrate: Calibration | None = None,
    scale: float = 1.0,
    out_rank: RankRule | None = None,
    bases: tuple[BaseModel, BaseModel] | None = None,
) -> MovedAdapter:
    """Move an adapter through a transport (LoRA-Shift, arXiv 2508.05232, section 3).

    B_tgt = P_out B and A_tgt = A P_in', term by term; the full-size product is never formed.

    Args:
        transport: from `align`.
        adapter: an adapter of the transport's source base.
        calibrate: "frobenius" gives every module's update the norm it had on the source; "none" leaves what the
            maps make of it; None is the method's own choice (only the random control restores the norm).
        scale: every moved update is multiplied by this; changes of embedding and head move with 1 alone.
        out_rank: cut every update, optimally, to this rank, or by one of the rules of `truncate_by_rule`; None keeps the
            rank (methods of two terms double it).
        bases: source and target, without which changes of the embedding and the output head stay behind.

    Returns:
        The adapter for the target base, float32, with its report.

    Raises:
        AdapterError: the adapter does not fit the source base, or holds nothing that the maps carry.
        UsageError: an out_rank that is none, an unknown calibration, or a scale that is zero or no finite number.
    """
    mover = Shifter(
        adapter,
        transport.source,
        method=transport.recipe.method,
        calibrate=calibrate,
        scale=scale,
        out_rank=out_rank,
    )
    for group in transport.groups:
        mover.add(group)
    return mover.finish(transport, bases)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Rows of a group whose updates have one rank, and what is done with them: adapters alike in it move together."""

    rows: tuple[int, ...]
    rank: int
    keep_norm: bool


@flax.struct.dataclass
class _Shifted:
    """One module's moved factors (scale baked into b), and ||dW||_F^2 before, after the maps, and in the end."""

    a: jax.Array
    b: jax.Array
    before: jax.Array
    mapped: jax.Array
    after: jax.Array


class Shifter:
    """Moves one adapter, group by group, so that the groups of a transport need not all be in memory."""

    def __init__(
        self,
        adapter: Adapter,
        source: BaseInfo,
        *,
        method: str,
        calibrate: Calibration | None = None,
        scale: float = 1.0,
        out_rank: RankRule | None = None,
    ) -> None:
        if calibrate not in (None, "none", "frobenius"):
            msg = f"calibration {calibrate!r} is unknown; use none or frobenius"
            raise UsageError(msg)
        if not math.isfinite(scale) or scale == 0:
            msg = f"scale {scale:g} is out of range; it must be a finite number other than 0"
            raise UsageError(msg)
        given = "calibration frobenius" if calibrate == "frobenius" else f"scale {scale:g}" if scale != 1 else None
        if given is not None and get_method(method).fits:
            msg = (
                f"{given} has no part in method {method}, which fits the size of the update as well; "
                "leave it out, or use another method"
            )
            raise UsageError(msg)
        if out_rank is not None:
            check_rule(out_rank)
        _check_invocation(adapter)
        if not get_method(method).preserves_residual_basis:
            adapter = drop_token_updates(
                adapter, f"method {method} does not keep the coordinates of the residual stream"
            )
        if scale != 1:
            adapter = drop_token_updates(adapter, f"scale {scale:g} is of linear layers alone")
        self.adapter = fit_to_base(adapter, source)
        self._scale = scale
        self._keep_norm = get_method(method).keeps_norm if calibrate is None else calibrate == "frobenius"
        self.out_rank: RankRule | None = out_rank
        # What is fitted behind the maps is cut when it has been.
        self._cuts_here = out_rank is not None and get_method(method).then == "nothing"
        self._rows: list[ModuleRow] = []
        self._modules: dict[str, LoRAFactors] = {}

    def add(self, group: TransportGroup) -> None:
        """Move what the adapter holds for the pairs of one group."""
        add_to_all([self], group)

    def finish(self, transport: Transport, bases: tuple[BaseModel, BaseModel] | None = None) -> MovedAdapter:
        """Put the modules in the target's order and close the account; `transport` may have dropped its groups.

        With both bases changes of the embedding and the output head are carried over as well.
        """
        if not self._modules:
            msg = f"none of the {len(self.adapter.modules)} modules of {self.adapter.info.name} is carried over"
            raise PairingError(msg + "; choose another depth map")
        energies = {name: update_norm(item) ** 2 for name, item in self.adapter.modules.items()}
        order = {name: place for place, name in enumerate(transport.target.shapes)}
        names = sorted(self._modules, key=order.__getitem__)
        tokens, token_rows, stays = (), (), "shift was not given the bases"
        if bases is not None and self.adapter.tokens:
            tokens, token_rows, stays = carry_tokens(self.adapter, *bases, get_method(transport.recipe.method))
        adapter = drop_token_updates(self.adapter, stays) if stays else self.adapter
        report = TransferReport(
            recipe=transport.recipe,
            source=transport.source,
            target=transport.target,
            adapter=self.adapter.info,
            calibration="frobenius" if self._keep_norm else "none",
            scale=self._scale,
            out_rank=self.out_rank,
            layers=transport.pairing.layers,
            rows=tuple(sorted(self._rows, key=lambda row: order[row.target])),
            unmapped_targets=transport.pairing.unmapped_targets,
            unmapped_sources=_unmapped_sources(energies, {row.source for row in self._rows}),
            energy=sum(energies.values()),
            warnings=transport.warnings + _notes(adapter, transport),
            tokens=token_rows,
        )
        info = AdapterInfo(
            name=f"{self.adapter.info.name}, moved",
            base_name=transport.target.name,
            kind=self.adapter.info.kind if self.adapter.info.invocation else "LoRA",
            invocation=self.adapter.info.invocation_target,
        )
        moved = MovedAdapter(
            modules={name: self._modules[name] for name in names},
            info=info,
            tokens=tokens,
            report=report,
            target=transport.target,
        )
        return cut_moved(moved) if self._cuts_here else moved

    def _parts(self, group: TransportGroup) -> list[_Part]:
        """What can be moved in one go of what the adapter holds for a group: rows of one rank each."""
        by_rank: dict[int, list[int]] = {}
        for row, pair in enumerate(group.pairs):
            if pair.source in self.adapter.modules:
                by_rank.setdefault(self.adapter.modules[pair.source].rank, []).append(row)
        return [_Part(tuple(rows), rank, self._keep_norm) for rank, rows in by_rank.items()]

    def _take(self, pairs: list[Pair], agreements: list[dict[str, Any]], moved: _Shifted) -> None:
        for place, (pair, agreement) in enumerate(zip(pairs, agreements, strict=True)):
            b = moved.b[place] if self._scale == 1 else moved.b[place] * np.float32(self._scale)
            self._modules[pair.target] = LoRAFactors(a=moved.a[place], b=b)
            self._rows.append(_row(pair, agreement, moved, place, self._scale))


def add_to_all(movers: Sequence[Shifter], group: TransportGroup) -> None:
    """Move what several adapters of one base hold for the pairs of a group, all that are alike in one vmapped call."""
    alike: dict[_Part, list[Shifter]] = {}
    for mover in movers:
        for part in mover._parts(group):
            alike.setdefault(part, []).append(mover)
    for part, some in alike.items():
        pairs = [group.pairs[row] for row in part.rows]
        factors = [_stack([mover.adapter.modules[pair.source] for pair in pairs]) for mover in some]
        a, b, scale = (np.stack(leaves, axis=1) for leaves in zip(*factors, strict=True))
        rows = np.array(part.rows)
        terms = group.terms
        if len(part.rows) != len(group.pairs):
            terms = jax.tree.map(lambda x, rows=rows: x[rows], terms)
        moved = jax.tree.map(np.asarray, _shift_stack(terms, a, b, scale, part.keep_norm))
        agreement = {key: np.asarray(x)[rows] for key, x in dataclasses.asdict(group.agreement).items()}
        agreements = [{key: x[place].item() for key, x in agreement.items()} for place in range(len(pairs))]
        for place, mover in enumerate(some):
            mover._take(pairs, agreements, jax.tree.map(lambda x, place=place: x[:, place], moved))


def _shift_one(terms: Terms, a: jax.Array, b: jax.Array, keep_norm: bool) -> _Shifted:
    """The unbatched maths: a (K, I_src) and b (O_src, K) through every term, the terms side by side."""
    before = product_energy(b, a)
    b_tgt = jnp.concatenate([p_out(b) for p_out, _ in terms], axis=1)
    a_tgt = jnp.concatenate([p_in(a.T).T for _, p_in in terms], axis=0)
    mapped = after = product_energy(b_tgt, a_tgt)
    if keep_norm:
        # Nothing can be restored where the map left nothing but rounding.
        alive = after > jnp.finfo(after.dtype).eps ** 2 * before
        factor = jnp.where(alive, jnp.sqrt(before / jnp.where(alive, after, 1)), 1)
        b_tgt, after = b_tgt * factor, after * factor**2
    return _Shifted(a_tgt, b_tgt, before, mapped, after)


@partial(jax.jit, static_argnames=("keep_norm",))
def _shift_stack(terms: Terms, a: jax.Array, b: jax.Array, scale: jax.Array, keep_norm: bool) -> _Shifted:
    """Of L pairs and N adapters: a (L, N, K, I_src), b (L, N, O_src, K), scale (L, N)."""
    b = b * scale[:, :, None, None]

    def one(terms: Terms, a: jax.Array, b: jax.Array) -> _Shifted:
        return jax.vmap(lambda a, b: _shift_one(terms, a, b, keep_norm))(a, b)

    return jax.vmap(one)(terms, a, b)


def cut_moved(moved: MovedAdapter) -> MovedAdapter:
    """Cut the updates of a moved adapter as its report says (`out_rank`), and put what is left into the report."""
    assert moved.report is not None
    rule = moved.report.out_rank
    assert rule is not None
    return cut_by(moved, lambda whole: truncate_by_rule(whole, rule))


def cut_by(
    moved: MovedAdapter, cut: Callable[[Adapter], tuple[Adapter, Truncation]], *, restores: bool = True
) -> MovedAdapter:
    """Replace the updates of a moved adapter by what is left of them, and put that into the report.

    Args:
        moved: with its report.
        cut: gives what is left of an adapter of the modules that the base stores, and the account of it.
        restores: whether each module gets back its norm where the calibration was to keep it.
    """
    assert moved.report is not None
    # Parts of a fused matrix are written as one update of it: cut on their own, they would have a rank for each.
    fused = moved.target.fused if moved.target is not None else {}
    whole, account = cut(Adapter(fuse(moved.modules, fused), moved.info))
    parts = split_fused(whole, fused).modules
    modules = {name: parts[name] for name in moved.modules}
    norms = {name: update_norm(factors) for name, factors in modules.items()}
    if restores and moved.report.calibration == "frobenius":
        wanted = {row.target: row.norm_after for row in moved.report.rows}
        # What the maps did not make, as of a source interpolation, has no norm to keep.
        factors = {name: wanted[name] / norm if norm > 0 and name in wanted else 1.0 for name, norm in norms.items()}
        modules = {
            name: LoRAFactors(a=item.a, b=np.asarray(item.b) * np.float32(factors[name]))
            for name, item in modules.items()
        }
        norms = {name: norm * factors[name] for name, norm in norms.items()}
    rows = tuple(
        dataclasses.replace(row, norm_after=norms.get(row.target, row.norm_after)) for row in moved.report.rows
    )
    report = dataclasses.replace(moved.report, rows=rows, out_rank=account.rule, cut=account)
    return dataclasses.replace(moved, modules=modules, report=report)


def _stack(factors: list[LoRAFactors]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a = np.stack([np.asarray(item.a, np.float32) for item in factors])
    b = np.stack([np.asarray(item.b, np.float32) for item in factors])
    return a, b, np.array([item.scale for item in factors], np.float32)


def fit_to_base(adapter: Adapter, base: BaseInfo) -> Adapter:
    """Check that an adapter belongs to a base by names and shapes, and take fused matrices apart.

    Raises:
        AdapterError: a module that the base does not have, or of another shape.
    """
    adapter = split_fused(adapter, base.fused)
    unknown = [name for name in adapter.modules if name not in base.shapes]
    if unknown:
        msg = (
            f"adapter {adapter.info.name} updates {len(unknown)} modules, {unknown[0]} the first, that the base "
            f"{base.name} ({base.family}, {len(base.shapes)} modules) does not have; give the base it was trained on"
        )
        raise AdapterError(msg)
    for name, factors in adapter.modules.items():
        if factors.shape != base.shapes[name]:
            came, want = factors.shape, base.shapes[name]
            msg = (
                f"adapter {adapter.info.name} has an update of {came[0]} x {came[1]} for {name}, which is "
                f"{want[0]} x {want[1]} in the base {base.name}; give the base it was trained on"
            )
            raise AdapterError(msg)
    return adapter


def _unmapped_sources(energies: dict[str, float], used: set[str]) -> tuple[UnmappedSource, ...]:
    total = sum(energies.values()) or 1.0
    return tuple(UnmappedSource(name, energy / total) for name, energy in energies.items() if name not in used)


def _notes(adapter: Adapter, transport: Transport) -> tuple[str, ...]:
    lossy = (f"the adapter is {adapter.info.read_as}.",) if adapter.info.lost else ()
    if lossy and transport.source.digest == transport.target.digest:
        again = ", as does what `jcrosslora export --keep-dora` writes" if adapter.info.kind == DORA.name else ""
        lossy += (
            f"both bases have the same weights: the adapter's own file works on the target, and loses nothing{again}.",
        )
    return lossy + tuple(f"not moved: {sentence}" for sentence in adapter.info.ignored)


def _check_invocation(adapter: Adapter) -> None:
    if adapter.info.invocation is not None and adapter.info.invocation_target is None:
        msg = (
            f"adapter {adapter.info.name} acts only after tokens of its own base; write them in the target's first, by "
            "jcrosslora.shifting.invocation.with_invocation(adapter, source, target)"
        )
        raise AdapterError(msg)


def _row(pair: Pair, agreement: dict[str, Any], moved: _Shifted, place: int, scale: float) -> ModuleRow:
    return ModuleRow(
        target=pair.target,
        source=pair.source,
        role=pair.role,
        energy=float(moved.before[place]),
        kept=_ratio(float(moved.mapped[place]), float(moved.before[place])),
        norm_before=float(np.sqrt(moved.before[place])),
        norm_after=float(np.sqrt(moved.after[place])) * abs(scale),
        **agreement,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0
