"""Orbax checkpoints with the LoRA of a JAX trainer: find them in a folder, read their LoRA, and write one for tunix.

A checkpoint is a folder of one item, which `CheckpointManager` keeps in the folder of a step, next to other steps. What
the arrays do not tell, alpha above all, stands in a `lora_config.json` in one of these folders, by the names that
qwix's LoraProvider has for it.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jcrosslora.adapter.contents import Contents, file_factors
from jcrosslora.adapter.jax_trainers import (
    LORA_CONFIG,
    array_name,
    factors_in_slots,
    named_arrays,
    slot_arrays,
    slots_of_tunix,
    trainer_of,
)
from jcrosslora.errors import AdapterError

_MARK = "_METADATA"  # in the folder of an item
_ITEM = "model_params"  # tunix's name of the item with the weights


def find_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the weights in a checkpoint, a step, or the latest of several steps; None elsewhere.

    Of a step's items it is tunix's `model_params`, or the only one.
    """
    if (folder / _MARK).is_file():
        return folder
    steps = [one for one in folder.glob("[0-9]*") if one.name.isascii() and one.name.isdecimal() and one.is_dir()]
    items = {mark.parent for mark in max(steps, key=lambda one: int(one.name), default=folder).glob(f"*/{_MARK}")}
    named = {item for item in items if item.name == _ITEM} or items
    return named.pop() if len(named) == 1 else None


def find_lora_config(folder: Path, checkpoint: Path) -> Path | None:
    """Return the `lora_config.json` nearest to a checkpoint, in it or in a folder up to the one that was given."""
    around = [one for one in (checkpoint, *checkpoint.parents) if one.is_relative_to(folder)]
    return next((path for one in around if (path := one / LORA_CONFIG).is_file()), None)


def checkpoint_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the LoRA's arrays by their keys, joined by dots.

    Raises:
        AdapterError: the checkpoint cannot be read.
    """
    return {name: tuple(array.shape) for name, array in named_arrays(_lora_part(checkpoint)).items()}


def read_checkpoint(checkpoint: Path) -> dict[str, np.ndarray]:
    """Read the LoRA's arrays, and no others, by their keys, joined by dots; raises as `checkpoint_shapes`."""
    import orbax.checkpoint as ocp

    wanted = _lora_part(checkpoint)
    if not wanted:
        return {}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    with _readable(checkpoint), ocp.Checkpointer(_handler(), multiprocessing_options=_alone()) as checkpointer:
        return named_arrays(checkpointer.restore(checkpoint.absolute(), args=args))


def _lora_part(checkpoint: Path) -> dict[str, Any]:
    """Return the branches of a checkpoint's tree that lead to LoRA, with shapes and dtypes as leaves."""
    from etils import epath

    with _readable(checkpoint):
        tree = _handler().metadata(epath.Path(checkpoint.absolute())).tree
    return _kept(tree, ()) if isinstance(tree, dict) else {}


def _kept(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for key, part in tree.items():
        here = (*path, key)
        kept = _kept(part, here) if isinstance(part, Mapping) else trainer_of([array_name(here)]) and part
        if kept:
            found[key] = kept
    return found


def _alone() -> Any:
    """Let this process read or write alone: of several that work together, not all reach this point."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of damaged files Orbax raises anything
        reason = " ".join(str(error).split())[:120]
        msg = f"{checkpoint}: is not a readable checkpoint of Orbax ({reason}): give a complete one"
        raise AdapterError(msg) from error


def write_tunix(contents: Contents, folder: Path) -> None:
    """Write the LoRA as step 0 of tunix's `CheckpointManager`, of one rank, lower ones padded with zeros, and scale 1.

    `lora_config.json` holds the settings of the LoraProvider with which tunix makes the model that takes it.
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
        create=False, enable_async_checkpointing=False, multiprocessing_options=_alone()
    )
    items = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(tree)})
    try:
        with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers={_ITEM: _handler()}) as manager:
            manager.save(0, args=items, custom_metadata=dict(contents.metadata))
    except ValueError as error:  # so its storage reports a full disk
        raise OSError(" ".join(str(error).split())[:120]) from error
    for mark in folder.rglob("commit_success.txt"):  # names the folder, whose name is a temporary one
        mark.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    config = {"module_path": _module_path(slots), "rank": rank, "alpha": float(rank)}
    (folder / LORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _module_path(slots: Iterable[str]) -> str:
    """Return the pattern of qwix for the modules of these parameters, and no others."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in slots:
        module = name.rpartition(".")[0]
        _, layer, role = module.split(".", 2) if module.startswith("layers.") else ("", "", module)
        layers[role.replace(".", "/")].append(layer)
    roles: dict[str, list[str]] = defaultdict(list)
    for role, found in layers.items():
        roles[f"layers/({'|'.join(found)})/" if found[0] else ""].append(role)
    return "|".join(f"{place}({'|'.join(found)})" for place, found in roles.items())
