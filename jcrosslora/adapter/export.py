"""Write an adapter in another profile, at other ranks, or the sum of several adapters, for the same base."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jcrosslora.adapter.absorb import Split, split_for_base
from jcrosslora.adapter.combining import add_adapters
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.folder import CARD
from jcrosslora.adapter.fused import fit_to_base, fuse
from jcrosslora.adapter.kinds.dora import DORA
from jcrosslora.adapter.load import load_adapter, load_dora
from jcrosslora.adapter.merge import Merged, write_merged
from jcrosslora.adapter.origin import other_base
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.save import Profile, check_holds, check_profile, for_profile, save_adapter
from jcrosslora.adapter.truncation import RankRule, Truncation, check_rule, truncate_fused
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.base import describe_base
from jcrosslora.checkpoint.hub import local_names, publish
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.text.completion import COMPLETIONS
from jcrosslora.utils import version
from jcrosslora.utils.files import atomic_folder, ensure_free, output_path
from jcrosslora.utils.settings import Settings

# Documents of a transferred adapter, which stay true when it is written in another form.
_DOCUMENTS = (CARD, "transfer_report.json", COMPLETIONS)


@dataclass(frozen=True)
class ExportSettings(Settings):
    """The settings of an export."""

    adapter: tuple[str, ...]
    """The adapter: a folder of PEFT or MLX, a GGUF file of llama.cpp, an Orbax checkpoint of tunix, or a hub id.
    Several adapters of one base are added up."""
    out: str
    """The folder to write."""
    profile: Profile = "portable"
    """portable: PEFT with one rank, which every engine reads the same way. peft: a rank for each module. mlx: the
    folder of MLX. gguf: the file of llama.cpp. tunix: an Orbax checkpoint with LoRA of qwix. Only peft
    holds changes of the embedding and the output head, trained biases, norms and whole layers, which are read with the
    base."""
    base: str | None = None
    """Its base: a folder of safetensors, a GGUF file or a hub id. Profiles gguf and tunix need it; the
    adapter is checked against it."""
    out_rank: RankRule | None = None
    """Truncate every update optimally: to this rank; or to the lowest rank that keeps a share of its energy, such as
    0.99; or (auto) all to the lowest usual rank, 8, 16, 32 and so on, that keeps 99% of each."""
    absorb: str | None = None
    """A second folder, for the base with all changes in its weights that are no LoRA of linear modules: trained norms,
    biases, whole layers, embedding, head, experts. The adapter is then one of this base. Needs --base."""
    keep_dora: bool = False
    """Write a DoRA with its magnitudes instead of a fit of a lower rank; exact, in profile peft or mlx."""
    alpha: float | None = None
    """Alpha of the training of an Orbax checkpoint, where no lora_config.json in its folder states it."""
    dtype: FileDtype = "float32"
    """Number format of the file."""
    base_revision: str | None = None
    """Hub revision of the base."""
    overwrite: bool = False
    """Replace the folder if it holds an adapter."""


@dataclass(frozen=True, eq=False)
class Exported:
    """The result of an export.

    Attributes:
        adapter: as written, with fused modules merged; only s B A of a DoRA that was kept.
        sources: the provenance of each adapter that was read.
        magnitudes: of a DoRA that was kept.
        warnings: what tells that an adapter is of another base than the one given, one sentence each.
        split: what went into a base of its own, and what into the adapter.
        merged: that base as written; None if nothing had to go into it.
    """

    adapter: Adapter
    truncation: Truncation | None
    sources: tuple[AdapterInfo, ...]
    magnitudes: Mapping[str, np.ndarray] | None = None
    warnings: tuple[str, ...] = ()
    split: Split | None = None
    merged: Merged | None = None

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses in reading the adapters, one sentence each without a full stop."""
        alone = len(self.sources) == 1 and self.sources[0].kind == DORA.name
        hint = "; --keep-dora, in profile peft or mlx, loses nothing" if alone else ""
        return tuple(f"{info.name} is {info.read_as}{hint}" for info in self.sources if info.lost)


def export_adapter(settings: ExportSettings) -> Exported:
    """Write one adapter, or the sum of several, in a profile.

    Raises:
        JCrossLoRAError: an error in the input, the settings or the output folder. Nothing is written.
    """
    ensure_free(Path(settings.out), settings.overwrite)
    if settings.out_rank is not None:
        check_rule(settings.out_rank)
    if settings.keep_dora:
        _check_kept(settings)
    if settings.absorb is not None:
        _check_absorbing(settings, settings.absorb)
    base = None if settings.base is None else open_base(settings.base, revision=settings.base_revision)
    info = None if base is None else describe_base(base, digest="")
    known = (None, None) if info is None else (info.family, info.heads)
    check_profile(settings.profile, *known, dora=settings.keep_dora)
    if settings.keep_dora:
        dora = load_dora(settings.adapter[0], base)
        exported = Exported(dora.directions, None, (dora.directions.info,), dora.magnitudes)
    else:
        exported = _summed(settings, base)
    if base is not None:
        found = (other_base(info, base) for info in exported.sources)
        exported = replace(exported, warnings=tuple(sentence for sentence in found if sentence is not None))
    documents, split = _documents(settings.adapter), exported.split
    with ExitStack() as stack:
        if settings.absorb is not None and base and info and split and split.changes_base:
            out = output_path(settings.absorb)
            folder = stack.enter_context(atomic_folder(out, settings.overwrite))
            exported = replace(exported, merged=replace(write_merged(base, split.absorbed, folder), folder=out))
            info = replace(info, name=out.name, revision=None)
            documents.pop(CARD, None)  # it says which base to load the adapter on
        save_adapter(
            exported.adapter,
            settings.out,
            base=info,
            profile=settings.profile,
            dtype=settings.dtype,
            overwrite=settings.overwrite,
            documents=documents,
            metadata={"jcrosslora.version": version(), "jcrosslora.export": _account(exported, base)},
            magnitudes=exported.magnitudes,
        )
    return exported


def _summed(settings: ExportSettings, base: BaseModel | None) -> Exported:
    """Add the adapters and truncate the sum to the ranks of the settings."""
    adapters = [load_adapter(ref, base, alpha=settings.alpha, replaced=True) for ref in settings.adapter]
    if base is not None:
        info = describe_base(base, digest="")
        adapters = [fit_to_base(adapter, info) for adapter in adapters]
    total = add_adapters(adapters)
    check_holds(settings.profile, total)
    split = None if settings.absorb is None or base is None else split_for_base(total, base)
    if split is not None and not split.kept.modules and not split.kept.experts:
        msg = f"{total.info.name}: all its changes go into the base, and no update is left for an adapter: write one "
        raise OutputError(msg + "model with `jcrosslora merge`")
    total = for_profile(total if split is None else split.kept, settings.profile)
    sources = tuple(adapter.info for adapter in adapters)
    if not total.modules:  # changes of the embedding and the head have no rank to truncate
        return Exported(total, None, sources, split=split)
    fused = {} if base is None else base.fused
    cut, truncation = truncate_fused(total, fused, settings.out_rank)
    return Exported(replace(cut, modules=fuse(cut.modules, fused)), truncation, sources, split=split)


def _check_absorbing(settings: ExportSettings, folder: str) -> None:
    """Refuse a base's folder that is not apart from the adapter's, and settings that read no other changes."""
    ensure_free(folder, settings.overwrite)
    if settings.base is None or settings.keep_dora:
        msg = f"--absorb {folder} needs the base, whose weights it changes, and reads no DoRA in its stored form: name "
        raise UsageError(msg + "the base with --base, and leave out --keep-dora")
    base, adapter = (output_path(path).absolute() for path in (folder, settings.out))
    if base == adapter or base in adapter.parents or adapter in base.parents:
        msg = f"--absorb {folder} and --out {settings.out} lie in one another: give the base a folder next to the "
        raise UsageError(msg + "adapter's")


def _check_kept(settings: ExportSettings) -> None:
    """Refuse several adapters, or a rank to truncate to, for a DoRA in its stored form."""
    if len(settings.adapter) != 1:
        msg = f"{len(settings.adapter)} adapters with --keep-dora: a sum of DoRAs is not a DoRA; give one adapter"
        raise UsageError(msg + ", or leave out --keep-dora")
    if settings.out_rank is not None:
        msg = f"out rank {settings.out_rank} with --keep-dora: a DoRA of a lower rank has other norms, and its "
        raise UsageError(msg + "magnitudes do not fit them; leave out one of the two")


def _documents(refs: tuple[str, ...]) -> dict[str, str]:
    """Read the documents of a single adapter in a local folder."""
    paths = [Path(refs[0]).expanduser() / name for name in _DOCUMENTS] if len(refs) == 1 else []
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}


def _account(exported: Exported, base: BaseModel | None) -> str:
    """Return the provenance of the written adapter as JSON without local paths: sources, base and loss."""
    cut = exported.truncation
    made = {
        "adapters": [{"name": info.name, "digest": info.digest} for info in exported.sources],
        "base": None if base is None else base.name,
        "out_rank": None if cut is None else cut.rule,
        "kept": None if cut is None else cut.kept,
        "kept_by_module": None if cut is None else cut.shares,
        "lost": exported.losses,
        "absorbed": () if exported.split is None else exported.split.sentences,
        "not_written": exported.adapter.info.ignored,
    }
    named = [] if base is None else [base.name, base.ref]
    return json.dumps(publish(made, local_names(*(info.name for info in exported.sources), *named)))
