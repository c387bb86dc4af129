"""Write a LoRA adapter in one of several profiles, atomically."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np

from jcrosslora.adapter.contents import Contents, FileDtype
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.folder import CONFIG, GGUF_WEIGHTS, MLX_WEIGHTS, WEIGHTS
from jcrosslora.adapter.fused import fuse
from jcrosslora.adapter.ignored import Carried
from jcrosslora.adapter.names import ending, natural_key
from jcrosslora.adapter.profiles import FORMATS, Profile, check_holds, check_profile, for_profile
from jcrosslora.adapter.records import Adapter
from jcrosslora.adapter.weight_targets import by_weight
from jcrosslora.checkpoint.base_info import BaseInfo
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.utils.files import atomic_folder, ensure_free, output_path

TARGET = "jcrosslora.target"  # of the header of a weights file: the base, as JSON
_WRITTEN = (CONFIG, WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS)


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
    frozen: Mapping[str, LoRAFactors] | None = None,
    magnitudes: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write an adapter as a folder, completely or not at all. The scale is folded into B in every profile.

    Args:
        adapter: at least one update; not changed. Its changes of embedding and head, its replaced tensors, and its
            updates of experts are written in profile "peft".
        out: the folder to make.
        base: what it is for; profile gguf needs it. Updates of the parts of its fused modules are merged, see `fuse`;
            its modules that have the ending of a written one but no update go into `exclude_modules`, without which
            PEFT would expect tensors for them; and the header of the weights file names it by its digest, if that is
            known. None merges nothing, and keeps the names of the adapter's own file.
        base_name: `base_model_name_or_path`; None takes the name of the base, else `adapter.info.base_name`. Of a path
            the last part is written.
        profile: "portable" is PEFT's format with one rank (lower ranks are padded with zeros) and lora_alpha == r, the
            form that every engine reads the same way; "peft" keeps each module's rank in `rank_pattern` and
            `alpha_pattern`, which not every engine reads; "mlx" is the folder of mlx_lm; "gguf" the file
            `adapter.gguf` of llama.cpp; "lora-xs" the format of LoRA-XS, which holds the part of each update that lies
            in the span of `frozen`.
        dtype: of the tensors in the file.
        overwrite: whether an adapter folder at `out` may be replaced.
        documents: file name to text, written into the same folder (README.md, transfer_report.json).
        metadata: pairs for the header of the weights file.
        frozen: the frozen factors of each module for profile lora-xs, from
            `jcrosslora.adapter.profile_ranks.frozen_factors`.
        magnitudes: float32 (O,) for each module of a DoRA that is written as one, in profile peft or mlx; `adapter`
            then holds its s B A, of the modules that the base stores.

    Returns:
        `out` as a path.

    Raises:
        OutputError: the adapter is empty, its values do not fit the dtype or its modules the profile, or the place
            cannot be written to.
        UsageError: an unknown profile or dtype, or a document or metadata entry that cannot be written.
    """
    out = output_path(out)
    ensure_free(out, overwrite)
    family, heads, fused = (None, None, {}) if base is None else (base.family, base.heads, base.fused)
    check_profile(profile, family, heads, dora=magnitudes is not None)
    check_holds(profile, adapter)
    _check_settings(dtype, documents or {}, metadata or {})
    modules = fuse(adapter.modules, fused)
    # peft wants a LoRA of something.
    held = {
        Carried.EXPERTS: adapter.experts,
        Carried.TOKENS: [one for one in adapter.tokens if one.factors is not None],
    }
    if not modules and not any(changes and kind in FORMATS[profile].carries for kind, changes in held.items()):
        left = "; ".join(for_profile(adapter, profile).info.ignored).rstrip(".")
        msg = f"{out}: the adapter has no modules{left and f' ({left})'}; nothing was written, give one with at least "
        msg += "one update that the profile holds"
        raise OutputError(msg)
    _check_magnitudes(modules, magnitudes)
    weights = by_weight(modules, family, adapter.info.config)
    contents = Contents(
        modules=dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))),
        dtype=dtype,
        base_name=public_name(base_name or (adapter.info.base_name if base is None else base.name)),
        base_revision=None if base is None else base.revision,
        prefix=adapter.info.prefix if base is None else base.prefix,
        by_weight=weights,
        exclude=() if base is None else tuple(_without_update(modules, weights, base)),
        family=family,
        heads=heads,
        has_experts=base is not None and base.has_experts,
        metadata=_target(base) | dict(metadata or {}),
        invocation=adapter.info.invocation,
        frozen=frozen,
        magnitudes=magnitudes,
        tokens=adapter.tokens,
        replaced=adapter.replaced,
        experts=adapter.experts,
    )
    with atomic_folder(out, overwrite) as folder:
        FORMATS[profile].write(contents, folder)
        for name, text in (documents or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def _target(base: BaseInfo | None) -> dict[str, str]:
    """Return what the header says of the base: nothing where its weights were not read for a digest."""
    if base is None or not base.digest:
        return {}
    return {TARGET: json.dumps({"name": public_name(base.name), "revision": base.revision, "digest": base.digest})}


def _without_update(updated: Mapping[str, object], weights: frozenset[str], base: BaseInfo) -> list[str]:
    """Names of modules that have the ending of one that is updated, and not named by its weight, but no update."""
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
        msg = f"dtype {dtype!r} is unknown; use one of {', '.join(get_args(FileDtype))}"
        raise UsageError(msg)
    for name in documents:
        if Path(name).name != name or name in _WRITTEN:
            msg = f"document {name!r} cannot be written; give a plain file name other than {', '.join(_WRITTEN)}"
            raise UsageError(msg)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key == "format":
            msg = f"metadata {key!r} cannot be written; give text for a key other than 'format'"
            raise UsageError(msg)
