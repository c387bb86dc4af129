"""Uni-LoRA: dW = B A, and every entry of every A and B is an entry of one vector theta over the root of its uses.

The indices into theta are drawn once: each entry is used equally often, up to one, in an order shuffled by a seed; the
modules follow in the order of the model, A before B. If a file does not hold the indices they are drawn again.

Source: Uni-LoRA (arXiv 2506.00799); peft 0.21, generate_index in tuners/unilora/model.py.

Its files do not name their modules: they are those of the base that the configuration targets, in peft's order, by
check_target_module_exists in tuners/tuners_utils.py.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jcrosslora.adapter.config import check_rank, check_targets, shown
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import INTEGERS, LARGEST, AdapterFile
from jcrosslora.adapter.kinds.kind import Config, Kind, Update
from jcrosslora.adapter.patterns import is_matchable
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError

_SEED, _LENGTH = 42, 256  # peft's defaults of proj_seed and theta_d_length


def _check(config: Config, where: str) -> None:
    check_rank(config, where)
    check_targets(config, where)
    seed = config.get("proj_seed", _SEED)
    if type(seed) is not int or seed < 0:
        msg = f"{where}: proj_seed is {shown(config, 'proj_seed')}, a seed was wanted: correct the file"
        raise AdapterError(msg)


def _read(file: AdapterFile) -> Iterator[tuple[str, Update]]:
    theta = file.common("unilora_theta_d", axes=1).astype(np.float64)
    stated = file.config.get("theta_d_length", _LENGTH)
    if theta.size != stated:
        msg = f"{file.path}: unilora_theta_d has {theta.size} numbers, adapter_config.json says {stated}"
        msg += ": use the configuration that belongs to the file"
        raise AdapterError(msg)
    for module, (a, b) in _stored(file, theta) if file.modules else _replayed(file, theta):
        yield module, Update(LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32)))


Pairs = Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]


def _stored(file: AdapterFile, theta: np.ndarray) -> Pairs:
    for module in file.modules:
        a, b = (_from_indices(file, module, side, theta) for side in "AB")
        yield module, (a, b)


def _from_indices(file: AdapterFile, module: str, side: str, theta: np.ndarray) -> np.ndarray:
    keys, part = file.modules[module], f"unilora_indices_{side}"
    scales = file.part(module, f"unilora_scales_{side}").astype(np.float64)
    indices = file.read(keys[part], dtypes=INTEGERS).astype(np.int64) if part in keys else np.full((1, 1), -1)
    if indices.shape != scales.shape or indices.min() < 0 or indices.max() >= theta.size:
        msg = (
            f"{file.path}: the indices of module {module!r} do not fit its scales and the {theta.size} numbers of theta"
        )
        msg += ": the file is damaged"
        raise AdapterError(msg)
    return theta[indices] * scales


def _replayed(file: AdapterFile, theta: np.ndarray) -> Pairs:
    base = file.known_base("Uni-LoRA", "was saved without its indices, which depend on the base's modules")
    shapes = targeted_shapes(file.config, base, str(file.path))
    rank = int(file.config["r"])
    if rank > max(map(min, shapes.values())):
        msg = f"{file.path}: r is {rank}, above the width of every module of the base {base.name}: correct the file"
        raise AdapterError(msg)
    count = _size(shapes, rank)
    if count > LARGEST:
        msg = (
            f"{file.path}: r is {rank}, for which {count:,} indices would have to be drawn: correct the file, or save "
        )
        raise AdapterError(msg + "the adapter with its indices (save_indices=True)")
    indices = _balanced_indices(count, theta.size, file.config.get("proj_seed", _SEED))
    counts = np.bincount(indices, minlength=theta.size)
    scaled = theta / np.sqrt(np.maximum(counts, 1))
    start = 0
    for module, (rows, columns) in shapes.items():
        middle, stop = start + rank * columns, start + rank * (columns + rows)
        a, b = scaled[indices[start:middle]], scaled[indices[middle:stop]]
        start = stop
        yield module, (a.reshape(rank, columns), b.reshape(rows, rank))


def _size(shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
    return rank * sum(rows + columns for rows, columns in shapes.values())


def _balanced_indices(count: int, length: int, seed: int) -> np.ndarray:
    """Draw int64 (count,) below `length`, each equally often up to one, shuffled as peft does.

    Args:
        count: entries of all A and B.
        length: entries of theta.
        seed: `proj_seed`.
    """
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if count % length:
        indices = np.concatenate([indices, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(indices)
    return indices


UNILORA = Kind(
    name="Uni-LoRA", peft_type="UNILORA", formula="B A of the numbers of one vector", read=_read, check=_check
)


_HEAD = "lm_head"
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def targeted_shapes(config: Mapping[str, Any], base: BaseModel, where: str) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every module that the configuration targets, by its name in the base.

    Args:
        config: of the adapter.
        base: the model it is for. Its modules are ordered layer by layer, q, k, v, o, gate, up, down, the head last.
        where: path of the configuration, for messages.

    Raises:
        AdapterError: the base has fused modules, whose order differs, or the configuration targets no module or
            cannot be parsed.
    """
    if base.fused:
        msg = f"{where}: the order of the modules of {base.family.name} bases is not known: save the adapter with its "
        msg += "indices (save_indices=True)"
        raise AdapterError(msg)
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
    """Compile a pattern of the configuration.

    Raises:
        re.error: it is not a regular expression, or could take very long to match.
    """
    if not is_matchable(text):
        msg = f"{text[:60]!r} is not a regular expression, or has too many ways to match"
        raise re.error(msg)
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
