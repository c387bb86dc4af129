"""Adapters between singular vectors of the base's weights: profile lora-xs, and updates of LoRA-X.

LoRA-XS: dW = B R A, where only R (K, K) is trained. B and A are frozen: B = U and A = S V' of the top K singular
triplets of the base's weight, as the repository's SVD of the transposed weight gives them. R = U' dW V S^-1 makes
U R S V' = U U' dW V V', the part of the update in their span and so its best fit in the Frobenius norm; its energy is
||U' dW V||_F^2. The file is PEFT's with one rank, alpha equal to that rank, and R as
`q_proj_lora_latent_mapping.weight`.

Source: LoRA-XS (arXiv 2405.17604), section 3; https://github.com/MohammadrezaBanaei/LoRA-XS,
utils/initialization_utils.py and svd_utils.py there (peft 0.10).

LoRA-X: only a change of the singular values of a frozen weight W = U S V' is trained.

    dW = U diag(d) V'   or   dW = U D V', with D (R, R)

It has no public file format, so the trained numbers are given as arrays. A vector d is complete with the base's
weights, because the signs of u_i and v_i cancel. A matrix D also needs the U and V that it was trained with.

Source: LoRA-X (arXiv 2501.16559).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors, update_norm
from jcrosslora.adapter.contents import Contents, file_matrix
from jcrosslora.adapter.peft import peft_config, peft_names, write_peft_files
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.truncation import RankRule, Truncation, reduce_fused, truncate_fused
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import finite
from jcrosslora.errors import AdapterError, OutputError, UsageError
from jcrosslora.linalg import decompose

LORA_XS = "lora-xs"
READERS = "profile lora-xs is read by LoRA-XS's own code and by jcrosslora; peft leaves out its R, without an error."
# Keys that the peft of that repository refuses.
_TOO_NEW = ("exclude_modules", "lora_bias")
# Error of the subspace in radians. R only needs the written vectors to be orthonormal, which holds at any angle.
_TOLERANCE = 1e-4
# The same of the worst vector for LoRA-X: vectors of closer singular values mix between any two SVDs.
_APART = 1e-2

Vectors = tuple[np.ndarray, np.ndarray]
Frozen = Mapping[str, LoRAFactors]
# (module, K) -> frozen factors.
Known = dict[tuple[str, int], LoRAFactors]


def write_lora_xs(contents: Contents, folder: Path) -> None:
    """Write one rank for all modules, that of the frozen factors."""
    frozen = _check_frozen(contents.modules, contents.frozen)
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        parts = {
            f"{name}.lora_A": np.asarray(frozen[name].a),
            f"{name}.lora_B": np.asarray(frozen[name].b),
            f"{name}_lora_latent_mapping": _latent(factors, frozen[name]),
        }
        for key, matrix in parts.items():
            cast = file_matrix(name, matrix.astype(np.float64), contents.dtype)
            tensors[f"{key}.weight"] = np.ascontiguousarray(cast)
    # The peft of that repository takes no module for experts.
    contents = dataclasses.replace(contents, by_weight=frozenset())
    config = peft_config(contents, {name: frozen[name].rank for name in contents.modules})
    config = {key: value for key, value in config.items() if key not in _TOO_NEW}
    write_peft_files(folder, peft_names(contents, tensors), config, contents.metadata)


def _check_frozen(modules: Mapping[str, LoRAFactors], frozen: Frozen | None) -> Frozen:
    """Return the frozen factors after a check that every module has them, at one rank."""
    if frozen is None:
        msg = "profile lora-xs needs the frozen factors of the base: give them (frozen=..., from "
        raise OutputError(msg + "jcrosslora.adapter.frozen_factors)")
    for name, factors in modules.items():
        if name not in frozen or frozen[name].shape != factors.shape:
            msg = f"module {name!r} has no frozen factors of its shape {factors.shape}: take them from the base that "
            raise OutputError(msg + "the adapter is for")
    if len(ranks := {frozen[name].rank for name in modules}) > 1:
        msg = f"the frozen factors have ranks {sorted(ranks)}, one rank was wanted: make them in one call"
        raise OutputError(msg)
    return frozen


def _latent(factors: LoRAFactors, frozen: LoRAFactors) -> np.ndarray:
    """Compute R (K, K) in float64; a zero row of the frozen a gets a zero column."""
    left, right, _, s = _in_span(factors, frozen)
    return factors.scale * np.divide(left @ right, s, out=np.zeros((frozen.rank, frozen.rank)), where=s > 0)


def _in_span(factors: LoRAFactors, frozen: LoRAFactors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute U' B (K, r), A V (r, K), V' (K, I) and S (K,) in float64; a row of V' is zero if its S is."""
    a, b, u, scaled = (np.asarray(each).astype(np.float64) for each in (factors.a, factors.b, frozen.b, frozen.a))
    s = np.linalg.norm(scaled, axis=1)
    v = np.divide(scaled, s[:, None], out=np.zeros_like(scaled), where=s[:, None] > 0)
    return u.T @ b, a @ v.T, v, s


class SpanTruncation(Truncation):
    """The account of a projection into the span of K singular vectors; the rule is K."""

    @property
    def sentence(self) -> str:
        """The figures in words."""
        return f"the span of the top {self.rule} singular vectors of each weight, which {self.outcome}"


def span_rank(profile: str, rule: RankRule | None) -> int | None:
    """Return K for a profile that writes updates in the span of K singular vectors, None for the others."""
    if profile != LORA_XS:
        return None
    if isinstance(rule, bool) or not isinstance(rule, int) or rule < 1:
        came = "without an out rank" if rule is None else f"with out rank {rule!r}"
        msg = f"profile lora-xs {came}: a whole number of singular vectors of each weight was wanted"
        raise UsageError(msg + "; give it as --out-rank, such as 64 (out_rank=64)")
    return rule


def truncate_for_profile(
    adapter: Adapter,
    base: BaseModel | None,
    profile: str,
    rule: RankRule | None,
    norms: Mapping[str, float] | None = None,
    known: Known | None = None,
) -> tuple[Adapter, Truncation | None, Frozen | None]:
    """Cut an update, with fused matrices split, as its file format and the requested rank want it.

    In profile lora-xs norms are not restored under any calibration: scaling the parts of a fused matrix separately
    would leave the span. See `truncate_fused` for `norms`, and `frozen_factors` for `known`.

    Args:
        base: that the update is for; profile lora-xs needs it.
        rule: the requested rank; None leaves the ranks of other formats.

    Returns:
        The update, the account of what was cut, and the frozen factors of LoRA-XS; None if there are none.
    """
    rank = span_rank(profile, rule)
    if rank is not None:
        assert base is not None  # refused by `check_profile`
        frozen = frozen_factors(base, adapter.modules, rank, known)
        return *reduce_fused(adapter, base.fused, lambda whole: project(whole, frozen, rank)), frozen
    if rule is None:
        return adapter, None, None
    return *truncate_fused(adapter, {} if base is None else base.fused, rule, norms), None


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
    """
    whole = {part: name for name, parts in base.fused.items() for part, _, _ in parts}
    known = {} if known is None else known
    stored = list(dict.fromkeys(whole.get(name, name) for name in names))
    for name in stored:
        if (name, rank) not in known:
            known[name, rank] = _frozen(base, name, rank)
    return {name: known[name, rank] for name in stored}


def _frozen(base: BaseModel, name: str, rank: int) -> LoRAFactors:
    weight = finite(base, name, np.array(base.stored_weight(name), np.float32))
    base.release()
    top = min(rank, *weight.shape)
    svd, _ = decompose(jnp.asarray(weight)[None], top, vectors=False, tolerance=_TOLERANCE)
    u, s, v = (np.asarray(field[0]) for field in (svd.u, svd.s, svd.v))
    a = np.pad((v * s).T, ((0, rank - top), (0, 0)))
    return LoRAFactors(a=np.ascontiguousarray(a), b=np.pad(u, ((0, 0), (0, rank - top))))


def project(adapter: Adapter, frozen: Frozen, rank: int) -> tuple[Adapter, Truncation]:
    """Project every update, at least one, into the span of the factors from `frozen_factors` of rank K.

    Returns:
        The adapter, float32 with unchanged ranks, and the account.
    """
    modules = {name: _projected(factors, frozen[name]) for name, factors in adapter.modules.items()}
    whole = {name: update_norm(factors) ** 2 for name, factors in adapter.modules.items()}
    # If factors are far larger than their product, rounding could make the projection larger than the update.
    left = {name: min(update_norm(factors) ** 2, whole[name]) for name, factors in modules.items()}
    account = SpanTruncation.of(rank, dict.fromkeys(modules, rank), whole, left)
    return dataclasses.replace(adapter, modules=modules), account


def _projected(factors: LoRAFactors, frozen: LoRAFactors) -> LoRAFactors:
    """Return U U' B and A V V'."""
    left, right, v, _ = _in_span(factors, frozen)
    a, b = right @ v, np.asarray(frozen.b).astype(np.float64) @ left
    return LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32), scale=factors.scale)


def lora_x_update(
    base: BaseModel, changes: Mapping[str, np.ndarray], vectors: Mapping[str, Vectors] | None = None
) -> Adapter:
    """Compute the update of a LoRA-X adapter as factors.

    Args:
        base: the model that it was trained on.
        changes: module, as the base names it (a fused module as a whole), to d (R,) of its leading singular values, or
            to D (R, R).
        vectors: module to U (O, R) and V (I, R) that were frozen in training; those of other modules are taken from
            the base's weights.

    Returns:
        The adapter, float32 and scale 1, of rank R.

    Raises:
        AdapterError: a change that is not a finite d or D of a possible rank, vectors of other shapes, D without its
            vectors, or singular values of the base that are too close for their vectors to be determined.
    """
    modules = {}
    for name, change in changes.items():
        weight = base.stored_weight(name)
        _check_change(name, change, min(weight.shape))
        if vectors is not None and name in vectors:
            u, v = vectors[name]
        elif change.ndim == 1:
            u, v = _leading_vectors(name, np.array(weight, np.float32), len(change))
        else:
            msg = f"module {name!r} has a matrix of changes: the signs of the singular vectors that it was trained "
            raise AdapterError(msg + "with are not known from the weights; give U and V (vectors=...)")
        rank = len(change)
        if u.shape != (weight.shape[0], rank) or v.shape != (weight.shape[1], rank):
            msg = f"module {name!r} of {weight.shape[0]} x {weight.shape[1]} has U of shape {list(u.shape)} and V of "
            msg += f"shape {list(v.shape)} for changes of rank {rank}: they must be (O, R) and (I, R)"
            raise AdapterError(msg)
        middle = np.diag(change) if change.ndim == 1 else change
        b = u.astype(np.float64) @ middle.astype(np.float64)
        modules[name] = LoRAFactors(a=np.ascontiguousarray(v.T, np.float32), b=b.astype(np.float32))
    base.release()
    return Adapter(modules, AdapterInfo(name="LoRA-X", base_name=base.name, kind="LoRA-X"))


def _check_change(name: str, change: np.ndarray, most: int) -> None:
    square = change.ndim in (1, 2) and set(change.shape) == {len(change)}
    if not square or not 1 <= len(change) <= most or not np.isfinite(change).all():
        msg = f"module {name!r} has a change of shape {list(change.shape)}: finite numbers (R,) or (R, R) with R "
        raise AdapterError(msg + f"from 1 to {most} were wanted")


def _leading_vectors(name: str, weight: np.ndarray, rank: int) -> Vectors:
    svd, _ = decompose(jnp.asarray(weight)[None], rank, tolerance=_APART)
    if not float(svd.error[0]) <= _APART:
        msg = f"module {name!r}: singular values among the first {rank} lie too close together for their vectors to be "
        raise AdapterError(msg + "determined from the weights; give U and V (vectors=...)")
    return np.asarray(svd.u[0]), np.asarray(svd.v[0])
