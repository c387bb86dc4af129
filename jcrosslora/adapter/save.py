"""Write a LoRA adapter, whole or not at all, in one of several profiles."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jcrosslora.adapter.contents import Contents
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.file_factors import FileDtype
from jcrosslora.adapter.folder import CONFIG, GGUF_WEIGHTS, MLX_WEIGHTS, WEIGHTS
from jcrosslora.adapter.fused import Layout, fuse
from jcrosslora.adapter.ignored import drop_token_updates
from jcrosslora.adapter.names import ending, natural_key
from jcrosslora.adapter.records import Adapter
from jcrosslora.adapter.write_gguf import check_gguf, write_gguf
from jcrosslora.adapter.write_lora_xs import LORA_XS, write_lora_xs
from jcrosslora.adapter.write_mlx import write_mlx
from jcrosslora.adapter.write_peft import write_peft, write_portable
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.utils.files import atomic_folder, ensure_free, output_path

Profile = Literal["portable", "peft", "mlx", "gguf", "lora-xs"]
WRITERS: Mapping[str, Callable[[Contents, Path], None]] = {
    "portable": write_portable,
    "peft": write_peft,
    "mlx": write_mlx,
    "gguf": write_gguf,
    LORA_XS: write_lora_xs,
}
# Those whose readers know the magnitudes of a DoRA.
_OF_DORA = ("peft", "mlx")
# Those whose readers know no invocation tokens (aLoRA): there an adapter would always act.
_ALWAYS_ACTS = {"mlx": "MLX", LORA_XS: "LoRA-XS"}
_WRITTEN = (CONFIG, WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS)


def save_adapter(
    adapter: Adapter,
    out: str | Path,
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
    profile: Profile = "portable",
    dtype: FileDtype = "float32",
    overwrite: bool = False,
    fused: Layout | None = None,
    all_modules: Sequence[str] | None = None,
    family: str | None = None,
    heads: tuple[int, int] | None = None,
    documents: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    frozen: Mapping[str, LoRAFactors] | None = None,
    magnitudes: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write an adapter as a folder, whole or not at all. The scale is inside B in every profile.

    Args:
        adapter: at least one module; not changed. Its changes of embedding and head are written in profile "peft".
        out: the folder to make.
        base_name: `base_model_name_or_path`, the base that the adapter is for; None takes `adapter.info.base_name`.
        base_revision: its revision.
        profile: "portable" is PEFT's format with one rank (lower ranks are padded with zeros) and lora_alpha == r, the
            form that every engine reads the same way; "peft" keeps each module's rank in `rank_pattern` and
            `alpha_pattern`, which PEFT and new releases of vLLM read; "mlx" is the folder of mlx_lm; "gguf" the file
            `adapter.gguf` of llama.cpp; "lora-xs" the format of LoRA-XS, which holds the part of each update that lies
            in the span of `frozen`.
        dtype: of the tensors in the file.
        overwrite: whether an adapter folder at `out` may be replaced.
        fused: layout of the base's fused modules; updates of their parts are merged, see `fuse`.
        all_modules: names of the base's linear modules. Those that have the ending of a written module but no update
            go into `exclude_modules`, without which PEFT would expect tensors for them.
        family: of the base, e.g. "llama"; profile gguf needs it.
        heads: (query heads, key heads) of the base; profile gguf needs them.
        documents: file name to text, written into the same folder (README.md, transfer_report.json).
        metadata: pairs for the header of the weights file.
        frozen: what profile lora-xs writes each module by, from `jcrosslora.shifting.lora_xs_span.frozen_factors`.
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
    check_profile(profile, family, heads, dora=magnitudes is not None)
    check_holds(profile, adapter)
    _check_settings(dtype, documents or {}, metadata or {})
    fused = fused or {}
    modules = fuse(adapter.modules, fused)
    if not modules:
        msg = f"{out}: the adapter has no modules, at least one was wanted: nothing was written"
        raise OutputError(msg)
    _check_magnitudes(modules, magnitudes)
    contents = Contents(
        modules=dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))),
        dtype=dtype,
        base_name=base_name or adapter.info.base_name,
        base_revision=base_revision,
        exclude=tuple(_without_update(modules, all_modules, fused)),
        family=family,
        heads=heads,
        metadata=metadata or {},
        invocation=adapter.info.invocation,
        frozen=frozen,
        magnitudes=magnitudes,
        tokens=adapter.tokens,
    )
    with atomic_folder(out, overwrite) as folder:
        WRITERS[profile](contents, folder)
        for name, text in (documents or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def why_without_tokens(profile: str) -> str:
    """Why changes of the embedding and the output head are not written in a profile; "" if they are."""
    return "" if profile == "peft" else f"profile {profile} does not hold it, profile peft does"


def for_profile(adapter: Adapter, profile: str) -> Adapter:
    """The adapter as a profile holds it: what it does not hold is listed in `info.ignored`."""
    why = why_without_tokens(profile)
    return drop_token_updates(adapter, why) if why else adapter


def check_holds(profile: str, adapter: Adapter) -> None:
    """Refuse a profile that has no place for what an adapter waits for.

    Raises:
        OutputError: the adapter acts only after invocation tokens (aLoRA), which the profile does not hold.
    """
    if adapter.info.invocation is not None and profile in _ALWAYS_ACTS:
        others = ", ".join(other for other in WRITERS if other not in _ALWAYS_ACTS)
        msg = f"the adapter acts only after its invocation tokens (aLoRA), which {_ALWAYS_ACTS[profile]} does not know"
        msg += f": write it in one of the profiles {others}"
        raise OutputError(msg)


def check_profile(profile: str, family: str | None, heads: tuple[int, int] | None, *, dora: bool = False) -> None:
    """Refuse a profile that cannot be written for a base, before any work is done for it.

    Args:
        profile: see `save_adapter`.
        family: of the base, None if it is not known.
        heads: its query heads and key heads, likewise.
        dora: whether a DoRA is to be written with its magnitudes.

    Raises:
        UsageError: an unknown profile, or one that holds no magnitudes.
        OutputError: profile gguf without the gguf package, or without a base that it knows; profile lora-xs without
            a base.
    """
    if profile not in WRITERS:
        msg = f"profile {profile!r} is unknown; use one of {', '.join(WRITERS)}"
        raise UsageError(msg)
    if dora and profile not in _OF_DORA:
        msg = f"profile {profile} has no place for the magnitudes of a DoRA; use {' or '.join(_OF_DORA)}, or let it be "
        msg += "fitted (leave out --keep-dora)"
        raise UsageError(msg)
    if profile == "gguf":
        check_gguf(family, heads)
    if profile == LORA_XS and family is None:
        msg = "profile lora-xs needs the base model, whose singular vectors it is written in: name it with --base"
        raise OutputError(msg)


def _without_update(updated: Mapping[str, object], all_modules: Sequence[str] | None, fused: Layout) -> list[str]:
    owner = {part: name for name, parts in fused.items() for part, _, _ in parts}
    endings = {ending(name) for name in updated}
    every = dict.fromkeys(owner.get(name, name) for name in all_modules or ())
    return sorted((name for name in every if ending(name) in endings and name not in updated), key=natural_key)


def _check_magnitudes(modules: Mapping[str, LoRAFactors], magnitudes: Mapping[str, np.ndarray] | None) -> None:
    for name, factors in modules.items():
        rows, _ = factors.shape
        if magnitudes is not None and (name not in magnitudes or magnitudes[name].shape != (rows,)):
            msg = f"module {name!r} of a DoRA has not the magnitudes of its {rows} rows: give those that belong to it"
            raise OutputError(msg)


def _check_settings(dtype: str, documents: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    if dtype not in get_args(FileDtype):
        msg = f"dtype {dtype!r} is unknown; use one of {', '.join(get_args(FileDtype))}"
        raise UsageError(msg)
    for name in documents:
        if Path(name).name != name or name in _WRITTEN:
            msg = f"document {name!r} cannot be written: a plain file name other than {', '.join(_WRITTEN)} was wanted"
            raise UsageError(msg)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key == "format":
            msg = f"metadata {key!r} cannot be written: text for a key other than 'format' was wanted"
            raise UsageError(msg)
