"""The control: random orthonormal bases instead of singular vectors, with the norm of the update kept."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcrosslora.linalg import LinearMap, low_rank
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind, Maps
from jcrosslora.maps.method import DEFAULT_SVD_RANK, MapMethod


@dataclass(frozen=True)
class Random(MapMethod):
    """Uniformly random orthonormal bases instead of singular vectors."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "control: random orthonormal bases, norm of the update kept"
    reference: ClassVar[str] = "control"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.RANDOM_KEY})
    is_control: ClassVar[bool] = True
    keeps_norm: ClassVar[bool] = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = Q_t Q_s' and P_in = R_t R_s', uniformly random with inner width R."""
        (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
        out_key, in_key = jax.random.split(evidence.random_key)
        return Maps(((_random(out_key, o_src, o_tgt, evidence.rank), _random(in_key, i_src, i_tgt, evidence.rank)),))


def _random(key: jax.Array, size_src: int, size_tgt: int, rank: int) -> LinearMap:
    src, tgt = jax.random.split(key)
    return low_rank(_orthonormal(tgt, size_tgt, rank), _orthonormal(src, size_src, rank))


def _orthonormal(key: jax.Array, size: int, rank: int) -> jax.Array:
    """Draw (size, rank) with orthonormal columns uniformly: QR of a normal matrix, signs of R's diagonal undone."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, rank)))
    return q * jnp.where(jnp.diagonal(r) >= 0, 1.0, -1.0)
