"""Put an adapter into a live model of tunix that has LoRA by qwix."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.jax_trainers import QWIX, Slot, factors_in_slots, modules_of, slot_arrays
from jcrosslora.adapter.records import Adapter, check_always_active
from jcrosslora.checkpoint.in_memory import array_name
from jcrosslora.errors import AdapterError


def to_nnx(adapter: Adapter, model: Any, *, alpha: float) -> None:
    """Set the LoRA of a live `nnx` model to an adapter of its base, in place.

    The arrays keep their shapes, dtypes and shardings; ranks below that of the model are padded with zeros, which is
    exact. Keys and values in one parameter share their a: if an adapter has two, the ranks add up.

    Args:
        adapter: with an update for every module that has LoRA in the model, and no others.
        model: to which `qwix.apply_lora_to_model` was applied.
        alpha: of its LoraProvider, which the model does not tell; the scale is divided out of b.

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
        msg = "the model has no LoRA of qwix: apply qwix.apply_lora_to_model to it first"
        raise AdapterError(msg)
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
