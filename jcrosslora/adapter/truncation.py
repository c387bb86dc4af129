"""The updates of an adapter at a lower rank."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.adapter.engine_rules import VLLM_RANKS
from jcrosslora.errors import UsageError
from jcrosslora.linalg import recompress

A = TypeVar("A", bound=Adapter)
RankRule = int | float | Literal["auto"]

AUTO: Literal["auto"] = "auto"
AUTO_RANKS = VLLM_RANKS[1:]  # vLLM makes room for these, and rounds others up. 1, the first, is no usual rank.
AUTO_SHARE = 0.99  # of each module's energy


@dataclass(frozen=True)
class Truncation:
    """What was left of an adapter's updates when their ranks were cut.

    Attributes:
        rule: what was asked for.
        ranks: the rank of each module's update afterwards.
        kept: share of the energy, the sum of ||dW||_F^2 over all modules, that is left.
        least: the module that kept the smallest share of its own.
        least_kept: that share.
        shares: that of each module.
    """

    rule: RankRule
    ranks: Mapping[str, int]
    kept: float
    least: str
    least_kept: float
    shares: Mapping[str, float]

    @classmethod
    def of(
        cls, rule: RankRule, ranks: Mapping[str, int], whole: Mapping[str, float], left: Mapping[str, float]
    ) -> Self:
        """The account by the energies of the modules, before and after.

        Args:
            rule: what was asked for.
            ranks: afterwards; at least one module.
            whole: ||dW||_F^2 of each module before.
            left: the same afterwards.
        """
        shares = {name: left[name] / whole[name] if whole[name] > 0 else 1.0 for name in whole}
        least = min(shares, key=lambda name: shares[name])
        total = math.fsum(whole.values())
        kept = math.fsum(left.values()) / total if total > 0 else 1.0
        return cls(rule, dict(ranks), kept, least, shares[least], shares)

    @property
    def sentence(self) -> str:
        """The figures in words, without a full stop."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        return f"{f'rank {low}' if low == high else f'ranks {low} to {high}'}, which {self._left}"

    @property
    def _left(self) -> str:
        return f"keeps {self.kept:.2%} of the energy (least in {self.least}: {self.least_kept:.2%})"


def check_rule(rule: RankRule) -> None:
    """Refuse a rule by which no rank can be chosen.

    Raises:
        UsageError: no whole number of 1 or more, no share above 0 and up to 1, and not "auto".
    """
    if isinstance(rule, bool) or not isinstance(rule, int | float | str):
        valid = False
    elif isinstance(rule, str):
        valid = rule == AUTO
    else:
        valid = rule >= 1 if isinstance(rule, int) else 0 < rule <= 1
    if not valid:
        msg = (
            f"out rank {rule!r} is out of range; it must be at least 1 (a rank), a share of the energy such as 0.99, "
            f"or {AUTO}"
        )
        raise UsageError(msg)


def truncate_to_rounding(adapter: A, rule: RankRule | None = None) -> A:
    """The adapter with every update cut to a lower rank, see `truncate_by_rule`.

    None cuts to the short side of each module, at which nothing is lost. One without modules stays as it is.
    """
    if not adapter.modules:
        return adapter
    longest = max(side for item in adapter.modules.values() for side in item.shape)
    return truncate_by_rule(adapter, longest if rule is None else rule)[0]


def truncate_by_rule(adapter: A, rule: RankRule) -> tuple[A, Truncation]:
    """Cut every update to the best one of a lower rank in the Frobenius norm (Eckart-Young); none is made larger.

    The product of the factors is never formed: QR of both and the SVD of a small core give its singular values.

    Args:
        adapter: at least one module; not changed.
        rule: a rank for all modules; or a share such as 0.99, for each module the lowest rank that keeps that much of
            its energy; or "auto", for all modules the lowest rank of `AUTO_RANKS` that keeps `AUTO_SHARE` of each one's
            energy; above the largest of them, just the rank that does.

    Returns:
        The adapter, where nothing was cut with the factors that it had; and what is left.

    Raises:
        UsageError: see `check_rule`.
    """
    check_rule(rule)
    found = {name: _ordered(factors) for name, factors in adapter.modules.items()}
    spectra = {name: np.sum(np.square(np.asarray(b, np.float64)), axis=0) ** 2 for name, (b, _) in found.items()}
    ranks = _ranks(spectra, rule)
    modules = {
        name: factors if ranks[name] >= factors.rank else _leading(*found[name], ranks[name])
        for name, factors in adapter.modules.items()
    }
    whole = {name: float(np.sum(spectrum)) for name, spectrum in spectra.items()}
    left = {name: float(np.sum(spectrum[: ranks[name]])) for name, spectrum in spectra.items()}
    cut = Truncation.of(rule, {name: factors.rank for name, factors in modules.items()}, whole, left)
    return dataclasses.replace(adapter, modules=modules), cut


def _ordered(factors: LoRAFactors) -> tuple[jax.Array, jax.Array]:
    """The same update as b (O, K) and a (K, I) by falling singular values, the scale in b; K is at most min(O, I).

    The i-th column of b and row of a have a norm of the root of the i-th singular value each.
    """
    b, a = (jnp.asarray(matrix, jnp.float32) for matrix in (factors.b, factors.a))
    return _by_singular_values(b * jnp.float32(factors.scale), a)


@jax.jit
def _by_singular_values(b: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    ordered_b, ordered_a, _ = recompress(b, a, min(*b.shape, a.shape[1]))
    return ordered_b, ordered_a


def _leading(b: jax.Array, a: jax.Array, rank: int) -> LoRAFactors:
    return LoRAFactors(a=np.asarray(a[:rank]), b=np.asarray(b[:, :rank]))


def _ranks(spectra: Mapping[str, np.ndarray], rule: RankRule) -> dict[str, int]:
    """The rank for each module by its squared singular values (K,)."""
    if isinstance(rule, int):
        return {name: min(rule, len(spectrum)) for name, spectrum in spectra.items()}
    if isinstance(rule, float):
        return {name: _lowest(spectrum, rule) for name, spectrum in spectra.items()}
    most = max(_lowest(spectrum, AUTO_SHARE) for spectrum in spectra.values())
    rank = next((rank for rank in AUTO_RANKS if rank >= most), most)
    return {name: min(rank, len(spectrum)) for name, spectrum in spectra.items()}


def _lowest(spectrum: np.ndarray, share: float) -> int:
    """The lowest rank that keeps a share of the energy, at least 1."""
    left = np.cumsum(spectrum)
    # Of zeros any rank keeps all. The last sum is reached whatever the rounding of the product.
    return 1 if left[-1] == 0 else int(np.argmax(left >= min(share * left[-1], left[-1]))) + 1
