"""Truncation of a moved update to a lower rank, or to what profile lora-xs can hold.

The latter is the part in the span of the base's top singular vectors. For each module, U (O, K), S and V (I, K) are
the top K singular triplets of the base's weight. The projection of an update dW is U U' dW V V', of energy ||U' dW
V||_F^2.

Source: LoRA-XS (arXiv 2405.17604), section 3.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors, fuse, split_fused, update_norm
from jcrosslora.adapter.fused import Layout
from jcrosslora.adapter.truncation import RankRule, Truncation, truncate_by_rule
from jcrosslora.adapter.write_lora_xs import LORA_XS, directions, inside
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import CheckpointError, UsageError
from jcrosslora.linalg import decompose

Modules = Mapping[str, LoRAFactors]


def truncate_update(
    adapter: Adapter, fused: Layout, rule: RankRule, norms: Mapping[str, float] | None = None
) -> tuple[Adapter, Truncation]:
    """Cut every update of an adapter, optimally, by a rule (see `truncate_by_rule`).

    Args:
        adapter: of the target, with fused matrices split.
        fused: the target's fused matrices.
        rule: the rank, or what chooses it.
        norms: ||dW||_F that the modules shall have afterwards; None leaves what the truncation makes of them.
    """
    adapter, account = reduce_fused(adapter, fused, lambda whole: truncate_by_rule(whole, rule))
    if norms is None:
        return adapter, account
    modules = {name: _rescaled(item, norms.get(name)) for name, item in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules), account


def reduce_fused(
    adapter: Adapter, fused: Layout, reduce: Callable[[Adapter], tuple[Adapter, Truncation]]
) -> tuple[Adapter, Truncation]:
    """Apply `reduce` to an adapter of the modules that the base stores.

    Parts of a fused matrix are written as one update of it: reduced on their own, they would have a rank for each.
    """
    whole, account = reduce(Adapter(fuse(adapter.modules, fused), adapter.info))
    parts = split_fused(whole, fused).modules
    return dataclasses.replace(adapter, modules={name: parts[name] for name in adapter.modules}), account


def _rescaled(factors: LoRAFactors, norm: float | None) -> LoRAFactors:
    """Give an update a norm; one that the maps did not make has none to keep."""
    own = update_norm(factors)
    factor = norm / own if own > 0 and norm is not None else 1.0
    return LoRAFactors(a=factors.a, b=np.asarray(factors.b) * np.float32(factor))


A = TypeVar("A", bound=Adapter)
Frozen = Mapping[str, LoRAFactors]
# (module, K) -> frozen factors.
Known = dict[tuple[str, int], LoRAFactors]

# Error of the subspace in radians. R only needs the written vectors to be orthonormal, which holds at any angle.
_TOLERANCE = 1e-4
READERS = "profile lora-xs is read by LoRA-XS's own code and by jcrosslora; peft leaves out its R, without an error."


class SpanTruncation(Truncation):
    """The account of a projection into the span of K singular vectors; the rule is K."""

    @property
    def sentence(self) -> str:
        """The figures in words, without a full stop."""
        return f"the span of the top {self.rule} singular vectors of each weight, which {self.outcome}"


def span_rank(profile: str, rule: RankRule | None) -> int | None:
    """Return K for a profile that writes updates in the span of K singular vectors, None for the others.

    Args:
        profile: the profile.
        rule: the requested rank.

    Raises:
        UsageError: the profile needs K, and the rule is not a positive integer.
    """
    if profile != LORA_XS:
        return None
    if isinstance(rule, bool) or not isinstance(rule, int) or rule < 1:
        came = "without an out rank" if rule is None else f"with out rank {rule!r}"
        msg = f"profile lora-xs {came}: a whole number of singular vectors of each weight was wanted"
        raise UsageError(msg + "; give it as --out-rank, such as 64 (out_rank=64)")
    return rule


def truncate_for_profile(
    adapter: Adapter,
    base: BaseModel,
    profile: str,
    rule: RankRule | None,
    norms: Mapping[str, float] | None = None,
    known: Known | None = None,
) -> tuple[Adapter, Truncation | None, Frozen | None]:
    """Cut a moved update as its file format and the requested rank want it.

    Args:
        adapter: of the target, with fused matrices split.
        base: the target.
        profile: the file format, see `span_rank`.
        rule: the requested rank; None leaves the ranks of other formats.
        norms: see `truncate_update`.
        known: see `frozen_factors`.

    Returns:
        The update, the account of what was cut, and the frozen factors of LoRA-XS; None where there are none.

    Raises:
        UsageError, CheckpointError: see `span_rank` and `project_update`.
    """
    rank = span_rank(profile, rule)
    if rank is not None:
        return project_update(adapter, base, rank, known)
    if rule is None:
        return adapter, None, None
    return *truncate_update(adapter, base.fused, rule, norms), None


def frozen_factors(
    base: BaseModel, names: Iterable[str], rank: int, known: Known | None = None
) -> dict[str, LoRAFactors]:
    """Compute the frozen factors B = U and A = S V' of LoRA-XS from the weights of a base.

    Args:
        base: the model that the adapter is for.
        names: its modules; a part of a fused matrix stands for the whole matrix.
        rank: K. If the short side of a module is smaller, the remaining columns and rows are zero.
        known: factors of this base from earlier calls; new ones are added.

    Returns:
        For each module that the base stores, b (O, K) and a (K, I), float32.

    Raises:
        CheckpointError: the base has no such module, or a weight holds NaN or infinity.
    """
    whole = {part: name for name, parts in base.fused.items() for part, _, _ in parts}
    known = {} if known is None else known
    stored = list(dict.fromkeys(whole.get(name, name) for name in names))
    for name in stored:
        if (name, rank) not in known:
            known[name, rank] = _frozen(base, name, rank)
    return {name: known[name, rank] for name in stored}


def _frozen(base: BaseModel, name: str, rank: int) -> LoRAFactors:
    weight = np.array(base.stored_weight(name), np.float32)
    base.release()
    if not np.isfinite(weight).all():
        msg = f"{base.ref}: the weight of {name} holds NaN or infinity; the file is damaged, download it again"
        raise CheckpointError(msg)
    top = min(rank, *weight.shape)
    svd, _ = decompose(jnp.asarray(weight)[None], top, vectors=False, tolerance=_TOLERANCE)
    u, s, v = (np.asarray(field[0]) for field in (svd.u, svd.s, svd.v))
    a = np.pad((v * s).T, ((0, rank - top), (0, 0)))
    return LoRAFactors(a=np.ascontiguousarray(a), b=np.pad(u, ((0, 0), (0, rank - top))))


def project(adapter: A, frozen: Frozen, rank: int) -> tuple[A, SpanTruncation]:
    """Project every update into the span of the frozen factors.

    Args:
        adapter: updates of the modules that the base stores, at least one; not changed.
        frozen: from `frozen_factors`.
        rank: K.

    Returns:
        The adapter, float32 with unchanged ranks, and the account.
    """
    modules = {name: _inside(factors, frozen[name]) for name, factors in adapter.modules.items()}
    whole = {name: update_norm(factors) ** 2 for name, factors in adapter.modules.items()}
    # If factors are far larger than their product, rounding could make the projection larger than the update.
    left = {name: min(update_norm(factors) ** 2, whole[name]) for name, factors in modules.items()}
    return dataclasses.replace(adapter, modules=modules), SpanTruncation.of(
        rank, dict.fromkeys(modules, rank), whole, left
    )


def _inside(factors: LoRAFactors, frozen: LoRAFactors) -> LoRAFactors:
    """Return U U' B and A V V'."""
    left, right = inside(factors, frozen)
    v, _ = directions(frozen)
    a, b = right @ v, np.asarray(frozen.b).astype(np.float64) @ left
    return LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32), scale=factors.scale)


def project_update(
    adapter: Adapter, base: BaseModel, rank: int, known: Known | None = None
) -> tuple[Adapter, SpanTruncation, Frozen]:
    """Project a moved update into the span of its target's singular vectors.

    Norms are not restored under any calibration: scaling the parts of a fused matrix separately would leave the span.

    Args:
        adapter: an adapter of the target.
        base: the target.
        rank: K.
        known: see `frozen_factors`.

    Returns:
        The adapter, the account, and the frozen factors that profile lora-xs writes it by.
    """
    frozen = frozen_factors(base, adapter.modules, rank, known)
    adapter, account = reduce_fused(adapter, base.fused, lambda whole: project(whole, frozen, rank))
    assert isinstance(account, SpanTruncation)
    return adapter, account, frozen
