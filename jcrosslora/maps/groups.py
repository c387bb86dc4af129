"""The maps of pairs of modules of equal shapes, and measures of how well these modules agree."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.struct
import jax
import numpy as np

from jcrosslora.linalg import LinearMap, array_module, cosine, dot, to_device
from jcrosslora.maps.evidence import Evidence, Maps, Terms, Vocabulary
from jcrosslora.maps.moved import Agreement
from jcrosslora.relation.pairing import Pair

MAP_FIELDS = tuple(field.name for field in dataclasses.fields(LinearMap))
AGREEMENT_FIELDS = Agreement.__struct_fields__
_SIDES = ("out", "in")


@flax.struct.dataclass
class TransportGroup:
    """The maps of L pairs of modules of the same shapes.

    Attributes:
        terms: pairs (P_out, P_in) of linear maps, with a leading axis L on every array, as in `agreement`.
        agreement: arrays of the figures in `Agreement`, by name.
        kernels: static, the kernel that decomposed each matrix, all of the source first; see
            `jcrosslora.linalg.decompose`.
    """

    terms: Terms
    agreement: dict[str, jax.Array]
    pairs: tuple[Pair, ...] = flax.struct.field(pytree_node=False)
    kernels: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def arrays(self) -> dict[str, jax.Array]:
        """Return all arrays by name, each with the leading axis."""
        arrays = {
            f"term{term}_{side}_{field}": getattr(linear, field)
            for term, maps in enumerate(self.terms)
            for side, linear in zip(_SIDES, maps, strict=True)
            for field in MAP_FIELDS
        }
        return arrays | {field: self.agreement[field] for field in AGREEMENT_FIELDS}

    def facts(self) -> dict[str, Any]:
        """Return the other fields as JSON values, without the pairs."""
        return {"terms": len(self.terms), "kernels": list(self.kernels)}

    @classmethod
    def of(cls, pairs: tuple[Pair, ...], arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Self:
        """Rebuild a group on the local devices; on a CPU the arrays stay numpy arrays."""
        on_cpu = jax.default_backend() == "cpu"
        placed: dict[str, Any] = {name: array if on_cpu else to_device(array) for name, array in arrays.items()}
        terms = tuple(
            tuple(LinearMap(*(placed[f"term{term}_{side}_{field}"] for field in MAP_FIELDS)) for side in _SIDES)
            for term in range(facts["terms"])
        )
        agreement = {field: placed[field] for field in AGREEMENT_FIELDS}
        return cls(terms, agreement, pairs, tuple(facts["kernels"]))  # type: ignore[arg-type]


def measure(evidence: Evidence, maps: Maps, *, by_coordinates: bool) -> dict[str, Any]:
    """Return the figures of `Agreement` for a pair, with NaN for None.

    With `by_coordinates` the weight cosine compares the mapped W_src, not W_src, with W_tgt.
    """
    nan = np.float32(np.nan)
    sides = {"src": evidence.src.svd, "tgt": evidence.tgt.svd}
    figures = {
        f"{figure}_{side}": nan if svd is None else getattr(svd, figure)
        for side, svd in sides.items()
        for figure in ("energy", "gap", "condition", "error")
    }
    unknown = None in sides.values()
    return figures | {
        "rank": np.int32(evidence.rank),
        "similarity_out": nan if unknown else _similarity(evidence, stream=not evidence.reads),
        "similarity_in": nan if unknown else _similarity(evidence, stream=evidence.reads),
        "vector_ratio": maps.vector_ratio,
        "activation_cosine": maps.activation_cosine,
        "weight_cosine": _weight_cosine(evidence, maps, by_coordinates),
        "part_cosine": maps.part_cosine,
    }


def _similarity(evidence: Evidence, *, stream: bool) -> Any:
    src, tgt = evidence.singular_vectors_src, evidence.singular_vectors_tgt
    inner = stream == evidence.reads
    x, y = (src.v, tgt.v) if inner else (src.u, tgt.u)
    xp = array_module(x)
    size = x.shape[0]
    if size == y.shape[0]:
        ranks = (src.numerical_rank * tgt.numerical_rank).astype(x.dtype)
        informative = (xp.maximum(src.numerical_rank, tgt.numerical_rank) < size) & (ranks > 0)
        return xp.where(informative, xp.sum(dot(x.T, y) ** 2) * size / xp.maximum(ranks, 1), xp.nan)
    if stream and evidence.vocabulary is not None:
        return _similarity_by_tokens(evidence, evidence.vocabulary)
    return np.float32(np.nan)


def _similarity_by_tokens(evidence: Evidence, vocabulary: Vocabulary) -> jax.Array:
    """Compute the similarity through the shared tokens, for residual streams of different widths.

    Let E be the centred embeddings with the gain folded in. The share of covariance that two sets of directions have
    in common is ||(E_s X)'(E_t Y)||_F^2 / (||E_s X||_F^2 ||E_t Y||_F^2). The result is this share over the same share
    for the two whole streams. For equal spaces of width m with E'E a multiple of I it is ||X'Y||_F^2 m / R^2, the
    similarity by coordinates.
    """
    cross, src, tgt = evidence.token_covariances
    xp, gain_src, gain_tgt = array_module(cross), evidence.src.gain, evidence.tgt.gain
    part = xp.sum(cross**2) / (xp.sum(src) * xp.sum(tgt))
    whole = xp.sum((gain_src[:, None] * vocabulary.cross * gain_tgt) ** 2) / (
        xp.sum(xp.diagonal(vocabulary.gram_src) * gain_src**2) * xp.sum(xp.diagonal(vocabulary.gram_tgt) * gain_tgt**2)
    )
    return part / whole


def _weight_cosine(evidence: Evidence, maps: Maps, by_coordinates: bool) -> Any:
    w_src, w_tgt = evidence.src.weight, evidence.tgt.weight
    if by_coordinates:
        first, *others = (p_in(p_out(w_src).T).T for p_out, p_in in maps.terms)
        w_src = sum(others, first)
    return cosine(w_src, w_tgt) if w_src.shape == w_tgt.shape else np.float32(np.nan)
