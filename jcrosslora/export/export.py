"""Write an adapter again for the base that it has: in another profile, at other ranks, or several as their sum."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, fuse, load_adapter
from jcrosslora.adapter import save_adapter as save_plain
from jcrosslora.adapter.file_factors import FileDtype
from jcrosslora.adapter.keep_dora import load_dora
from jcrosslora.adapter.kinds.dora import DORA
from jcrosslora.adapter.save import Profile, check_holds, check_profile, for_profile
from jcrosslora.adapter.sums import add_adapters
from jcrosslora.adapter.truncation import RankRule, Truncation, check_rule, truncate_by_rule
from jcrosslora.alignment.transport import describe_base
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.errors import UsageError
from jcrosslora.shifting.lora_xs_span import Frozen, frozen_factors, project, span_rank
from jcrosslora.shifting.shift import fit_to_base
from jcrosslora.utils.files import ensure_free

# What a moved adapter's folder says of itself; it still holds where the same adapter is written in another form.
_DOCUMENTS = ("README.md", "transfer_report.json")


@dataclass(frozen=True)
class ExportSettings:
    """Everything that decides what an export writes."""

    adapter: tuple[str, ...]
    """The adapter to write again: a folder of PEFT or MLX, a GGUF file of llama.cpp, or a hub id. Several of one base
    are added up."""
    out: str
    """The folder to write."""
    profile: Profile = "portable"
    """portable: PEFT with one rank, read alike by every engine. peft: a rank for each module. mlx: the folder of MLX.
    gguf: the file of llama.cpp. lora-xs: a small matrix between the top singular vectors of each weight, --out-rank of
    them, for LoRA-XS. peft alone holds changes of the embedding and the output head, read with the base."""
    base: str | None = None
    """The base that it is for: a folder of safetensors, a GGUF file or a hub id. Profiles gguf and lora-xs need
    it; with it the adapter is also checked against it."""
    out_rank: RankRule | None = None
    """Cut every update, optimally, to this rank; or to the lowest that keeps a share of its energy, such as 0.99; or
    all (auto) to the lowest usual rank, 8, 16, 32 and so on, that keeps 99% of each. Profile lora-xs: how many singular
    vectors of each weight to take."""
    keep_dora: bool = False
    """Write a DoRA as a DoRA, with its magnitudes, and not as a fit of a lower rank; exact, in profile peft or mlx."""
    dtype: FileDtype = "float32"
    """Number format of the file."""
    base_revision: str | None = None
    """Hub revision of the base."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""


@dataclass(frozen=True, eq=False)
class Exported:
    """What was written.

    Attributes:
        adapter: with fused modules merged, as in the file; of a DoRA that was kept only its s B A.
        cut: what cutting the ranks left; None where that was not asked for.
        sources: what is known of each adapter that was read.
        magnitudes: of a DoRA that was kept; else None.
        frozen: what profile lora-xs wrote each module by; else None.
    """

    adapter: Adapter
    cut: Truncation | None
    sources: tuple[AdapterInfo, ...]
    magnitudes: Mapping[str, np.ndarray] | None = None
    frozen: Frozen | None = None

    @property
    def losses(self) -> tuple[str, ...]:
        """What reading the adapters lost, one sentence each without a full stop."""
        alone = len(self.sources) == 1 and self.sources[0].kind == DORA.name
        hint = "; --keep-dora, in profile peft or mlx, loses nothing" if alone else ""
        return tuple(f"{info.name} is {info.read_as}{hint}" for info in self.sources if info.lost)


def export_adapter(settings: ExportSettings) -> Exported:
    """Write one adapter, or the sum of several, in a profile.

    Raises:
        JCrossLoRAError: anything that is wrong with the input, the settings or the place to write to. Nothing is
            written then.
    """
    ensure_free(Path(settings.out), settings.overwrite)
    if settings.out_rank is not None:
        check_rule(settings.out_rank)
    span_rank(settings.profile, settings.out_rank)
    if settings.keep_dora:
        _check_kept(settings)
    base = None if settings.base is None else open_base(settings.base, revision=settings.base_revision)
    known = (None, None) if base is None else (base.family.name, _heads(base))
    check_profile(settings.profile, *known, dora=settings.keep_dora)
    exported = (_kept if settings.keep_dora else _summed)(settings, base)
    save_plain(
        exported.adapter,
        settings.out,
        base_name=None if base is None else base.name,
        base_revision=None if base is None else base.revision,
        profile=settings.profile,
        dtype=settings.dtype,
        overwrite=settings.overwrite,
        fused=None if base is None else base.fused,
        all_modules=None if base is None else list(base.modules),
        family=None if base is None else base.family.name,
        heads=None if base is None else _heads(base),
        documents=_documents(settings.adapter),
        metadata={"jcrosslora.version": version("jcrosslora"), "jcrosslora.export.export": _account(exported, base)},
        magnitudes=exported.magnitudes,
        frozen=exported.frozen,
    )
    return exported


def _summed(settings: ExportSettings, base: BaseModel | None) -> Exported:
    """The sum of the adapters, at the ranks that are wanted."""
    adapters = [load_adapter(ref, base) for ref in settings.adapter]
    if base is not None:
        info = describe_base(base, digest=False)
        adapters = [fit_to_base(adapter, info) for adapter in adapters]
    total = add_adapters(adapters)
    check_holds(settings.profile, total)
    # Parts of a fused matrix are written as one update of it: cut on their own, they would have a rank for each.
    total = dataclasses.replace(total, modules=fuse(total.modules, {} if base is None else base.fused))
    total = for_profile(total, settings.profile)
    sources = tuple(adapter.info for adapter in adapters)
    if (rank := span_rank(settings.profile, settings.out_rank)) is not None:
        assert base is not None  # as `check_profile` has seen
        frozen = frozen_factors(base, total.modules, rank)
        return Exported(*project(total, frozen, rank), sources, frozen=frozen)
    if settings.out_rank is not None:
        return Exported(*truncate_by_rule(total, settings.out_rank), sources)
    return Exported(total, None, sources)


def _kept(settings: ExportSettings, base: BaseModel | None) -> Exported:
    """A DoRA as it is."""
    dora = load_dora(settings.adapter[0], base)
    return Exported(dora.directions, None, (dora.directions.info,), dora.magnitudes)


def _check_kept(settings: ExportSettings) -> None:
    """Refuse what cannot be done with a DoRA as it is.

    Raises:
        UsageError: not just one adapter, or a rank to cut it to.
    """
    if len(settings.adapter) != 1:
        msg = f"{len(settings.adapter)} adapters with --keep-dora: a sum of DoRAs is no DoRA, one adapter was wanted"
        raise UsageError(msg + "; leave out --keep-dora")
    if settings.out_rank is not None:
        msg = f"out rank {settings.out_rank} with --keep-dora: a DoRA of a lower rank has other norms, and its "
        raise UsageError(msg + "magnitudes do not fit them; leave out one of the two")


def _heads(base: BaseModel) -> tuple[int, int]:
    return base.dims.heads, base.dims.kv_heads


def _documents(refs: tuple[str, ...]) -> dict[str, str]:
    """The documents of the one adapter that is written again, if they are in a folder here."""
    paths = [Path(refs[0]).expanduser() / name for name in _DOCUMENTS] if len(refs) == 1 else []
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}


def _account(exported: Exported, base: BaseModel | None) -> str:
    """From what, for which base and at which loss an adapter was written, as JSON."""
    cut = exported.cut
    made = {
        "adapters": [{"name": info.name, "digest": info.digest} for info in exported.sources],
        "base": None if base is None else base.name,
        "out_rank": None if cut is None else cut.rule,
        "kept": None if cut is None else cut.kept,
        "kept_by_module": None if cut is None else cut.shares,
    }
    return json.dumps(made)
