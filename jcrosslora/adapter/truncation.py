"""Truncate the updates of an adapter to a lower rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors, update_norm
from jcrosslora.adapter.combining import Layout, fuse, split_fused
from jcrosslora.adapter.records import Adapter
from jcrosslora.errors import UsageError
from jcrosslora.linalg import dot

RankRule = int | float | Literal["auto"]

AUTO: Literal["auto"] = "auto"
AUTO_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # usual sizes; engines that reserve room for adapters round up to them
AUTO_SHARE = 0.99  # of each module's energy


@dataclass(frozen=True)
class Truncation:
    """The ranks of an adapter's updates after truncation, and the energy that they kept.

    Attributes:
        kept: share of the energy, the sum of ||dW||_F^2 over all modules, that is kept.
        least: the module that kept the smallest share of its energy.
        shares: the share that each module kept.
    """

    rule: RankRule
    ranks: Mapping[str, int]
    kept: float
    least: str
    least_kept: float
    shares: Mapping[str, float]

    @property
    def sentence(self) -> str:
        """The figures in words, without a full stop."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return f"{ranks}, which keeps {self.kept:.2%} of the energy (least in {self.least}: {self.least_kept:.2%})"


def check_rule(rule: RankRule) -> None:
    """Raise UsageError unless the rule is a whole number from 1 on, a share above 0 and up to 1, or "auto"."""
    number = not isinstance(rule, bool) and isinstance(rule, int | float)
    if rule != AUTO and not (number and (rule >= 1 if isinstance(rule, int) else 0 < rule <= 1)):
        msg = f"out rank {rule!r} is out of range; it must be at least 1 (a rank), a share of the energy such as 0.99, "
        raise UsageError(msg + f"or {AUTO}")


def truncate_to_rounding(adapter: Adapter) -> Adapter:
    """Truncate every update to the short side of its module, which loses nothing."""
    longest = max((side for item in adapter.modules.values() for side in item.shape), default=0)
    return truncate_by_rule(adapter, longest)[0] if longest else adapter


def truncate_by_rule(adapter: Adapter, rule: RankRule) -> tuple[Adapter, Truncation]:
    """Truncate every update to its best approximation of a lower rank in the Frobenius norm (Eckart-Young).

    The product of the factors is never formed: QR of both and the SVD of a small core give its singular values.

    Args:
        adapter: at least one module; not changed.
        rule: a rank for all modules; or a share such as 0.99: for each module the lowest rank that keeps that much of
            its energy; or "auto": for all modules the lowest rank of `AUTO_RANKS` that keeps `AUTO_SHARE` of each one's
            energy, or the exact rank that does if it is above the largest of them.

    Returns:
        The adapter, where modules of a low enough rank keep their factors; and what was kept.
    """
    check_rule(rule)
    found = {name: _ordered(factors) for name, factors in adapter.modules.items()}
    spectra = {name: np.sum(np.square(np.asarray(b, np.float64)), axis=0) ** 2 for name, (b, _) in found.items()}
    ranks = _ranks(spectra, rule)
    modules = dict(adapter.modules)
    for name, (b, a) in found.items():
        if (rank := ranks[name]) < modules[name].rank:
            modules[name] = LoRAFactors(a=np.asarray(a[:rank]), b=np.asarray(b[:, :rank]))
    before = {name: float(np.sum(spectrum)) for name, spectrum in spectra.items()}
    after = {name: float(np.sum(spectrum[: ranks[name]])) for name, spectrum in spectra.items()}
    shares = {name: after[name] / before[name] if before[name] > 0 else 1.0 for name in before}
    least, total = min(shares, key=lambda name: shares[name]), math.fsum(before.values())
    kept = math.fsum(after.values()) / total if total > 0 else 1.0
    ranks = {name: factors.rank for name, factors in modules.items()}
    return replace(adapter, modules=modules), Truncation(rule, ranks, kept, least, shares[least], shares)


def truncate_fused(
    adapter: Adapter, fused: Layout, rule: RankRule | None, norms: Mapping[str, float] | None = None
) -> tuple[Adapter, Truncation | None]:
    """Truncate modules as the base stores them (fused ones whole), see `truncate_by_rule`; None keeps the ranks.

    Parts of a fused matrix are written as one update: truncated separately, their ranks would add up. `norms` are the
    ||dW||_F that modules are rescaled to afterwards; None does not rescale.
    """
    if rule is None or not adapter.modules:
        return adapter, None
    whole, account = truncate_by_rule(Adapter(fuse(adapter.modules, fused), adapter.info), rule)
    parts = split_fused(whole, fused).modules
    modules = {name: parts[name] for name in adapter.modules}
    if norms is not None:
        modules = {name: _rescaled(item, norms.get(name)) for name, item in modules.items()}
    return replace(adapter, modules=modules), account


def _rescaled(factors: LoRAFactors, norm: float | None) -> LoRAFactors:
    """Rescale an update to a norm; None, or an update of zero, changes nothing."""
    came = update_norm(factors)
    factor = norm / came if came > 0 and norm is not None else 1.0
    return LoRAFactors(a=factors.a, b=np.asarray(factors.b) * np.float32(factor))


def _ordered(factors: LoRAFactors) -> tuple[jax.Array, jax.Array]:
    """Factor an update, with its scale, as b (O, K) and a (K, I) by descending singular values; K <= min(O, I).

    The norms of the i-th column of b and of the i-th row of a are the square root of the i-th singular value.
    """
    b, a = (jnp.asarray(matrix, jnp.float32) for matrix in (factors.b, factors.a))
    return _by_singular_values(b * jnp.float32(factors.scale), a)


@jax.jit
def _by_singular_values(b: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Refactor b (O, K) @ a (K, I): QR of both, then the SVD of the small core R_b R_a'."""
    rank = min(*b.shape, a.shape[1])
    q_b, r_b = jnp.linalg.qr(b)
    q_a, r_a = jnp.linalg.qr(a.T)
    u, s, vt = jnp.linalg.svd(dot(r_b, r_a.T), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return dot(q_b, u[:, :rank] * root), dot(root[:, None] * vt[:rank], q_a.T)


def _ranks(spectra: Mapping[str, np.ndarray], rule: RankRule) -> dict[str, int]:
    """Choose the rank of each module by its squared singular values (K,)."""
    if isinstance(rule, int):
        return {name: min(rule, len(spectrum)) for name, spectrum in spectra.items()}
    if isinstance(rule, float):
        return {name: _lowest(spectrum, rule) for name, spectrum in spectra.items()}
    most = max(_lowest(spectrum, AUTO_SHARE) for spectrum in spectra.values())
    rank = next((rank for rank in AUTO_RANKS if rank >= most), most)
    return {name: min(rank, len(spectrum)) for name, spectrum in spectra.items()}


def _lowest(spectrum: np.ndarray, share: float) -> int:
    """Find the lowest rank that keeps a share of the energy, at least 1."""
    kept = np.cumsum(spectrum)
    # A zero update keeps everything at any rank. The last sum is reached despite the rounding of the product.
    return 1 if kept[-1] == 0 else int(np.argmax(kept >= min(share * kept[-1], kept[-1]))) + 1
