"""LoRA-Shift (arXiv 2508.05232, section 3): carry adapters through the maps, the same for all methods."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors, update_norm
from jcrosslora.adapter.kinds.dora import DORA
from jcrosslora.adapter.records import Carried, restrict
from jcrosslora.checkpoint.base import BaseInfo
from jcrosslora.errors import AdapterError, PairingError, UsageError
from jcrosslora.maps.alignment.transport import Transport, TransportGroup
from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.maps.evidence.records import Terms
from jcrosslora.maps.method import Method
from jcrosslora.maps.shifting.apply import ShiftedFactors, fit_to_base, rows_by_rank, shift_factors, terms_of
from jcrosslora.maps.shifting.other_changes import carry_experts, carry_tokens
from jcrosslora.maps.shifting.records import Calibration, ModuleRow, Shifted, UnmappedSource
from jcrosslora.relation.pairing import Pair


class _Part(NamedTuple):
    """Rows of a group whose updates have one rank. Adapters that agree in it move together."""

    rows: tuple[int, ...]
    rank: int
    keep_norm: bool


class Shifter:
    """Moves one adapter, group by group, so that the groups of a transport need not all be in memory.

    `adapter` is the adapter to move, with fused matrices split.
    """

    def __init__(
        self,
        adapter: Adapter,
        source: BaseInfo,
        method: Method,
        *,
        calibrate: Calibration | None = None,
        scale: float = 1.0,
    ) -> None:
        """Check that the adapter fits the base, and the settings the method.

        Args:
            adapter: an adapter of the source.
            source: the base that it is of.
            method: of the transport; without maps its adapter is only checked.
            calibrate: "frobenius" gives every module's update the norm it had on the source; "none" leaves what the
                maps make of it; None is the method's own choice (the random control alone restores the norm).
            scale: every moved update is multiplied by this; changes of embedding and head move with 1 alone.

        Raises:
            AdapterError: the adapter does not fit the source base, or none of its updates can be moved.
            UsageError: an unknown calibration, or a scale that is zero or not finite.
        """
        _check_settings(method, calibrate, scale)
        _check_translated(adapter)
        why = f"method {method.name} does not keep the coordinates of the residual stream"
        adapter = restrict(adapter, method.carries | ~Carried.TOKENS, why)
        adapter = restrict(adapter, method.carries, f"method {method.name} does not move them")
        if scale != 1:
            adapter = restrict(adapter, Carried.LINEAR, f"scale {scale:g} is of linear layers alone")
        _check_not_empty(adapter)
        self.adapter = fit_to_base(adapter, source)
        self._method, self._scale = method, scale
        restores_norm = method.start is not None and method.start.keeps_norm
        self._keep_norm = restores_norm if calibrate is None else calibrate == "frobenius"
        self._rows: list[ModuleRow] = []
        self._modules: dict[str, LoRAFactors] = {}

    def add(self, group: TransportGroup) -> None:
        """Move what the adapter holds for the pairs of one group."""
        add_to_all([self], group)

    def finish(self, transport: Transport, pair: BasePair) -> Shifted:
        """Put the modules in the target's order and close the account.

        The transport may have dropped its groups.

        Raises:
            PairingError: no update of the adapter was moved.
        """
        experts, notes = (), ()
        if self.adapter.experts and not self._method.fits_update:
            experts, notes = carry_experts(self.adapter, pair, self._method)
        energies = {name: update_norm(item) ** 2 for name, item in self.adapter.modules.items()}
        if self._method.start is None:
            self._rows = [
                ModuleRow.unmapped(pair.target, pair.role, pair.source, energies[pair.source])
                for pair in transport.pairing.pairs
                if pair.source in energies
            ]
        elif not (self._modules or experts or (self._method.fits_update and self.adapter.experts)):
            msg = f"none of the {len(self.adapter.modules)} modules of {self.adapter.info.name} is carried over"
            raise PairingError("; ".join([msg, *notes, "choose another depth map or method"]))
        order = {name: index for index, name in enumerate(transport.target.shapes)}
        tokens, token_rows, reason = (), (), ""
        if self.adapter.tokens:
            tokens, token_rows, reason = carry_tokens(self.adapter, pair, self._method)
        remaining = restrict(self.adapter, ~Carried.TOKENS, reason) if reason else self.adapter
        info = AdapterInfo(
            name=f"{self.adapter.info.name}, moved",
            base_name=transport.target.name,
            prefix=transport.target.prefix,
            kind=self.adapter.info.kind if self.adapter.info.invocation else "LoRA",
            invocation=self.adapter.info.invocation_target,
        )
        modules = {name: self._modules[name] for name in sorted(self._modules, key=order.__getitem__)}
        return Shifted(
            adapter=Adapter(modules=modules, info=info, tokens=tokens, experts=experts),
            original=self.adapter,
            rows=tuple(sorted(self._rows, key=lambda row: order[row.target])),
            tokens=token_rows,
            unmapped=_unmapped(energies, {row.source for row in self._rows}),
            energy=sum(energies.values()),
            calibration="frobenius" if self._keep_norm else "none",
            scale=self._scale,
            notes=(*_notes(remaining, transport), *notes),
        )

    def parts(self, group: TransportGroup) -> list[_Part]:
        """Return what can be moved in one go of what the adapter holds for a group."""
        modules = self.adapter.modules
        return [
            _Part(rows, modules[group.pairs[rows[0]].source].rank, self._keep_norm)
            for rows in rows_by_rank(group, modules)
        ]

    def take(self, pairs: Sequence[Pair], agreements: Sequence[dict[str, Any]], moved: ShiftedFactors) -> None:
        """Keep the moved factors of some pairs; `moved` has their leading axis."""
        for index, (pair, agreement) in enumerate(zip(pairs, agreements, strict=True)):
            b = moved.b[index] if self._scale == 1 else moved.b[index] * np.float32(self._scale)
            self._modules[pair.target] = LoRAFactors(a=moved.a[index], b=b)
            self._rows.append(_row(pair, agreement, moved, index, self._scale))


def add_to_all(shifters: Sequence[Shifter], group: TransportGroup) -> None:
    """Move what several adapters of one base hold for the pairs of a group, those that agree in one vmapped call."""
    alike: dict[_Part, list[Shifter]] = {}
    for shifter in shifters:
        for part in shifter.parts(group):
            alike.setdefault(part, []).append(shifter)
    for part, some in alike.items():
        pairs = [group.pairs[row] for row in part.rows]
        factors = [_stack([shifter.adapter.modules[pair.source] for pair in pairs]) for shifter in some]
        a, b, scale = (np.stack(leaves, axis=1) for leaves in zip(*factors, strict=True))
        moved = jax.tree.map(np.asarray, _shift_stack(terms_of(group, part.rows), a, b, scale, part.keep_norm))
        rows = np.array(part.rows)
        agreement = {key: np.asarray(x)[rows] for key, x in dataclasses.asdict(group.agreement).items()}
        agreements = [{key: x[index].item() for key, x in agreement.items()} for index in range(len(pairs))]
        for index, shifter in enumerate(some):
            shifter.take(pairs, agreements, jax.tree.map(lambda x, index=index: x[:, index], moved))


@partial(jax.jit, static_argnames=("keep_norm",))
def _shift_stack(terms: Terms, a: jax.Array, b: jax.Array, scale: jax.Array, keep_norm: bool) -> ShiftedFactors:
    """Move L pairs of N adapters: a (L, N, K, I_src), b (L, N, O_src, K), scale (L, N)."""
    b = b * scale[:, :, None, None]

    def one(terms: Terms, a: jax.Array, b: jax.Array) -> ShiftedFactors:
        return jax.vmap(lambda a, b: shift_factors(terms, a, b, keep_norm))(a, b)

    return jax.vmap(one)(terms, a, b)


def _stack(factors: Sequence[LoRAFactors]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a = np.stack([np.asarray(item.a, np.float32) for item in factors])
    b = np.stack([np.asarray(item.b, np.float32) for item in factors])
    return a, b, np.array([item.scale for item in factors], np.float32)


def _check_settings(method: Method, calibrate: str | None, scale: float) -> None:
    if calibrate not in (None, "none", "frobenius"):
        msg = f"calibration {calibrate!r} is unknown; use none or frobenius"
        raise UsageError(msg)
    if not math.isfinite(scale) or scale == 0:
        msg = f"scale {scale:g} is out of range; it must be a finite number other than 0"
        raise UsageError(msg)
    given = "calibration frobenius" if calibrate == "frobenius" else f"scale {scale:g}" if scale != 1 else None
    if given is not None and method.fits_update:
        msg = (
            f"{given} has no part in method {method.name}, which fits the size of the update as well; "
            "leave it out, or use another method"
        )
        raise UsageError(msg)


def _check_not_empty(adapter: Adapter) -> None:
    if not (adapter.modules or adapter.experts):
        left = "; ".join(adapter.info.ignored).rstrip(".") or "it is empty"
        msg = f"adapter {adapter.info.name} has no update of a linear layer, and nothing else of it is moved ({left}): "
        raise AdapterError(msg + "use method distill, or copy or select, in profile peft, for a copy of its own base")


def _check_translated(adapter: Adapter) -> None:
    if adapter.info.invocation is not None and adapter.info.invocation_target is None:
        msg = (
            f"adapter {adapter.info.name} acts only after tokens of its own base; write them in the target's first, by "
            "jcrosslora.maps.shifting.other_changes.with_invocation(adapter, source, target)"
        )
        raise AdapterError(msg)


def _unmapped(energies: dict[str, float], used: set[str]) -> tuple[UnmappedSource, ...]:
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


def _row(pair: Pair, agreement: dict[str, Any], moved: ShiftedFactors, index: int, scale: float) -> ModuleRow:
    before, mapped = float(moved.before[index]), float(moved.mapped[index])
    return ModuleRow(
        target=pair.target,
        source=pair.source,
        role=pair.role,
        energy=before,
        kept=mapped / before if before > 0 else 1.0,
        norm_before=float(np.sqrt(moved.before[index])),
        norm_after=float(np.sqrt(moved.after[index])) * abs(scale),
        **agreement,
    )
