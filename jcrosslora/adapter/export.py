"""Write an adapter for the same base in another profile or at other ranks; or write the sum of several adapters.

`--absorb` splits the adapter exactly in two: a LoRA of linear modules, which engines load, and a copy of the base with
everything else merged in: replaced norms, biases and matrices, new rows of the embedding or the head, and updates of
experts. A replaced linear layer (`modules_to_save`) becomes a LoRA if its change has a low enough rank.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors, ReplacedTensors
from jcrosslora.adapter.combining import add_adapters, fit_to_base, fuse, split_fused
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.folder import CARD, REPORT, public_card
from jcrosslora.adapter.kinds.dora import DORA
from jcrosslora.adapter.load import load_adapter, load_dora
from jcrosslora.adapter.merge import Merged, write_merged
from jcrosslora.adapter.origin import other_base
from jcrosslora.adapter.records import Adapter, AdapterInfo, Carried, left_out, why_idle
from jcrosslora.adapter.save import Profile, check_holds, check_profile, for_profile, save_adapter
from jcrosslora.adapter.truncation import RankRule, Truncation, check_rule, truncate_fused
from jcrosslora.checkpoint import BaseModel, describe_base, open_base
from jcrosslora.checkpoint.hub import local_names, public_json, publish
from jcrosslora.checkpoint.layout import is_loadable
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.text.completion import COMPLETIONS
from jcrosslora.utils import version
from jcrosslora.utils.files import atomic_folder, ensure_free, is_within, output_path, sync_folder
from jcrosslora.utils.settings import Settings

# Documents of a transferred adapter, which stay true when it is written in another form.
_DOCUMENTS = (CARD, REPORT, COMPLETIONS)
_EXACT = 2.0**-20  # of ||W||_F: float32 rounds W itself by up to 2^-24
_MORE = 8  # extra columns of a change's sketch beyond the rank


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
class Split:
    """An adapter in two parts.

    Attributes:
        kept: its updates of linear modules, and of experts if the base does not store them as transformers loads them.
        absorbed: the rest, for the base.
        as_lora: names of the base's tensors that the adapter replaces and `kept` holds as LoRA.
    """

    kept: Adapter
    absorbed: Adapter
    as_lora: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What moves where, one sentence each; what stays in place is left out."""
        made = (f"in the adapter: {', '.join(self.as_lora)}, as LoRA",) if self.as_lora else ()
        return (*(f"in the base: {part}" for part in left_out(self.absorbed, Carried.LINEAR, "")), *made)

    @property
    def changes_base(self) -> bool:
        """Whether anything goes into the base."""
        return bool(self.absorbed.tokens or self.absorbed.replaced or self.absorbed.experts)


def split_for_base(adapter: Adapter, base: BaseModel) -> Split:
    """Split an adapter into updates that stay in it and changes to merge into its base."""
    rank = max((factors.rank for factors in adapter.modules.values()), default=0)
    weights = {module.tensor for module in base.modules.values()} if rank else set()
    found: dict[str, LoRAFactors] = {}
    replaced: list[ReplacedTensors] = []
    for group in adapter.replaced:
        low = {
            name: _low_rank(base, name, np.asarray(group.tensors[name]), rank)
            for name in group.tensors
            if name in weights
        }
        found |= {name: factors for name, factors in low.items() if factors is not None}
        left = {name: array for name, array in group.tensors.items() if name not in found}
        replaced += [replace(group, tensors=left, share=group.share if len(left) == len(group.tensors) else None)]
    stored = {name.removesuffix(".weight"): factors for name, factors in found.items()}
    modules = {**adapter.modules, **split_fused(Adapter(stored), base.fused).modules}
    loadable = base.expert_layout is not None and is_loadable(base.expert_layout)
    of_base, of_adapter = (adapter.experts, ()) if loadable else ((), adapter.experts)
    groups = tuple(group for group in replaced if group.tensors)
    rest = Adapter(
        {}, replace(adapter.info, ignored=(), base_name=None, base_digest=None), adapter.tokens, groups, of_base
    )
    kept = replace(adapter, modules=modules, tokens=(), replaced=(), experts=of_adapter)
    return Split(kept, rest, tuple(found))


def _low_rank(base: BaseModel, name: str, new: np.ndarray, rank: int) -> LoRAFactors | None:
    """Return factors of the change of a weight; None if its rank is higher than `rank`.

    The product of the change D and random columns spans D's columns if D's rank is at most their number.
    """
    change = new.astype(np.float64) - np.asarray(base.tensor(name)).astype(np.float64)
    random = np.random.default_rng(0).normal(size=(change.shape[1], min(rank + _MORE, *change.shape)))
    q, _ = np.linalg.qr(change @ random)
    u, s, v = np.linalg.svd(q.T @ change, full_matrices=False)
    count = max(1, int(np.sum(s[:rank] > _EXACT * s[0])))
    a, b = v[:count], (q @ u[:, :count]) * s[:count]
    if np.linalg.norm(change - b @ a) > _EXACT * np.linalg.norm(new.astype(np.float64)):
        return None
    return LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32))


@dataclass(frozen=True, eq=False)
class Exported:
    """The result of an export.

    Attributes:
        adapter: as written, with fused modules merged; only s B A of a DoRA that was kept.
        sources: the provenance of each adapter that was read.
        magnitudes: of a DoRA that was kept.
        warnings: signs that an adapter belongs to another base or does nothing, one sentence each.
        split: what was merged into a copy of the base, and what stayed in the adapter.
        merged: that copy as written; None if nothing had to be merged.
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
    if settings.base is None and settings.base_revision is not None:
        raise UsageError(f"base_revision {settings.base_revision} was given without a base: give the base with --base")
    base = None if settings.base is None else open_base(settings.base, revision=settings.base_revision)
    info = None if base is None else describe_base(base, digest="")
    known = (None, None) if info is None else (info.family, info.heads)
    check_profile(settings.profile, *known, dora=settings.keep_dora)
    if settings.keep_dora:
        directions, magnitudes = load_dora(settings.adapter[0], base)
        exported = Exported(directions, None, (directions.info,), magnitudes)
    else:
        exported = _summed(settings, base)
    found = [other_base(info, base) for info in exported.sources] if base is not None else []
    if exported.magnitudes is None and (exported.split is None or not exported.split.changes_base):
        found.append(why_idle(exported.adapter))
    exported = replace(exported, warnings=tuple(sentence for sentence in found if sentence is not None))
    documents, split = _documents(settings.adapter), exported.split
    with ExitStack() as stack:
        if settings.absorb is not None and base and info and split and split.changes_base:
            out = output_path(settings.absorb)
            folder = stack.enter_context(atomic_folder(out, settings.overwrite))
            exported = replace(exported, merged=replace(write_merged(base, split.absorbed, folder), folder=out))
            sync_folder(folder)  # so that only its rename is left once the adapter is in place
            info = replace(info, name=out.name, revision=None)
            for name in (CARD, REPORT):  # which say that the adapter is of the old base
                documents.pop(name, None)
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
    """Refuse `--absorb` without a base or with `--keep-dora`, and a folder in use or nested with that of `--out`."""
    ensure_free(folder, settings.overwrite)
    if settings.base is None or settings.keep_dora:
        msg = f"--absorb {folder} needs the base, whose weights it changes, and reads no DoRA in its stored form: name "
        raise UsageError(msg + "the base with --base, and leave out --keep-dora")
    if is_within(folder, settings.out) or is_within(settings.out, folder):
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
    """Read the documents of a single adapter in a local folder, without paths in its card and report."""
    paths = [Path(refs[0]).expanduser() / name for name in _DOCUMENTS] if len(refs) == 1 else []
    found = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
    public = {CARD: public_card, REPORT: public_json}
    return {name: public[name](text) if name in public else text for name, text in found.items()}


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
