"""Write an adapter again for the base that it has: in another profile, at other ranks, or several as their sum."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jcrosslora.adapter import Adapter, fuse, load_adapter
from jcrosslora.adapter import save_adapter as save_plain
from jcrosslora.adapter.portable import FileDtype
from jcrosslora.adapter.save import Profile, check_profile, for_profile
from jcrosslora.adapter.sums import add_adapters
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.files import ensure_free
from jcrosslora.lora_shift import fit_to_base
from jcrosslora.rank_cut import RankCut, RankRule, check_rule, cut_and_tell
from jcrosslora.transport import describe_base

# What a moved adapter's folder says of itself; it still holds where the same adapter is written in another form.
_DOCUMENTS = ("README.md", "transfer_report.json")


@dataclass(frozen=True)
class ExportSettings:
    """Everything that decides what an export writes."""

    adapter: tuple[str, ...]
    """The adapter to write again: a PEFT folder or a hub id. Several of one base are added up."""
    out: str
    """The folder to write."""
    profile: Profile = "portable"
    """portable: PEFT with one rank, read alike by every engine. peft: a rank for each module. mlx: the folder of MLX.
    gguf: the file of llama.cpp. peft alone holds changes of the embedding and the output head, read with the base."""
    base: str | None = None
    """The base that it is for: a folder of safetensors, a GGUF file or a hub id. Profile gguf needs it; with it the
    adapter is also checked against it."""
    out_rank: RankRule | None = None
    """Cut every update, optimally, to this rank; or to the lowest that keeps a share of its energy, such as 0.99; or
    all (auto) to the lowest usual rank, 8, 16, 32 and so on, that keeps 99% of each."""
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
        adapter: with fused modules merged, as in the file.
        cut: what cutting the ranks left; None where that was not asked for.
    """

    adapter: Adapter
    cut: RankCut | None


def export_adapter(settings: ExportSettings) -> Exported:
    """Write one adapter, or the sum of several, in a profile.

    Raises:
        JCrossLoRAError: anything that is wrong with the input, the settings or the place to write to. Nothing is
            written then.
    """
    ensure_free(Path(settings.out), settings.overwrite)
    if settings.out_rank is not None:
        check_rule(settings.out_rank)
    base = None if settings.base is None else open_base(settings.base, revision=settings.base_revision)
    check_profile(settings.profile, *(None, None) if base is None else (base.family.name, _heads(base)))
    adapters = [load_adapter(ref, base) for ref in settings.adapter]
    if base is not None:
        info = describe_base(base, digest=False)
        adapters = [fit_to_base(adapter, info) for adapter in adapters]
    total = add_adapters(adapters)
    # Parts of a fused matrix are written as one update of it: cut on their own, they would have a rank for each.
    total = dataclasses.replace(total, modules=fuse(total.modules, {} if base is None else base.fused))
    total = for_profile(total, settings.profile)
    cut = None
    if settings.out_rank is not None:
        total, cut = cut_and_tell(total, settings.out_rank)
    save_plain(
        total,
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
        metadata={"jcrosslora.version": version("jcrosslora"), "jcrosslora.export": _account(adapters, base, cut)},
    )
    return Exported(total, cut)


def _heads(base: BaseModel) -> tuple[int, int]:
    return base.dims.heads, base.dims.kv_heads


def _documents(refs: tuple[str, ...]) -> dict[str, str]:
    """The documents of the one adapter that is written again, if they are in a folder here."""
    paths = [Path(refs[0]).expanduser() / name for name in _DOCUMENTS] if len(refs) == 1 else []
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}


def _account(adapters: list[Adapter], base: BaseModel | None, cut: RankCut | None) -> str:
    """From what, for which base and at which loss an adapter was written, as JSON."""
    made = {
        "adapters": [{"name": each.info.name, "digest": each.info.digest} for each in adapters],
        "base": None if base is None else base.name,
        "out_rank": None if cut is None else cut.rule,
        "kept": None if cut is None else cut.kept,
    }
    return json.dumps(made)
