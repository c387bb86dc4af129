"""Kinds whose update is computed from the adapter file alone, without the base.

LoRA with any scale and initialisation: dW = s B A on an unchanged base.

aLoRA has the weights of a plain LoRA and is active only from the last occurrence of certain tokens on.
`maps.other_changes` translates the tokens to another tokenizer. Source: arXiv 2504.12397.

AdaLoRA: dW = alpha / (n + 1e-5) B diag(E) A, with n the initial rank of training.
Source: AdaLoRA (arXiv 2303.10512), equation 3; peft 0.21, tuners/adalora/layer.py.

BeamLoRA: dW = s B diag(r softmax(g / tau)) A, with a gate g over the ranks. The format of
https://github.com/gccnlp/BeamLoRA is PEFT's plus a `lora_gate` (1, r) for each module. The temperature tau is set in
its code, not in the file: 0.05, or 0.03 for learning rates below 1e-4 (its README). Source: arXiv 2502.13604.

LoRA-XS: dW = s B R A, where B and A are frozen (from an SVD of the base) and only R (r, r) is trained. The format of
https://github.com/MohammadrezaBanaei/LoRA-XS is PEFT's plus one tensor for each module,
`default_lora_latent_mapping.weight`; peft writes it as `q_proj_lora_latent_mapping.weight`. A file without A and B is
refused, because the signs of the singular vectors that R was trained with are not known.
Source: arXiv 2405.17604; utils/latent_utils.py and utils/merge_adapter_to_base_model.py there.

LoHa: dW = s (W1a W1b) * (W2a W2b), an elementwise product of rank r^2 at most. Row o of the product is the sum over
(i, j) of (W1a[o, i] W2a[o, j]) (W1b[i] * W2b[j]), so the row-wise Khatri-Rao products of the factors are factors of the
update. Source: FedPara (arXiv 2108.06098), proposition 1; peft 0.21, tuners/loha/layer.py.

LoKr: dW = s kron(W1, W2), each stored whole or as a product of two factors. The singular triplets of a Kronecker
product are Kronecker products of its factors' triplets, so the update is decomposed and truncated without being formed.
Source: LyCORIS (arXiv 2309.14859); peft 0.21, tuners/lokr/layer.py.
"""

from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter import config as keys
from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import Config, check_lora, check_numbers, check_targets, check_value, is_variant
from jcrosslora.adapter.kinds.kind import (
    Kind,
    ParsedAdapter,
    Update,
    each_module,
    full_rank_factors,
    product_svd,
    truncate_product,
)
from jcrosslora.adapter.names import TensorName, file_scale, module_alpha, module_rank, pattern_name
from jcrosslora.errors import AdapterError


def read_factors(file: ParsedAdapter, module: str) -> LoRAFactors:
    """Read the stored A (K, I) and B (O, K) of a module, with the rank and scale that the configuration gives it."""
    a, b = _read_pair(file, module)
    if a.shape[0] != b.shape[1]:
        msg = f"{file.path}: module {module!r} has A of shape {list(a.shape)} and B of shape {list(b.shape)}"
        raise AdapterError(msg + ": expected A [r, in] and B [out, r] of one rank; the file is damaged")
    _check_rank_of(file, module, a.shape[0])
    return LoRAFactors(a=a, b=b, scale=file_scale(file.config, module, a.shape[0]))


def _check_rank_of(file: ParsedAdapter, module: str, rank: int) -> None:
    stated = module_rank(file.config, pattern_name(file.config, module))
    if rank != stated:
        msg = f"{file.path}: module {module!r} has rank {rank}, adapter_config.json says {stated}"
        raise AdapterError(msg + ": correct r or rank_pattern, or use the configuration that belongs to the file")


def _read_pair(file: ParsedAdapter, module: str) -> tuple[np.ndarray, np.ndarray]:
    parts = file.modules[module].keys() & {"A", "B"}
    if len(parts) != 2:
        have = min(parts, default="")
        missing = {"A": "lora_A without its lora_B", "B": "lora_B without its lora_A", "": "neither lora_A nor lora_B"}
        msg = f"{file.path}: module {module!r} has {missing[have]}: the file is incomplete; save or download it again"
        raise AdapterError(msg)
    return file.part(module, "A"), file.part(module, "B")


def read_embedding_factors(file: ParsedAdapter, tensors: Sequence[TensorName]) -> LoRAFactors:
    """Read the LoRA of an embedding as an update of its V rows: a (K, D), b (V, K).

    Its tensors are `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K); raises a KeyError if one is missing.
    """
    keys = {tensor.key[-1]: tensor.key for tensor in tensors}
    a, b = (file.read(keys[side]) for side in "AB")
    if a.shape[0] != b.shape[1]:
        raise AdapterError(f"its factors have ranks {a.shape[0]} and {b.shape[1]}")
    scale = file_scale(file.config, tensors[0].module, a.shape[0])
    return LoRAFactors(a=np.ascontiguousarray(b.T), b=np.ascontiguousarray(a.T), scale=scale)


PLAIN = Kind(name="LoRA", formula="s B A", read=each_module(lambda file, module: Update(read_factors(file, module))))


def invocation_of(config: Config) -> tuple[int, ...] | None:
    """Return the invocation tokens of an aLoRA; None if the adapter is always active."""
    tokens = config.get("alora_invocation_tokens")
    return None if tokens is None else tuple(tokens)


def _check_alora(config: Config, where: str) -> None:
    check_lora(config, where)
    tokens = config["alora_invocation_tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        msg = f"{where}: alora_invocation_tokens is {str(tokens)[:60]}, expected a list of token ids: correct the "
        raise AdapterError(msg + "file")


ALORA = Kind(
    name="aLoRA",
    formula="s B A after its invocation tokens",
    read=PLAIN.read,
    check=_check_alora,
    applies=lambda config, _: is_variant(config, keys.ALORA),
)


_INITIAL_RANK, _ALPHA = 12, 8  # peft's defaults of init_r and lora_alpha
_TEMPERATURE = 0.05


def _check_adalora(config: Config, where: str) -> None:
    if "init_r" in config:
        keys.check_rank(config, where, "init_r")
    if config.get("lora_alpha", _ALPHA) != 0:  # zero or less means the rank here
        check_value({"lora_alpha": _ALPHA, **config}, where, "lora_alpha", keys.is_alpha, "a number")
    check_targets(config, where)


def _read_adalora(file: ParsedAdapter, module: str) -> Update | None:
    stored = file.modules[module]
    if "A" in stored and 0 in file.stored.entries[stored["A"]].shape:
        return None  # all its ranks were pruned
    (a, b), gains = _read_pair(file, module), file.part(module, "lora_E").astype(np.float64)
    if not a.shape[0] == b.shape[1] == gains.size:
        msg = f"{file.path}: module {module!r} has A of shape {list(a.shape)}, B of shape {list(b.shape)} and E of "
        raise AdapterError(msg + f"shape {list(gains.shape)}: expected one rank; the file is damaged")
    alpha = file.config.get("lora_alpha", _ALPHA)
    scale = (alpha if alpha > 0 else a.shape[0]) / (file.config.get("init_r", _INITIAL_RANK) + 1e-5)
    scaled = gains.reshape(-1, 1) * a.astype(np.float64)
    return Update(LoRAFactors(a=scaled.astype(np.float32), b=b, scale=scale))


def _read_beam(file: ParsedAdapter, module: str) -> Update:
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


def _read_lora_xs(file: ParsedAdapter, module: str) -> Update:
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
    formula="s B diag(r softmax(g / tau)) A",
    read=each_module(_read_beam),
    applies=lambda config, parts: is_variant(config, keys.BEAM) or "lora_gate" in parts,
    remark=f"its temperature is not in the file, its repository's default of {_TEMPERATURE} was taken",
)
LORA_XS = Kind(
    name="LoRA-XS", formula="s B R A", read=each_module(_read_lora_xs), applies=lambda _, parts: "latent" in parts
)


def _check_lycoris(config: Config, where: str) -> None:
    check_numbers(config, where, alpha="alpha")
    check_targets(config, where)


def _scale(file: ParsedAdapter, module: str) -> float:
    name = pattern_name(file.config, module)
    return module_alpha(file.config, name, default="alpha") / module_rank(file.config, name)


def _refuse_convolution(file: ParsedAdapter, module: str, part: str) -> None:
    if part in file.modules[module]:
        msg = f"{file.path}: module {module!r} is a convolution: only adapters of linear layers are supported"
        raise AdapterError(msg)


def _read_loha(file: ParsedAdapter, module: str) -> Update:
    _refuse_convolution(file, module, "hada_t1")
    b1, a1, b2, a2 = (file.part(module, f"hada_{part}").astype(np.float64) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = a1.shape[0]
    if b1.shape != b2.shape or a1.shape != a2.shape or b1.shape[1] != rank:
        shapes = ", ".join(str(list(matrix.shape)) for matrix in (b1, a1, b2, a2))
        msg = f"{file.path}: module {module!r} has factors of shapes {shapes}: expected two pairs [out, r] and "
        raise AdapterError(msg + "[r, in]")
    _check_rank_of(file, module, rank)
    rows, columns = b1.shape[0], a1.shape[1]
    scale = _scale(file, module)
    file.check_size(module, min(rank**2, rows, columns) * (rows + columns), whole=True)
    if rank**2 < min(rows, columns):
        b = np.einsum("oi,oj->oij", b1, b2).reshape(rows, rank**2)
        a = np.einsum("in,jn->ijn", a1, a2).reshape(rank**2, columns)
        return truncate_product(scale * b, a, file.rank)
    # At full rank the product itself is smaller than its factors.
    return truncate_product(*full_rank_factors(scale * (b1 @ a1) * (b2 @ a2)), file.rank)


def _read_lokr(file: ParsedAdapter, module: str) -> Update:
    _refuse_convolution(file, module, "lokr_t2")
    (u1, s1, vt1), (u2, s2, vt2) = (_triplets(file, module, f"lokr_{side}") for side in ("w1", "w2"))
    shape = u1.shape[0] * u2.shape[0], vt1.shape[1] * vt2.shape[1]
    rank = s1.size * s2.size if file.rank is None else min(file.rank, s1.size * s2.size)
    file.check_size(module, rank * sum(shape))
    scale = _scale(file, module)
    values = abs(scale) * np.outer(s1, s2)
    # In descending order, without values below the rounding error of the largest.
    order = np.argsort(-values, axis=None, kind="stable")
    noise = np.finfo(np.float32).eps * values.max()
    full = max(1, int(np.count_nonzero(values > noise)))
    kept = full if file.rank is None else min(file.rank, full)
    first, second = np.unravel_index(order[:kept], values.shape)
    root = np.sqrt(values[first, second])
    b = (u1[:, None, first] * u2[None, :, second]).reshape(-1, kept) * (np.sign(scale) * root)
    a = root[:, None] * (vt1[first][:, :, None] * vt2[second][:, None, :]).reshape(kept, -1)
    lost = float(np.sum(values.ravel()[order[kept:full]] ** 2))
    return Update(LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32)), lost)


def _triplets(file: ParsedAdapter, module: str, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the SVD of one side of the Kronecker product."""
    if part in file.modules[module]:
        return np.linalg.svd(file.part(module, part).astype(np.float64), full_matrices=False)
    b, a = file.part(module, f"{part}_a"), file.part(module, f"{part}_b")
    if b.shape[1] != a.shape[0]:
        msg = f"{file.path}: module {module!r} has {part}_a of shape {list(b.shape)} and {part}_b of shape "
        raise AdapterError(msg + f"{list(a.shape)}: expected [out, r] and [r, in]; the file is damaged")
    return product_svd(b, a)


LOHA = Kind(
    name="LoHa", peft_type="LOHA", formula="s (W1a W1b) * (W2a W2b)", read=each_module(_read_loha), check=_check_lycoris
)
LOKR = Kind(name="LoKr", peft_type="LOKR", formula="s kron(W1, W2)", read=each_module(_read_lokr), check=_check_lycoris)
