"""Convert the LoRA arrays of JAX trainers, tunix (with qwix) and google-deepmind/gemma, to and from PEFT's layout.

MaxText uses qwix too; `maxtext.py` first renames its arrays to tunix's names.

For a parameter W (in..., out...) the factors are a (in..., K) and b (K, out...), and y = x W + scale (x a) b. A
parameter with several matrices, such as `kv_einsum`, has one a, and b is (K, matrices, out...). The scale is
alpha / K in qwix and 1 in google-deepmind/gemma. Both keep the order of heads and rows of Hugging Face.

Sources: qwix 0.1.8, providers/lora.py; tunix 0.1.7, the params files of its models; gemma 3.3 and 4.0, gm/nn/_lora.py.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.combining import fuse
from jcrosslora.adapter.config import is_alpha, shown
from jcrosslora.adapter.contents import as_numpy
from jcrosslora.adapter.maxtext import as_tunix, is_maxtext
from jcrosslora.adapter.names import PREFIX, rank_settings
from jcrosslora.adapter.records import Adapter, check_always_active
from jcrosslora.checkpoint.base import BaseInfo, BaseModel
from jcrosslora.checkpoint.in_memory import array_name
from jcrosslora.checkpoint.tunix import HEAD_MATRIX, LORA_FACTOR, MATRICES, PROJECTIONS, TUNIX, Layout
from jcrosslora.errors import AdapterError, OutputError

LORA_CONFIG = "lora_config.json"
_HEAD = "lm_head"
_Q, _K, _V, _O = (f"self_attn.{role}_proj" for role in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{role}_proj" for role in ("gate", "up", "down"))


@dataclass(frozen=True)
class Trainer:
    """How a library stores LoRA: `factor` matches the name of an array, as (parameter, "a" or "b")."""

    name: str
    factor: re.Pattern[str]
    layout: Layout
    has_alpha: bool


QWIX = Trainer("qwix", LORA_FACTOR, MATRICES, has_alpha=True)
_LINEN: Layout = {
    "attn.q_einsum": (_Q,),
    "attn.kv_einsum": (_K, _V),
    "attn.qkv_einsum": (_Q, _K, _V),
    "attn.attn_vec_einsum": (_O,),
    "mlp.gating_einsum": (_GATE, _UP),
    "mlp.linear": (_DOWN,),
}
TRAINERS = (QWIX, Trainer("google-deepmind/gemma", re.compile(r"(.+)\.lora\.([ab])"), _LINEN, has_alpha=False))
_LAYER = re.compile(r"(?:(?:params|model|transformer)\.)*layers?[._](\d+)\.(.+)")
# Modules of google-deepmind/gemma that wrap one of a model, and those of a model's parts that it numbers.
_WRAPPER = re.compile(r"\._LoRAEinsum_\d+|_LoRAEinsum_")


def trainer_of(names: Iterable[str]) -> Trainer | None:
    """Return the trainer whose LoRA is among the arrays of these names (keys joined by dots); None if there is none."""
    names = tuple(names)
    return next((one for one in TRAINERS if any(map(one.factor.fullmatch, names))), None)


def as_state_dict(
    arrays: Mapping[str, Any], stated: Mapping[str, Any], where: str, base: BaseModel | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Translate the LoRA of a trainer into a state dict of PEFT and its configuration.

    Args:
        arrays: by their keys, joined by dots; arrays that are no factors are ignored. For google-deepmind/gemma, zero
            LoRA of unknown parts is ignored too, such as that of a vision tower after training on text.
        stated: the `alpha`, and perhaps the `rank`, that it was trained with.
        where: names the source of the arrays in messages.
        base: the model that it was trained on, which MaxText needs.

    Raises:
        AdapterError: no LoRA, an unknown parameter, shapes that do not fit, or a missing or superfluous alpha.
    """
    trainer = trainer_of(arrays)
    if trainer is None:
        msg = f"{where}: holds no LoRA of {' or '.join(one.name for one in TRAINERS)}: give what a training with LoRA "
        raise AdapterError(msg + "saved, or nnx.state(model, nnx.LoRAParam)")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    pairs = _pairs(trainer, arrays, where)
    if trainer is not QWIX:
        pairs = {name: pair for name, pair in pairs.items() if pair[1].any() or _held(trainer, name)} or pairs
    for name, (a, b) in (as_tunix(pairs, base, stated, where) if is_maxtext(pairs) else pairs).items():
        modules = modules_of(trainer, name, where)
        rank = a.shape[-1]
        several = len(modules) > 1
        if b.shape[0] != rank or (several and b.shape[1] != len(modules)):
            msg = f"{where}: the LoRA of {name} has the shapes {list(a.shape)} and {list(b.shape)}; expected (in..., "
            raise AdapterError(msg + f"rank) and (rank, {f'{len(modules)}, ' * several}out...): the file is damaged")
        for module, part in zip(modules, np.split(b, len(modules), axis=1), strict=True):
            ranks[module] = rank
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.reshape(-1, rank).T
            tensors[f"{PREFIX}{module}.lora_B.weight"] = part.reshape(rank, -1).T
    if not trainer.has_alpha and "alpha" in stated:
        msg = f"{where}: alpha is {shown(stated, 'alpha')}, and LoRA of {trainer.name} has none: leave it out"
        raise AdapterError(msg)
    settings = {"peft_type": "LORA", **rank_settings(ranks)}
    if trainer.has_alpha:
        return tensors, settings | {"lora_alpha": _alpha(stated, set(ranks.values()), where)}
    return tensors, settings | {"lora_alpha": settings["r"], "alpha_pattern": settings["rank_pattern"]}


def _pairs(trainer: Trainer, arrays: Mapping[str, Any], where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collect a (in..., K) and b (K, out...) of each parameter."""
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, array in arrays.items():
        if match := trainer.factor.fullmatch(name):
            found[match[1]][match[2]] = as_numpy(array)
    for name, sides in found.items():
        if len(sides) != 2 or any(side.ndim < 2 or side.size == 0 for side in sides.values()):
            msg = f"{where}: the LoRA of {name} has no a (in..., rank) and b (rank, out...): give the whole state of "
            raise AdapterError(msg + "the LoRA")
    return {name: (sides["a"], sides["b"]) for name, sides in found.items()}


def modules_of(trainer: Trainer, parameter: str, where: str) -> tuple[str, ...]:
    """Return the modules (Hugging Face names) whose matrices a parameter holds; AdapterError if it is unknown."""
    if held := _held(trainer, parameter):
        return held
    msg = f"{where}: the LoRA of {parameter} is not known; what is read are layers.N. and {', '.join(trainer.layout)}: "
    raise AdapterError(msg + "train on these alone")


def _held(trainer: Trainer, parameter: str) -> tuple[str, ...]:
    """Return the modules whose matrices a parameter holds; empty if it is unknown."""
    if parameter == HEAD_MATRIX:
        return (_HEAD,)
    match = _LAYER.fullmatch(_WRAPPER.sub("", parameter))
    held = trainer.layout.get(match[2], ()) if match else ()
    return tuple(f"model.layers.{match[1]}.{module}" for module in held) if match else ()


def _alpha(stated: Mapping[str, Any], ranks: set[int], where: str) -> float:
    if not is_alpha(stated.get("alpha")):
        msg = f"{where}: alpha is {shown(stated, 'alpha')}, and the arrays of qwix do not hold it: write that of its "
        raise AdapterError(
            msg + f'LoraProvider into a {LORA_CONFIG} there, as {{"alpha": 16}}, or give --alpha (alpha=)'
        )
    if "rank" in stated and all(stated["rank"] != rank for rank in ranks):
        msg = (
            f"{where}: {LORA_CONFIG} states rank {shown(stated, 'rank')}, the arrays have {max(ranks)}: it belongs to "
        )
        raise AdapterError(msg + "another training; correct it")
    return stated["alpha"]


@dataclass(frozen=True)
class Slot:
    """The layout of a parameter's update in a trainer's model.

    Attributes:
        modules: the modules (Hugging Face names) whose matrices the parameter holds.
        inputs: axes of a before the rank.
        outputs: axes of b after the rank.
    """

    modules: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def check_tunix(family: str | None, heads: tuple[int, int] | None) -> tuple[Layout, tuple[int, int]]:
    """Return the layout of tunix's class for a base, and its heads; an OutputError if they are not known."""
    if family is None or heads is None:
        msg = "profile tunix needs the base model, whose heads shape the arrays: name it with --base (base=...)"
        raise OutputError(msg)
    if family not in TUNIX:
        msg = f"profile tunix is for bases of {', '.join(TUNIX)}, this one is of {family}: use another profile"
        raise OutputError(msg)
    queries, keys = heads
    return TUNIX[family][queries == keys], heads


def slots_of_tunix(modules: Iterable[str], base: BaseInfo) -> dict[str, Slot]:
    """Return the parameters of the base's tunix class that hold these modules, by their keys, joined by dots.

    Raises OutputError if tunix has no class for the family, or the class has no parameter for a module.
    """
    layout, (queries, keys) = check_tunix(base.family, base.heads)
    parameters = {module: name for name, held in layout.items() for module in held}
    slots: dict[str, Slot] = {}
    for module in modules:
        _, _, layer, role = module.split(".", 3) if module.startswith("model.layers.") else ("", "", "", module)
        if role == _HEAD and layout is PROJECTIONS:
            rows, columns = base.shapes[_HEAD]
            slots[HEAD_MATRIX] = Slot((_HEAD,), (columns,), (rows,))
            continue
        if role not in parameters:
            msg = f"module {module!r} has no parameter in tunix's class of {base.family}: use another profile"
            raise OutputError(msg)
        held = tuple(f"model.layers.{layer}.{one}" for one in layout[parameters[role]])
        rows, columns = base.shapes[module]
        inputs = (queries, columns // queries) if role == _O else (columns,)
        heads = {_Q: queries, _K: keys, _V: keys}.get(role)
        outputs = (rows,) if heads is None else (heads, rows // heads)
        slots[f"layers.{layer}.{parameters[role]}"] = Slot(
            held, inputs, outputs if len(held) == 1 else (len(held), *outputs)
        )
    return slots


def factors_in_slots(modules: Mapping[str, LoRAFactors], slots: Mapping[str, Slot]) -> dict[str, LoRAFactors]:
    """Merge the updates of all matrices in each parameter; ranks may add up, see `fuse`.

    Returns factors b (all rows, K) and a (K, columns) by parameter name.
    """
    layout = {}
    for name, slot in slots.items():
        rows = prod(slot.outputs) // len(slot.modules)
        layout[name] = tuple((module, at * rows, (at + 1) * rows) for at, module in enumerate(slot.modules))
    return fuse(modules, layout)


def slot_arrays(a: np.ndarray, b: np.ndarray, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
    """Reshape a (K, I) and b (O, K) to a parameter's layout, (in..., K) and (K, out...)."""
    rank = len(a)
    return np.ascontiguousarray(a.T).reshape(*slot.inputs, rank), np.ascontiguousarray(b.T).reshape(rank, *slot.outputs)


def to_nnx(adapter: Adapter, model: Any, *, alpha: float) -> None:
    """Load an adapter into the LoRA parameters of a live `nnx` model of its base, in place.

    The arrays keep their shapes, dtypes and shardings; lower ranks are padded with zeros, which is exact. Keys and
    values in one parameter share one a; if the adapter has two, their ranks add up.

    Args:
        adapter: updates exactly the modules that have LoRA in the model.
        model: a model with LoRA from `qwix.apply_lora_to_model`.
        alpha: of its LoraProvider, which the model does not store; the scale is divided out of b.

    Raises:
        AdapterError: the modules differ, a shape differs, or a rank is above that of the model. The model is unchanged.
    """
    from flax import nnx

    check_always_active(adapter, "which a model of tunix does not know: give one that is always active")
    state = nnx.state(model, nnx.LoRAParam)
    variables: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, variable in nnx.to_flat_state(state):
        if match := QWIX.factor.fullmatch(array_name(map(str, path))):
            variables[match[1]][match[2]] = variable
    slots = {}
    for name, sides in variables.items():
        a, b = sides["a"].get_value().shape, sides["b"].get_value().shape
        slots[name] = Slot(modules_of(QWIX, name, "model"), a[:-1], b[1:])
    _check_modules(adapter, {module for slot in slots.values() for module in slot.modules})
    merged = factors_in_slots(adapter.modules, slots)
    new = {name: _arrays(name, merged[name], slots[name], variables[name], alpha) for name in slots}
    for name, sides in variables.items():
        for side, array in zip("ab", new[name], strict=True):
            old = sides[side].get_value()
            sides[side].set_value(jax.device_put(jnp.asarray(array, old.dtype), old.sharding))
    nnx.update(model, state)


def _check_modules(adapter: Adapter, held: set[str]) -> None:
    if not held:
        raise AdapterError("the model has no LoRA of qwix: apply qwix.apply_lora_to_model to it first")
    if differ := sorted(adapter.modules.keys() ^ held):
        who = "adapter" if differ[0] in adapter.modules else "model"
        msg = f"{differ[0]} has LoRA in the {who} alone ({len(differ)} of such modules): give the LoraProvider a "
        raise AdapterError(msg + "module_path with the adapter's modules")


def _arrays(name: str, factors: Any, slot: Slot, sides: dict[str, Any], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a and b of a parameter at the rank and scale of the model."""
    rank = sides["a"].get_value().shape[-1]
    columns, rows = (int(np.prod(axes)) for axes in (slot.inputs, slot.outputs))
    if factors.shape != (rows, columns) or factors.rank > rank:
        msg = f"{name} of the model takes an update of {rows} x {columns} at rank {rank}, the adapter has one of "
        msg += f"{factors.shape[0]} x {factors.shape[1]} at rank {factors.rank}: give the adapter's base, with LoRA of "
        raise AdapterError(msg + "at least that rank")
    more = rank - factors.rank
    a = np.pad(np.asarray(factors.a).astype(np.float64), ((0, more), (0, 0)))
    b = np.pad(np.asarray(factors.b).astype(np.float64), ((0, 0), (0, more)))
    return slot_arrays(a, b * (factors.scale * rank / alpha), slot)
