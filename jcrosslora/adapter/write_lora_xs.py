"""Write the format of LoRA-XS: dW = B R A, of which only R (K, K) is trained.

B and A are frozen: B = U and A = S V' of the top K singular triplets of the base's weight, as the repository's SVD of
the transposed weight gives them. R = U' dW V S^-1 makes U R S V' = U U' dW V V', the part of the update in their
span and so its best fit in the Frobenius norm. The file is PEFT's with one rank, alpha equal to that rank, and R as
`q_proj_lora_latent_mapping.weight`.

Source: https://github.com/MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py and svd_utils.py there (peft 0.10).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jcrosslora.adapter.contents import Contents, file_matrix
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.write_peft import peft_config, peft_names, write_peft_files
from jcrosslora.errors import OutputError

LORA_XS = "lora-xs"
# Keys that the peft of that repository refuses.
_TOO_NEW = ("exclude_modules", "lora_bias")


def write_lora_xs(contents: Contents, folder: Path) -> None:
    """Write one rank for all modules, that of the frozen factors.

    Raises:
        OutputError: see `_check_frozen`; values that do not fit the dtype.
    """
    frozen = _check_frozen(contents.modules, contents.frozen)
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        parts = {
            f"{name}.lora_A": np.asarray(frozen[name].a),
            f"{name}.lora_B": np.asarray(frozen[name].b),
            f"{name}_lora_latent_mapping": latent(factors, frozen[name]),
        }
        for key, matrix in parts.items():
            cast = file_matrix(name, matrix.astype(np.float64), contents.dtype)
            tensors[f"{key}.weight"] = np.ascontiguousarray(cast)
    # The peft of that repository takes no module for experts.
    contents = dataclasses.replace(contents, by_weight=frozenset())
    config = peft_config(contents, {name: frozen[name].rank for name in contents.modules})
    config = {key: value for key, value in config.items() if key not in _TOO_NEW}
    write_peft_files(folder, peft_names(contents, tensors), config, contents.metadata)


def latent(factors: LoRAFactors, frozen: LoRAFactors) -> np.ndarray:
    """Compute R (K, K) in float64, the best fit of an update between the frozen factors.

    Args:
        factors: of the update.
        frozen: b (O, K) with orthonormal columns and a (K, I) with orthogonal rows; a zero row gets a zero column of R.
    """
    left, right = inside(factors, frozen)
    _, s = directions(frozen)
    return factors.scale * np.divide(left @ right, s, out=np.zeros((frozen.rank, frozen.rank)), where=s > 0)


def inside(factors: LoRAFactors, frozen: LoRAFactors) -> tuple[np.ndarray, np.ndarray]:
    """Compute U' B (K, r) and A V (r, K) in float64 for the factors of an update of rank r."""
    a, b, u = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b, frozen.b))
    v, _ = directions(frozen)
    return u.T @ b, a @ v.T


def directions(frozen: LoRAFactors) -> tuple[np.ndarray, np.ndarray]:
    """Return V' (K, I) and S (K,) in float64; a row of V' is zero if its S is."""
    a = np.asarray(frozen.a).astype(np.float64)
    s = np.linalg.norm(a, axis=1)
    return np.divide(a, s[:, None], out=np.zeros_like(a), where=s[:, None] > 0), s


def _check_frozen(
    modules: Mapping[str, LoRAFactors], frozen: Mapping[str, LoRAFactors] | None
) -> Mapping[str, LoRAFactors]:
    """Return the frozen factors after a check that every module has them, at one rank.

    Raises:
        OutputError: they are missing or do not fit the modules.
    """
    if frozen is None:
        msg = "profile lora-xs needs the frozen factors of the base: give them (frozen=..., from "
        raise OutputError(msg + "jcrosslora.adapter.profile_ranks.frozen_factors)")
    for name, factors in modules.items():
        if name not in frozen or frozen[name].shape != factors.shape:
            msg = f"module {name!r} has no frozen factors of its shape {factors.shape}: take them from the base that "
            raise OutputError(msg + "the adapter is for")
    if len(ranks := {frozen[name].rank for name in modules}) > 1:
        msg = f"the frozen factors have ranks {sorted(ranks)}, one rank was wanted: make them in one call"
        raise OutputError(msg)
    return frozen
