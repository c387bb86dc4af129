"""Kinds that train numbers between two factors: AdaLoRA, BeamLoRA, LoRA-XS and LoRA-X.

AdaLoRA: dW = alpha / (n + 1e-5) B diag(E) A, with n the initial rank of training.

Source: AdaLoRA (arXiv 2303.10512), equation 3; peft 0.21, tuners/adalora/layer.py.

BeamLoRA: dW = s B diag(r softmax(g / tau)) A, with a gate g over the ranks.

The format is that of https://github.com/gccnlp/BeamLoRA: PEFT's with a `lora_gate` (1, r) for each module. The
temperature tau is set in its code and not in the file: 0.05, or 0.03 for learning rates below 1e-4 (its README).

Source: BeamLoRA (arXiv 2502.13604).

LoRA-XS: dW = s B R A, where B and A are frozen (from an SVD of the base) and only R (r, r) is trained.

The format is that of https://github.com/MohammadrezaBanaei/LoRA-XS, PEFT's with one more tensor for each module,
`default_lora_latent_mapping.weight`; peft writes it as `q_proj_lora_latent_mapping.weight`. A and B are in the file; a
file without them is refused, because the signs of the singular vectors that R was trained with are not known.

Source: arXiv 2405.17604; utils/latent_utils.py and utils/merge_adapter_to_base_model.py there.

LoRA-X: only a change of the singular values of a frozen weight W = U S V' is trained.

    dW = U diag(d) V'   or   dW = U D V', with D (R, R)

It has no public file format, so the trained numbers are given as arrays. A vector d is complete with the base's
weights, because the signs of u_i and v_i cancel. A matrix D also needs the U and V that it was trained with.

Source: LoRA-X (arXiv 2501.16559).
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import config as keys
from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import Config, check_lora, check_targets, check_value, is_alpha, is_rank, is_variant
from jcrosslora.adapter.kinds.kind import AdapterFile, Kind, Update, each_module
from jcrosslora.adapter.kinds.plain import read_factors, read_pair
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError
from jcrosslora.linalg import decompose

_INITIAL_RANK, _ALPHA = 12, 8  # peft's defaults of init_r and lora_alpha
_TEMPERATURE = 0.05


def _check_adalora(config: Config, where: str) -> None:
    if "init_r" in config:
        check_value(config, where, "init_r", is_rank, "a whole number of 1 or more")
    if config.get("lora_alpha", _ALPHA) != 0:  # zero or less means the rank here
        check_value({"lora_alpha": _ALPHA, **config}, where, "lora_alpha", is_alpha, "a number")
    check_targets(config, where)


def _read_adalora(file: AdapterFile, module: str) -> Update | None:
    stored = file.modules[module]
    if "A" in stored and 0 in file.weights.entries[stored["A"]].shape:
        return None  # all its ranks were pruned
    (a, b), gains = read_pair(file, module), file.part(module, "lora_E").astype(np.float64)
    if not a.shape[0] == b.shape[1] == gains.size:
        msg = f"{file.path}: module {module!r} has A of shape {list(a.shape)}, B of shape {list(b.shape)} and E of "
        raise AdapterError(msg + f"shape {list(gains.shape)}: one rank was wanted; the file is damaged")
    alpha = file.config.get("lora_alpha", _ALPHA)
    scale = (alpha if alpha > 0 else a.shape[0]) / (file.config.get("init_r", _INITIAL_RANK) + 1e-5)
    scaled = gains.reshape(-1, 1) * a.astype(np.float64)
    return Update(LoRAFactors(a=scaled.astype(np.float32), b=b, scale=scale))


def _read_beam(file: AdapterFile, module: str) -> Update:
    factors = read_factors(file, module)
    gate = file.part(module, "lora_gate").astype(np.float64)
    if gate.size != factors.rank:
        msg = f"{file.path}: module {module!r} has a gate of shape {list(gate.shape)} for rank {factors.rank}"
        raise AdapterError(msg + ": the file is damaged")
    gains = np.exp((gate - gate.max()) / _TEMPERATURE).ravel()
    gains *= factors.rank / gains.sum()
    # The most important ranks first.
    order = np.argsort(-gains, kind="stable")
    a = (gains[:, None] * np.asarray(factors.a).astype(np.float64))[order]
    return Update(LoRAFactors(a=a.astype(np.float32), b=np.asarray(factors.b)[:, order], scale=factors.scale))


def _read_lora_xs(file: AdapterFile, module: str) -> Update:
    if "A" not in file.modules[module]:
        msg = f"{file.path}: module {module!r} of a LoRA-XS adapter has R without its A and B: the signs of the base's "
        msg += "singular vectors that it was trained with are not known; save it with lora_A and lora_B"
        raise AdapterError(msg)
    factors, latent = read_factors(file, module), file.part(module, "latent")
    if latent.shape != (factors.rank, factors.rank):
        msg = f"{file.path}: module {module!r} has R of shape {list(latent.shape)} for rank {factors.rank}"
        raise AdapterError(msg + ": the file is damaged")
    a = latent.astype(np.float64) @ np.asarray(factors.a).astype(np.float64)
    return Update(LoRAFactors(a=a.astype(np.float32), b=factors.b, scale=factors.scale))


ADALORA = Kind(
    name="AdaLoRA", peft_type="ADALORA", formula="s B diag(E) A", read=each_module(_read_adalora), check=_check_adalora
)
BEAM = Kind(
    name="BeamLoRA",
    peft_type="LORA",
    formula="s B diag(r softmax(g / tau)) A",
    read=each_module(_read_beam),
    check=check_lora,
    applies=lambda config, parts: is_variant(config, keys.BEAM) or "lora_gate" in parts,
    remark=f"its temperature is not in the file, its repository's default of {_TEMPERATURE} was taken",
)
LORA_XS = Kind(
    name="LoRA-XS",
    peft_type="LORA",
    formula="s B R A",
    read=each_module(_read_lora_xs),
    check=check_lora,
    applies=lambda _, parts: "latent" in parts,
)


Vectors = tuple[np.ndarray, np.ndarray]

# Error of the worst singular vector, in radians: vectors of closer singular values mix between any two SVDs.
_TOLERANCE = 1e-2


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
        CheckpointError: the base has no such module.
    """
    modules = {}
    for name, change in changes.items():
        weight = base.stored_weight(name)
        _check_change(name, change, min(weight.shape))
        if vectors is not None and name in vectors:
            u, v = vectors[name]
        elif change.ndim == 1:
            u, v = _leading(name, np.array(weight, np.float32), len(change))
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


def _leading(name: str, weight: np.ndarray, rank: int) -> Vectors:
    svd, _ = decompose(jnp.asarray(weight)[None], rank, tolerance=_TOLERANCE)
    if not float(svd.error[0]) <= _TOLERANCE:
        msg = f"module {name!r}: singular values among the first {rank} lie too close together for their vectors to be "
        raise AdapterError(msg + "determined from the weights; give U and V (vectors=...)")
    return np.asarray(svd.u[0]), np.asarray(svd.v[0])
