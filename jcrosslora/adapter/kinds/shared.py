"""Kinds whose modules share matrices or vectors: VeRA, VB-LoRA and Uni-LoRA.

VeRA: dW = diag(b) B diag(d) A, with one random B and A for all modules, sliced to the shape of each. If the two were
not saved (`save_projection` false) they are drawn again, as torch's CPU generator draws them.
Source: VeRA (arXiv 2310.11454), equation 2; peft 0.21, tuners/vera.

VB-LoRA: dW = B A, composed of vectors of length v that mix a few vectors of one bank.
Source: VB-LoRA (arXiv 2405.15179); peft 0.21, tuners/vblora/layer.py.

Uni-LoRA: dW = B A, and every entry of every A and B is an entry of one vector theta, divided by the square root of its
number of uses. The indices into theta are drawn once, shuffled by a seed, so that the numbers of uses differ by at most
one; modules come in the order of the model, A before B. If a file lacks the indices they are drawn again. Such a file
does not name its modules either: they are the modules of the base that the configuration targets, in peft's order
(check_target_module_exists in tuners/tuners_utils.py).
Source: Uni-LoRA (arXiv 2506.00799); peft 0.21, generate_index in tuners/unilora/model.py.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import Config, check_rank, check_targets, check_value
from jcrosslora.adapter.kinds.kind import INTEGERS, LARGEST, Kind, ParsedAdapter, Update, each_module
from jcrosslora.adapter.names import is_matchable
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError

_HEAD = "lm_head"
_TOP = 2  # peft's default of topk
_SEED, _LENGTH = 42, 256  # peft's defaults of proj_seed and theta_d_length
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")

Factors = Iterator[tuple[str, np.ndarray, np.ndarray]]


def _check(config: Config, where: str, seed: str = "") -> None:
    check_rank(config, where)
    check_targets(config, where)
    if seed in config:
        check_value(config, where, seed, lambda value: type(value) is int and value >= 0, "a seed")


def _read_vera(file: ParsedAdapter) -> Iterator[tuple[str, Update]]:
    needs = "VeRA slices its matrices to the shapes of the base's modules"
    shapes = {module: file.shape(module, needs) for module in (*file.modules, *file.others)}
    if not file.modules:
        return
    a, b = _projections(file, shapes.values())
    for module in file.modules:
        rows, columns = shapes[module]
        gain_b, gain_d = (file.part(module, f"vera_lambda_{side}", axes=1).astype(np.float64) for side in "bd")
        if gain_b.shape != (rows,) or gain_d.shape != (a.shape[0],) or a.shape[1] < columns or b.shape[0] < rows:
            msg = f"{file.path}: module {module!r} has {gain_b.size} gains for {rows} rows, {gain_d.size} for rank "
            msg += f"{a.shape[0]}, and matrices for {b.shape[0]} x {a.shape[1]}: give the base it was trained on"
            raise AdapterError(msg)
        factors = LoRAFactors(
            a=(gain_d[:, None] * a[:, :columns]).astype(np.float32), b=(gain_b[:, None] * b[:rows]).astype(np.float32)
        )
        yield module, Update(factors)


def _projections(file: ParsedAdapter, shapes: Collection[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return A (r, largest I) and B (largest O, r) in float64, from the file or drawn again."""
    if "vera_A" in file.shared or "vera_B" in file.shared:
        a, b = file.common("vera_A"), file.common("vera_B")
        if a.shape[0] != b.shape[1]:
            msg = f"{file.path}: vera_A has shape {list(a.shape)} and vera_B {list(b.shape)}: expected one rank"
            raise AdapterError(msg)
        return a.astype(np.float64), b.astype(np.float64)
    # Taken from the length of the gains, because a damaged `r` could claim any size.
    ranks = {module: file.part(module, "vera_lambda_d", axes=1).size for module in file.modules}
    widest, rank = max(ranks.items(), key=lambda item: item[1])
    rows, columns = max(o for o, _ in shapes), max(i for _, i in shapes)
    file.check_size(widest, rank * (rows + columns))
    # RandomState seeds the Mersenne Twister as torch does; a Generator does not.
    draw = np.random.RandomState(file.config.get("projection_prng_key", 0) % 2**32)
    return _torch_kaiming(draw, rank, columns).astype(np.float64), _torch_kaiming(draw, rows, rank).astype(np.float64)


def _torch_kaiming(draw: np.random.RandomState, rows: int, columns: int) -> np.ndarray:
    """Draw float32 (rows, columns) as torch does for a uniform Kaiming initialisation of gain sqrt(2) on the CPU.

    torch takes the lower 24 bits of each number of the same generator; the bounds are +-sqrt(6 / columns).
    """
    bits = draw.randint(0, 2**32, rows * columns, dtype=np.uint32) & np.uint32(2**24 - 1)
    unit = bits.astype(np.float32) * np.float32(2.0**-24)
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    low, width = np.float32(-bound), np.float32(np.float32(bound) - np.float32(-bound))
    return (unit * width + low).reshape(rows, columns)


VERA = Kind(
    name="VeRA",
    peft_type="VERA",
    formula="diag(b) B diag(d) A",
    read=_read_vera,
    check=partial(_check, seed="projection_prng_key"),
)


def _check_vblora(config: Config, where: str) -> None:
    _check(config, where)
    check_rank({"topk": _TOP, **config}, where, "topk")


def _read_vblora(file: ParsedAdapter, module: str) -> Update:
    bank = file.common("vblora_vector_bank").astype(np.float64)
    # (r, I / v, v) and (O / v, r, v)
    a, b = (_mixed(file, module, f"vblora_logits_{side}", bank) for side in "AB")
    rank = a.shape[0]
    if rank != b.shape[1]:
        msg = f"{file.path}: module {module!r} has logits of rank {rank} for A and {b.shape[1]} for B"
        raise AdapterError(msg + ": the file is damaged")
    rows = np.ascontiguousarray(b.swapaxes(1, 2).reshape(-1, rank), np.float32)
    return Update(LoRAFactors(a=a.reshape(rank, -1).astype(np.float32), b=rows))


def _mixed(file: ParsedAdapter, module: str, part: str, bank: np.ndarray) -> np.ndarray:
    """Return the mix of bank vectors that each entry of the logits selects, (.., .., v)."""
    keys = file.modules[module]
    indices_key = f"{part}_topk_indices"
    if indices_key in keys:
        indices = file.read(keys[indices_key], axes=3, dtypes=INTEGERS).astype(np.int64)
        weights = np.ones(indices.shape)
        if indices.shape[2] > 1:  # the last weight of each entry is not stored: they sum to one
            first = file.part(module, f"{part}_topk_weights", axes=3).astype(np.float64)
            weights = np.append(first, 1 - first.sum(-1, keepdims=True), axis=2)
    else:
        logits = file.part(module, part, axes=3).astype(np.float64)
        top = min(int(file.config.get("topk", _TOP)), logits.shape[2])
        indices = np.argsort(-logits, axis=2, kind="stable")[:, :, :top]
        chosen = np.take_along_axis(logits, indices, axis=2)
        weights = np.exp(chosen - chosen[:, :, :1])
        weights /= weights.sum(-1, keepdims=True)
    if indices.shape != weights.shape or indices.min() < 0 or indices.max() >= bank.shape[0]:
        msg = f"{file.path}: {part} of module {module!r} does not fit the bank of {bank.shape[0]} vectors"
        raise AdapterError(msg + ": the file is damaged")
    file.check_size(module, indices.size * bank.shape[1])
    return np.einsum("ijk,ijkv->ijv", weights, bank[indices])


VBLORA = Kind(
    name="VB-LoRA",
    peft_type="VBLORA",
    formula="B A of mixtures of a bank's vectors",
    read=each_module(_read_vblora),
    check=_check_vblora,
)


def _read_unilora(file: ParsedAdapter) -> Iterator[tuple[str, Update]]:
    theta = file.common("unilora_theta_d", axes=1).astype(np.float64)
    stated = file.config.get("theta_d_length", _LENGTH)
    if theta.size != stated:
        msg = f"{file.path}: unilora_theta_d has {theta.size} numbers, adapter_config.json says {stated}"
        raise AdapterError(msg + ": use the configuration that belongs to the file")
    for module, a, b in _indexed(file, theta) if file.modules else _drawn(file, theta):
        yield module, Update(LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32)))


def _indexed(file: ParsedAdapter, theta: np.ndarray) -> Factors:
    for module, keys in file.modules.items():
        sides = []
        for side in "AB":
            part = f"unilora_indices_{side}"
            scales = file.part(module, f"unilora_scales_{side}").astype(np.float64)
            indices = file.read(keys[part], dtypes=INTEGERS).astype(np.int64) if part in keys else np.full((1, 1), -1)
            if indices.shape != scales.shape or indices.min() < 0 or indices.max() >= theta.size:
                msg = f"{file.path}: the indices of module {module!r} do not fit its scales and the {theta.size} "
                raise AdapterError(msg + "numbers of theta: the file is damaged")
            sides.append(theta[indices] * scales)
        yield module, sides[0], sides[1]


def _drawn(file: ParsedAdapter, theta: np.ndarray) -> Factors:
    base = file.known_base("Uni-LoRA was saved without its indices, which depend on the base's modules")
    shapes = _targeted_shapes(file.config, base, str(file.path))
    rank = int(file.config["r"])
    if rank > max(map(min, shapes.values())):
        msg = f"{file.path}: r is {rank}, above the width of every module of the base {base.name}: correct the file"
        raise AdapterError(msg)
    count = rank * sum(rows + columns for rows, columns in shapes.values())
    if count > LARGEST:
        msg = f"{file.path}: r is {rank}, for which {count:,} indices would have to be drawn: correct the file, or "
        raise AdapterError(msg + "save the adapter with its indices (save_indices=True)")
    indices = _balanced_indices(count, theta.size, file.config.get("proj_seed", _SEED))
    scaled = theta / np.sqrt(np.maximum(np.bincount(indices, minlength=theta.size), 1))
    start = 0
    for module, (rows, columns) in shapes.items():
        middle, stop = start + rank * columns, start + rank * (columns + rows)
        a, b = scaled[indices[start:middle]], scaled[indices[middle:stop]]
        start = stop
        yield module, a.reshape(rank, columns), b.reshape(rows, rank)


def _balanced_indices(count: int, length: int, seed: int) -> np.ndarray:
    """Draw int64 indices (count,) below `length`, shuffled as peft does; their numbers of uses differ by at most 1."""
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if count % length:
        indices = np.concatenate([indices, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(indices)
    return indices


UNILORA = Kind(
    name="Uni-LoRA",
    peft_type="UNILORA",
    formula="B A of the numbers of one vector",
    read=_read_unilora,
    check=partial(_check, seed="proj_seed"),
)


def _targeted_shapes(config: Mapping[str, Any], base: BaseModel, where: str) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every module that the configuration targets, by its name in the base.

    The modules of the base are ordered layer by layer, q, k, v, o, gate, up, down, the head last.
    """
    if base.fused:
        msg = f"{where}: the order of the modules of {base.family.name} bases is not known: save the adapter with its "
        raise AdapterError(msg + "indices (save_indices=True)")
    shapes = {name: module.shape for name, module in base.modules.items()}
    every = shapes | {_HEAD: (base.dims.vocab, base.dims.hidden)}
    try:
        found = {name: shape for name, shape in every.items() if _is_target(config, name)}
    except (re.error, TypeError, AttributeError, RecursionError) as error:
        msg = f"{where}: its target_modules or layers cannot be parsed ({error}): correct the file"
        raise AdapterError(msg) from error
    if not found:
        msg = f"{where}: target_modules names no module of the base {base.name}: give the base it was trained on"
        raise AdapterError(msg)
    return found


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    if any(_pattern(rf"(^|.*\.){saved}($|\..*)").match(name) for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules") or ()
    if targets == "all-linear":
        return name != _HEAD
    if isinstance(targets, str):
        return _pattern(targets).fullmatch(name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{target}") for target in targets) and _is_layer(config, name)


def _pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern of the configuration, or raise an re.error if it could take very long to match."""
    if not is_matchable(text):
        raise re.error(f"{text[:60]!r} is not a regular expression, or has too many ways to match")
    return re.compile(text)


def _is_layer(config: Mapping[str, Any], name: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [_pattern(rf"(?:^|.*?\.){pattern}\.(\d+)\.") for pattern in patterns] or [_LAYER]
    match = next((found for rule in rules if (found := rule.match(name))), None)
    return match is not None and int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
