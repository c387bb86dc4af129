"""Read the LoRA from Orbax checkpoints of JAX trainers, and write one for tunix.

Settings that the arrays do not show, above all alpha, come from a `lora_config.json` in or above the checkpoint's
folder, under the names of qwix's LoraProvider. MaxText's trainer writes them into the metadata of the step.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.contents import WriteRequest, as_adapter_errors, file_factors
from jcrosslora.adapter.jax_trainers import LORA_CONFIG, factors_in_slots, slot_arrays, slots_of_tunix, trainer_of
from jcrosslora.checkpoint.in_memory import array_name
from jcrosslora.checkpoint.orbax import ITEM, Entries, alone, clear_marks, handler, read_entries, restore, writing
from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.errors import AdapterError

_STEP = "_CHECKPOINT_METADATA"  # in the folder of a step
_OPTIMISER = ("opt_state", "optimizer")  # its moments are named like the LoRA arrays


def checkpoint_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the LoRA's arrays by their keys, joined by dots.

    Raises AdapterError if the checkpoint cannot be read.
    """
    return {array_name(path): tuple(array.shape) for path, array in _lora_entries(checkpoint).items()}


def read_checkpoint(checkpoint: Path) -> dict[str, np.ndarray]:
    """Read the LoRA's arrays, and no others, by their keys, joined by dots; raises as `checkpoint_shapes`."""
    with as_adapter_errors():
        return restore(checkpoint, _lora_entries(checkpoint))


def holds_lora(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds LoRA, perhaps next to the model; True if it cannot be read."""
    try:
        return bool(_lora_entries(checkpoint))
    except AdapterError:
        return True


def _lora_entries(checkpoint: Path) -> Entries:
    with as_adapter_errors():
        entries = read_entries(checkpoint)
    weights = {path: entry for path, entry in entries.items() if path[0] not in _OPTIMISER}
    return {path: entry for path, entry in weights.items() if trainer_of([array_name(path)])}


def stated_alpha(checkpoint: Path) -> dict[str, Any]:
    """Read the rank and alpha that MaxText's trainer wrote into the metadata of a step; empty if there are none."""
    for path in (checkpoint / _STEP, checkpoint.parent / _STEP):
        if path.is_file():
            with as_adapter_errors():
                stated = (read_json_object(path).get("custom_metadata") or {}).get("lora") or {}
            names = {"rank": "lora_rank", "alpha": "lora_alpha"}
            return {name: stated[theirs] for name, theirs in names.items() if theirs in stated}
    return {}


def write_tunix(contents: WriteRequest, folder: Path) -> None:
    """Write the LoRA as step 0 of tunix's `CheckpointManager`, at one rank (padded with zeros) and scale 1.

    `lora_config.json` holds the LoraProvider settings for the tunix model that loads it.
    """
    import orbax.checkpoint as ocp

    assert contents.base is not None  # refused by `check_profile`
    slots = slots_of_tunix(contents.modules, contents.base)
    merged = factors_in_slots(contents.modules, slots)
    rank = max(factors.rank for factors in merged.values())
    tree: dict[str, Any] = {}
    for name, slot in slots.items():
        *path, parameter = name.split(".")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        a, b = slot_arrays(*file_factors(name, merged[name], contents.dtype, rank), slot)
        place |= {f"{parameter}_lora_a": {"value": a}, f"{parameter}_lora_b": {"value": b}}
    options = ocp.CheckpointManagerOptions(
        create=False, enable_async_checkpointing=False, multiprocessing_options=alone()
    )
    items = ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(tree)})
    managed = {"options": options, "item_handlers": {ITEM: handler()}}
    with writing(), ocp.CheckpointManager(folder.absolute(), **managed) as manager:
        manager.save(0, args=items, custom_metadata=dict(contents.metadata))
    clear_marks(folder)
    config = {"module_path": _module_path(slots), "rank": rank, "alpha": float(rank)}
    (folder / LORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _module_path(slots: Iterable[str]) -> str:
    """Return the qwix pattern that matches exactly the modules of these parameters."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in slots:
        module = name.rpartition(".")[0]
        _, layer, role = module.split(".", 2) if module.startswith("layers.") else ("", "", module)
        layers[role.replace(".", "/")].append(layer)
    roles: dict[str, list[str]] = defaultdict(list)
    for role, found in layers.items():
        roles[f"layers/({'|'.join(found)})/" if found[0] else ""].append(role)
    return "|".join(f"{place}({'|'.join(found)})" for place, found in roles.items())
