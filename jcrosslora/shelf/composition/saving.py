"""A composition as a folder: its arrays, its settings, and each adapter as a PEFT folder.

composition.json           form, composition and its settings, base, and the adapters in their order
composition.safetensors    MODULE.ARRAY -> float32, of every module that any adapter updates; absent without arrays
adapters/0, adapters/1     PEFT folders
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.adapter.contents import safetensors_bytes
from jcrosslora.adapter.save import save_adapter
from jcrosslora.cache.store import base_digest
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import describe_base
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.safetensors import SafetensorsFile
from jcrosslora.checkpoint.store import MappedFile, read_json_object
from jcrosslora.errors import AdapterError, CheckpointError, OutputError
from jcrosslora.shelf.composition.composition import Arrays, ComposedAdapter, Composition, ModuleArrays, module_names
from jcrosslora.shelf.composition.ways import COMPOSITIONS
from jcrosslora.utils.files import atomic_folder, output_path

FACTS, ARRAYS, ADAPTERS = "composition.json", "composition.safetensors", "adapters"
_FORM = 1


def write_composition(
    out: Path, how: Composition, updates: ComposedAdapter, adapters: Sequence[Adapter], base: BaseModel
) -> Path:
    """Write a new folder, completely or not at all; raise OutputError if it exists or cannot be written."""
    out = output_path(out)
    if os.path.lexists(out):
        msg = f"{out}: exists already: choose another output for the composition, or remove it yourself"
        raise OutputError(msg)
    facts = {
        "form": _FORM,
        "composition": how.name,
        "settings": dataclasses.asdict(how),
        "base": public_name(base.name),
        "base_digest": base_digest(base),
        "prefix": base.prefix,
        "adapters": [public_name(adapter.info.name) for adapter in adapters],
    }
    arrays = {name: np.asarray(array) for name, array in updates.by_module(base).items()}
    info = describe_base(base, digest="")
    with atomic_folder(out) as folder:
        for number, adapter in enumerate(adapters):
            save_adapter(adapter, folder / ADAPTERS / str(number), base=info)
        if arrays:
            (folder / ARRAYS).write_bytes(safetensors_bytes(arrays, {"format": "pt"}))
        facts["digests"] = _digests(folder)
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return out


def read_composition(folder: Path, base: BaseModel) -> tuple[Composition, list[Adapter], dict[str, np.ndarray]]:
    """Read the composition, its adapters, and its arrays by the names in the file.

    Raises:
        AdapterError: no composition, a damaged one, one of an unknown form, or one of another base.
    """
    folder = Path(folder).expanduser()
    try:
        facts = read_json_object(folder / FACTS)
        how, names = _composition(folder, facts), facts["adapters"]
        stated = facts.get("base_digest")
        if isinstance(stated, str) and stated != base_digest(base):
            msg = f"{folder}: was made for another base, {facts.get('base')} ({stated[:19]}...), than {base.ref} "
            raise AdapterError(msg + f"({base_digest(base)[:19]}...): give that one, or compose the adapters again")
        _check_digests(folder, facts.get("digests", {}))  # an earlier version wrote none
        file = folder / ARRAYS
        arrays = {}
        if file.exists():
            opened = SafetensorsFile(file)
            arrays = {name: np.array(opened.array(name)) for name in opened.entries}
        _check_settings(folder, how, arrays)
    except CheckpointError as error:
        msg = f"{folder}: holds no composition that can be read ({error})"
        raise AdapterError(msg) from error
    adapters = []
    for number, name in enumerate(names):
        adapter = load_adapter(folder / ADAPTERS / str(number), base)
        adapters.append(dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, name=name)))
    return how, adapters, arrays


def with_read_arrays(updates: ComposedAdapter, base: BaseModel, arrays: ModuleArrays, folder: str) -> ComposedAdapter:
    """Replace the composition's arrays by those of a file.

    Raises:
        AdapterError: one is missing, has another shape or dtype, or belongs to no module that an adapter updates.
    """
    wanted = updates.by_module(base)
    if wrong := sorted(wanted.keys() ^ arrays.keys()):
        what = "lacks" if wrong[0] in wanted else "holds"
        msg = f"{folder}: {ARRAYS} {what} {wrong[0]}, and an array of each module that an adapter updates is wanted: "
        raise AdapterError(msg + "save the composition again")
    for name, array in arrays.items():
        if array.shape != wanted[name].shape or array.dtype != np.float32:
            came = f"{name} of shape {list(array.shape)} and {array.dtype}"
            msg = f"{folder}: {came}, wanted float32 {list(wanted[name].shape)}: it belongs to another base"
            raise AdapterError(msg)
    found: dict[str, Arrays] = {}
    for role, one in updates.roles.items():
        modules = module_names(base, role)
        found[role] = {name: jnp.stack([arrays[f"{module}.{name}"] for module in modules]) for name in one.arrays}
    return updates.with_arrays(found)


def _composition(folder: Path, facts: Mapping[str, Any]) -> Composition:
    form, name, settings, names = map(facts.get, ("form", "composition", "settings", "adapters"))
    kind = COMPOSITIONS.get(name) if form == _FORM and isinstance(name, str) else None
    listed = isinstance(names, list) and names and all(isinstance(one, str) for one in names)
    if kind is not None and listed and isinstance(settings, dict):
        numbers = {field: value for field, value in settings.items() if isinstance(value, int)}
        if numbers.keys() == settings.keys() == {field.name for field in dataclasses.fields(kind)}:
            return kind(**numbers)
    msg = f"{folder}: {FACTS} is of form {form!r} and composition {name!r}, which this version does not read: save the "
    raise AdapterError(msg + "composition again, or update jcrosslora")


def _check_settings(folder: Path, how: Composition, arrays: ModuleArrays) -> None:
    """Raise AdapterError for a setting that is no size of any array, before arrays of that size are made."""
    sizes = {size for array in arrays.values() for size in array.shape}
    for name, value in dataclasses.asdict(how).items():
        if value not in sizes:
            msg = f"{folder}: {FACTS} states {name} {value}, and no array in {ARRAYS} has this size: save the "
            raise AdapterError(msg + "composition again")


def _check_digests(folder: Path, stated: Any) -> None:
    found = _digests(folder)
    for name, digest in stated.items() if isinstance(stated, dict) else ():
        if found.get(name) != digest:
            msg = f"{folder}: {name} is missing or was changed after writing: compose the adapters again"
            raise AdapterError(msg)


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file but the settings, by its path in the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FACTS)
    return {path.relative_to(folder).as_posix(): MappedFile(path).sha256() for path in paths}
