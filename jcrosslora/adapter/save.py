"""Write a LoRA adapter in one of several profiles, atomically; and list what each profile can hold."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.combining import fuse
from jcrosslora.adapter.contents import BASE, FileDtype, WriteRequest
from jcrosslora.adapter.folder import CHAT_TEMPLATE, CONFIG, GGUF_WEIGHTS, MLX_WEIGHTS, WEIGHTS
from jcrosslora.adapter.gguf import check_gguf, write_gguf
from jcrosslora.adapter.jax_trainers import LORA_CONFIG, check_tunix
from jcrosslora.adapter.mlx import write_mlx
from jcrosslora.adapter.names import by_weight, ending, natural_key
from jcrosslora.adapter.orbax import write_tunix
from jcrosslora.adapter.peft import write_peft, write_portable
from jcrosslora.adapter.records import Adapter, Carried, check_always_active, restrict
from jcrosslora.checkpoint.base import BaseInfo
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.utils.files import atomic_folder, ensure_free, output_path

Profile = Literal["portable", "peft", "mlx", "gguf", "tunix"]
_WRITTEN = (CONFIG, WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, LORA_CONFIG)


@dataclass(frozen=True)
class ProfileFormat:
    """One profile.

    Attributes:
        magnitudes: whether it holds the magnitudes of a DoRA.
        invocation: whether it holds invocation tokens (aLoRA); otherwise an adapter would always be active.
        carries: the kinds of change that it holds.
    """

    write: Callable[[WriteRequest, Path], None]
    reader: str
    magnitudes: bool = False
    invocation: bool = True
    carries: Carried = Carried.LINEAR


FORMATS: Mapping[str, ProfileFormat] = {
    "portable": ProfileFormat(write_portable, "PEFT"),
    "peft": ProfileFormat(write_peft, "PEFT", magnitudes=True, carries=Carried.EVERYTHING),
    "mlx": ProfileFormat(write_mlx, "MLX", magnitudes=True, invocation=False),
    "gguf": ProfileFormat(write_gguf, "llama.cpp"),
    "tunix": ProfileFormat(write_tunix, "tunix", invocation=False),
}


def carried_by(profile: str) -> tuple[Carried, str]:
    """Return what a profile holds, and why not the rest; "" if it holds more than updates of linear layers."""
    carries = FORMATS[profile].carries
    return carries, f"profile {profile} does not hold it, profile peft does" if carries == Carried.LINEAR else ""


def for_profile(adapter: Adapter, profile: str) -> Adapter:
    """Return the part of an adapter that a profile holds; the rest is listed in `info.ignored`."""
    return restrict(adapter, *carried_by(profile))


def check_holds(profile: str, adapter: Adapter) -> None:
    """Raise an OutputError if a profile cannot hold the adapter's invocation tokens (aLoRA)."""
    if not FORMATS[profile].invocation:
        others = ", ".join(name for name, form in FORMATS.items() if form.invocation)
        why = f"which {FORMATS[profile].reader} does not know: write it in one of the profiles {others}"
        check_always_active(adapter, why, OutputError)


def check_profile(profile: str, family: str | None, heads: tuple[int, int] | None, *, dora: bool = False) -> None:
    """Refuse a profile that cannot be written for a base, before any work is done.

    Args:
        family: of the base, None if it is not known.
        heads: (query heads, key heads) of the base, None if they are not known.
        dora: whether a DoRA is written with its magnitudes.
    """
    if profile not in FORMATS:
        raise UsageError(f"profile {profile!r} is unknown; use one of {', '.join(FORMATS)}")
    if dora and not FORMATS[profile].magnitudes:
        able = " or ".join(name for name, form in FORMATS.items() if form.magnitudes)
        msg = f"profile {profile} does not hold the magnitudes of a DoRA; use {able}, or write a fit of a lower rank "
        raise UsageError(msg + "(leave out --keep-dora)")
    if profile == "gguf":
        check_gguf(family, heads)
    if profile == "tunix":
        check_tunix(family, heads)


def save_adapter(
    adapter: Adapter,
    out: str | Path,
    *,
    base: BaseInfo | None = None,
    base_name: str | None = None,
    profile: Profile = "portable",
    dtype: FileDtype = "float32",
    overwrite: bool = False,
    documents: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    magnitudes: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write an adapter as a folder, completely or not at all. The scale is folded into B in every profile.

    Args:
        adapter: at least one update; not changed. Its changes of embedding and head, its replaced tensors, and its
            updates of experts are written in profile "peft".
        base: its base; profiles gguf and tunix need it. Updates of the parts of its fused modules are merged, see
            `fuse`; modules without an update that share the ending of a written one go into `exclude_modules`, or PEFT
            would expect tensors for them; the header of the weights file has the digest of the base, if known. None
            merges nothing, and keeps the names in the adapter's file.
        base_name: `base_model_name_or_path`; None takes the name of the base, else `adapter.info.base_name`. For a
            path, only the last part is written.
        profile: see `jcrosslora.save_adapter`, also for `dtype` and `overwrite`.
        documents: maps file names to texts for the same folder (README.md, transfer_report.json); the chat template of
            the adapter's info is added unless they have one.
        metadata: pairs for the header of the weights file.
        magnitudes: float32 (O,) for each module of a DoRA that is written as one, in profile peft or mlx; `adapter`
            then holds its s B A, for modules as the base stores them.

    Raises:
        OutputError: the adapter is empty, its values do not fit the dtype or its modules the profile, or the folder
            cannot be written.
        UsageError: an unknown profile or dtype, or a document or metadata entry that cannot be written.
    """
    out = output_path(out)
    ensure_free(out, overwrite)
    family, heads, fused = (None, None, {}) if base is None else (base.family, base.heads, base.fused)
    check_profile(profile, family, heads, dora=magnitudes is not None)
    check_holds(profile, adapter)
    template = adapter.info.chat_template
    documents = ({} if template is None else {CHAT_TEMPLATE: template}) | dict(documents or {})
    _check_settings(dtype, documents, metadata or {})
    modules = fuse(adapter.modules, fused)
    held = for_profile(adapter, profile)
    # peft requires at least one LoRA.
    if not modules and not held.experts and not any(one.factors is not None for one in held.tokens):
        left = "; ".join(held.info.ignored).rstrip(".")
        msg = f"{out}: the adapter has no modules{left and f' ({left})'}; nothing was written, give one with at least "
        raise OutputError(msg + "one update that the profile holds")
    _check_magnitudes(modules, magnitudes)
    weights = by_weight(modules, family, adapter.info.config)
    target = {}
    if base is not None and base.digest:
        named = {"name": public_name(base.name), "revision": base.revision, "digest": base.digest}
        target[BASE] = json.dumps(named)
    modules = dict(sorted(modules.items(), key=lambda item: natural_key(item[0])))
    contents = WriteRequest(
        replace(held, modules=modules),
        dtype=dtype,
        base=base,
        base_name=public_name(base_name or (adapter.info.base_name if base is None else base.name)),
        prefix=adapter.info.prefix if base is None else base.prefix,
        by_weight=weights,
        exclude=() if base is None else tuple(_without_update(modules, weights, base)),
        metadata=target | dict(metadata or {}),
        magnitudes=magnitudes,
    )
    with atomic_folder(out, overwrite) as folder:
        FORMATS[profile].write(contents, folder)
        for name, text in (documents or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def _without_update(updated: Mapping[str, object], weights: frozenset[str], base: BaseInfo) -> list[str]:
    """Return the modules without an update that share the ending of an updated one outside `weights`."""
    owner = {part: name for name, parts in base.fused.items() for part, _, _ in parts}
    endings = {ending(name) for name in updated if name not in weights}
    every = dict.fromkeys(owner.get(name, name) for name in base.shapes)
    return sorted((name for name in every if ending(name) in endings and name not in updated), key=natural_key)


def _check_magnitudes(modules: Mapping[str, LoRAFactors], magnitudes: Mapping[str, np.ndarray] | None) -> None:
    for name, factors in modules.items():
        rows, _ = factors.shape
        if magnitudes is not None and (name not in magnitudes or magnitudes[name].shape != (rows,)):
            msg = f"module {name!r} of a DoRA lacks magnitudes of its {rows} rows; give those that belong to it"
            raise OutputError(msg)


def _check_settings(dtype: str, documents: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    if dtype not in get_args(FileDtype):
        raise UsageError(f"dtype {dtype!r} is unknown; use one of {', '.join(get_args(FileDtype))}")
    for name in documents:
        if Path(name).name != name or name in _WRITTEN:
            msg = f"document {name!r} cannot be written; give a plain file name other than {', '.join(_WRITTEN)}"
            raise UsageError(msg)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key == "format":
            raise UsageError(f"metadata {key!r} cannot be written; give text for a key other than 'format'")
