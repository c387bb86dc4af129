"""The whole trip: files in, files out, with memory bounded by one group of modules."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.adapter import save_adapter as save_plain
from jcrosslora.adapter.file_factors import FileDtype
from jcrosslora.adapter.folder import find_adapter
from jcrosslora.adapter.ignored import ignored_sentence
from jcrosslora.adapter.profiles import Profile, check_holds, check_profile, for_profile, why_without_tokens
from jcrosslora.adapter.truncation import RankRule
from jcrosslora.alignment.align import Plan
from jcrosslora.alignment.transport import BaseInfo, describe_base
from jcrosslora.cache import Cache, open_cache
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.distributed import hosts
from jcrosslora.errors import CheckpointError, MethodError, ShortMemoryError, UsageError
from jcrosslora.evidence.activations import batch_probes
from jcrosslora.fit.distill import FitSettings
from jcrosslora.fit.interpolation import SHARE, check_share
from jcrosslora.lineage import Structure, find_structure
from jcrosslora.lineage.method_selection import Choice, by_maps, choose_method, why_not_run
from jcrosslora.lineage.pairing import parse_depth
from jcrosslora.methods import METHODS, Method, check_known, get_method
from jcrosslora.report.documents import card_text, recipe_of, report_json
from jcrosslora.session.second_stage import fit_behind
from jcrosslora.shifting.invocation import with_invocation
from jcrosslora.shifting.lora_xs_span import Frozen, Known, project_moved, span_rank
from jcrosslora.shifting.shift import Calibration, MovedAdapter, Shifter
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.memory import enough_memory

if TYPE_CHECKING:
    from jcrosslora.evaluate.effect import Effect
    from jcrosslora.evidence.probes import ProbeBatch, Probes

AUTO = "auto"
EffectCheck = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class TransferSettings:
    """Everything that decides what a transfer writes: the flags of the command and the keys of a recipe."""

    adapter: str
    """The adapter to move: a folder of PEFT or MLX, a GGUF file of llama.cpp, or a hub id."""
    source: str
    """The base it was trained on: a folder of safetensors, a GGUF file or a hub id."""
    target: str
    """The base it shall work on, likewise."""
    out: str
    """The folder to write."""
    method: str = "auto"
    """How to move it: a name that `jcrosslora methods` lists, or auto, which looks at the two bases."""
    rank: int | None = None
    """Truncation rank of the SVDs; 320 if not given, for interpolated-copy 8. A smaller module uses its short side."""
    depth: str = "proportional"
    """Which source layer feeds which target layer: proportional, by-name, similar, or a list such as 0,1,3,-,5."""
    calibrate: Calibration | None = None
    """Norm of each moved update: as the maps leave it (none) or as on the source (frobenius); else the method's own."""
    scale: float = 1.0
    """Multiply every moved update by this; not where an update is fitted."""
    out_rank: RankRule | None = None
    """Cut every moved update, optimally, to this rank; or to the lowest that keeps a share of its energy, such as 0.99;
    or all (auto) to the lowest usual rank, 8, 16, 32 and so on, that keeps 99% of each. Profile lora-xs: how many
    singular vectors of each weight to take."""
    adapter_rank: int | None = None
    """Read no update of the adapter at more than this rank; if not given exactly, a DoRA at twice its rank."""
    dtype: FileDtype = "float32"
    """Number format of the file."""
    profile: Profile = "portable"
    """portable: PEFT with one rank, read alike by every engine. peft: a rank for each module. mlx: the folder of MLX.
    gguf: the file of llama.cpp. lora-xs: a small matrix between the top singular vectors of each weight, --out-rank of
    them, for LoRA-XS. peft alone holds changes of the embedding and the output head."""
    seed: int = 0
    """Of everything that is drawn at random: the random control, and the texts that a base writes."""
    probe_text: str | None = None
    """Text to run both bases on, one a line or JSONL with a "text" field; without it the source base writes its own.
    Where predictions are fitted, prompts that the source answers with its adapter: a few hundred of the adapter's own
    task recover more than what the source writes."""
    probe_count: int = 288
    """How many texts the source base writes; only where the bases have to run."""
    completions: int = FitSettings.completions
    """How many prompts with answers (16 or more) the source writes with its adapter, where predictions are fitted. More
    take longer and recover more: from 400 on each hundred is a step of its own."""
    interpolation: float = SHARE
    """How much of the source interpolation to the source's weights goes with interpolated-copy: 0 is a copy, 1 all of it."""
    whitening: float = 0.0
    """Exponent of theseus' partial whitening, from 0 to 0.5."""
    effect: EffectCheck = "auto"
    """Run both bases with and without the adapter in the end: always, never, or where the method runs them anyway."""
    adapter_revision: str | None = None
    """Hub revision of the adapter."""
    source_revision: str | None = None
    """Hub revision of the source base."""
    target_revision: str | None = None
    """Hub revision of the target base."""
    target_name: str | None = None
    """What to write as the adapter's base model, where the target's own name is not the one wanted."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""
    cache: bool = True
    """Keep factors and transports in the user's cache folder, and look for them there. The result is the same."""


def transfer(settings: TransferSettings, *, progress: bool = False) -> MovedAdapter:
    """Move an adapter from file to file. Groups of modules are aligned, used and dropped one after the other.

    Where `jax.distributed` has been initialised, all processes have to call this alike. Each aligns its part of the
    modules, and the first alone checks the effect, if that is asked for, and writes.

    Args:
        settings: what to move, where to, and how.
        progress: whether to show a progress bar.

    Returns:
        The moved adapter; it is already written to `settings.out`.

    Raises:
        JCrossLoRAError: anything that is wrong with the input, the settings or the place to write to. Nothing is
            written then.
    """
    with hosts.together(), enough_memory(lighter(settings.method)):
        return _transfer(settings, progress)


def _transfer(settings: TransferSettings, progress: bool) -> MovedAdapter:
    writes = hosts.is_first()
    if writes:
        ensure_free(Path(settings.out), settings.overwrite)
    parse_depth(settings.depth)  # refused before anything is read
    check_method(settings.method)
    if settings.effect not in get_args(EffectCheck):
        msg = f"effect {settings.effect!r} is unknown; use one of {', '.join(get_args(EffectCheck))}"
        raise UsageError(msg)
    check_share(settings.interpolation)
    span_rank(settings.profile, settings.out_rank)
    find_adapter(settings.adapter, settings.adapter_revision)  # before the bases are read for their digests
    source, target, cache = open_both(settings)
    adapter = load_for(settings, source, target)
    found, choice = chosen(settings, source, target)
    if choice is not None and adapter.info.invocation is not None:
        choice = by_maps(choice)
    method = get_method(settings.method if choice is None else choice.method)
    check_move(settings, adapter, target, method)
    mover = shifter_of(settings, adapter, describe_base(source), method.name)
    plan = plan_of(settings, source, target, method.name, mover.adapter.modules.keys(), cache, found)
    # After all else has been checked: writing texts takes a minute.
    plan.probes = probes_of(settings, source, plan, progress)
    for group in plan.groups(progress=progress):
        mover.add(group)
    batches: list[ProbeBatch] = []
    if method.then == "residual":
        plan.probes, batches = batch_probes(source, target, plan.probes, seed=settings.seed, progress=progress)
    moved, completions = fit_behind(
        method,
        source,
        target,
        mover.adapter,
        mover.finish(plan.transport(()), (source, target)),
        prompts=plan.probes.texts if plan.probes is not None and plan.probes.path is not None else (),
        batches=batches,
        completions=settings.completions,
        interpolation=settings.interpolation,
        seed=settings.seed,
        progress=progress,
    )
    moved, frozen = in_span(settings, target, moved)
    if not writes:
        settings = dataclasses.replace(settings, effect="never")
    moved = with_account(settings, source, target, mover.adapter, moved, choice, plan.probes, completions, progress)
    if writes:
        write_moved(settings, moved, frozen)
    return moved


def write_moved(settings: TransferSettings, moved: MovedAdapter, frozen: Frozen | None) -> None:
    """Write what `in_span` and `with_account` have made of a moved adapter where and as the settings say."""
    save_adapter(
        moved,
        settings.out,
        dtype=settings.dtype,
        profile=settings.profile,
        overwrite=settings.overwrite,
        frozen=frozen,
    )


def open_both(settings: TransferSettings) -> tuple[BaseModel, BaseModel, Cache | None]:
    """The bases of a transfer, and the cache if it is to take part; with one, digests known to it are not made anew."""
    source = open_base(settings.source, revision=settings.source_revision)
    target = open_base(settings.target, revision=settings.target_revision, name=settings.target_name)
    cache = open_cache() if settings.cache else None
    digests = hosts.shared(None if cache is None else cache.digests)
    if digests is not None:
        for base in (source, target):
            base.digest(digests)
    return source, target, cache


def load_for(settings: TransferSettings, source: BaseModel, target: BaseModel) -> Adapter:
    """The adapter of a transfer: read with its base, and its invocation, if it has one, in the target's tokens."""
    adapter = load_adapter(settings.adapter, source, revision=settings.adapter_revision, rank=settings.adapter_rank)
    return with_invocation(adapter, source, target)


def chosen(
    settings: TransferSettings, source: BaseModel, target: BaseModel
) -> tuple[tuple[Structure | None, str] | None, Choice | None]:
    """With method auto, the structure that the two bases share and what to do about it; else nothing."""
    if settings.method != AUTO:
        return None, None
    found = find_structure(source, target)
    return found, choose_method(source, target, found)


def check_method(name: str) -> None:
    """Refuse what is neither a method nor auto.

    Raises:
        MethodError: so it is.
    """
    check_known(name, (AUTO, *METHODS))


def lighter(method: str) -> str:
    """What to use where memory is short and `method` may run the bases; nothing where it does not."""
    if method in METHODS and not METHODS[method].runs_bases:
        return ""
    return "a method that looks at weights alone, such as cross-lora, which holds a group of modules at a time"


def check_move(settings: TransferSettings, adapter: Adapter, target: BaseModel, method: Method) -> None:
    """Refuse what cannot be written in the end, and to run a base with an adapter that waits for its invocation.

    Raises:
        UsageError: an unknown profile.
        OutputError: a profile that cannot hold the adapter, or cannot be written for the target.
        MethodError: the adapter is an aLoRA, and the method, or the check of the effect, runs the bases with it.
    """
    check_profile(settings.profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
    check_holds(settings.profile, adapter)
    if adapter.info.invocation is None:
        return
    if method.fits:
        msg = f"method {method.name} runs the source with its adapter, but {adapter.info.name} acts only after its "
        msg += "invocation tokens; name another method, such as cross-lora"
        raise MethodError(msg)
    if settings.effect == "always":
        msg = f"the effect of {adapter.info.name} cannot be measured, since it acts only after its invocation tokens"
        raise MethodError(msg + "; leave out --effect always")


def shifter_of(settings: TransferSettings, adapter: Adapter, source: BaseInfo, method: str) -> Shifter:
    """What moves an adapter as the settings say; checks that it fits the base."""
    if get_method(method).preserves_residual_basis:
        adapter = for_profile(adapter, settings.profile)
    # Into the span of singular vectors an update is projected whole.
    out_rank = None if span_rank(settings.profile, settings.out_rank) else settings.out_rank
    return Shifter(
        adapter, source, method=method, calibrate=settings.calibrate, scale=settings.scale, out_rank=out_rank
    )


def in_span(
    settings: TransferSettings, target: BaseModel, moved: MovedAdapter, known: Known | None = None
) -> tuple[MovedAdapter, Frozen | None]:
    """What profile lora-xs can hold of a moved adapter, and the factors that it is written by; any other leaves it.

    `known` are the factors of earlier adapters for this target, see `frozen_factors`.
    """
    rank = span_rank(settings.profile, settings.out_rank)
    return (moved, None) if rank is None else project_moved(moved, target, rank, known)


def plan_of(
    settings: TransferSettings,
    source: BaseModel,
    target: BaseModel,
    method: str,
    sources: Collection[str],
    cache: Cache | None,
    found: tuple[Structure | None, str] | None = None,
) -> Plan:
    """The alignment that the settings ask for, of the modules that adapters have; `found` as `chosen` gives it."""
    return Plan(
        source,
        target,
        method=method,
        rank=settings.rank,
        depth=parse_depth(settings.depth),
        seed=settings.seed,
        sources=sources,
        whitening=settings.whitening,
        cache=cache,
        found=found,
    )


def with_account(
    settings: TransferSettings,
    source: BaseModel,
    target: BaseModel,
    original: Adapter,
    moved: MovedAdapter,
    choice: Choice | None,
    probes: "Probes | None",
    completions: Sequence[str] = (),
    progress: bool = False,
) -> MovedAdapter:
    """The moved adapter with the reason for its method, and its effect where that is wanted, in its report."""
    assert moved.report is not None
    runs_bases = get_method(moved.report.recipe.method).runs_bases
    # An adapter for answers hardly shows in text of another kind, so completions come first.
    texts = () if probes is None else probes.texts, completions
    warnings = moved.report.warnings
    if probes is None and settings.probe_text is not None:
        method = moved.report.recipe.method
        warnings += (f"the text of {settings.probe_text} was not read: method {method} asks for none",)
    try:
        with enough_memory("leave out the check with --effect never"):
            effect = _effect(settings, source, target, (original, moved), texts, runs_bases, progress)
    # Of the texts, or of memory: what was moved is not lost for a figure that was not asked for.
    except (UsageError, ShortMemoryError) as error:
        if settings.effect == "always":
            raise
        effect, warnings = None, (*warnings, f"the effect was not measured: {error}")
    if original.tokens and (runs_bases or effect is not None):
        warnings += ("where the bases were run, it was without the changes of the embedding and the output head",)
    report = dataclasses.replace(moved.report, choice=choice and choice.reason, effect=effect, warnings=warnings)
    return dataclasses.replace(moved, report=report)


def probes_of(settings: TransferSettings, source: BaseModel, plan: Plan, progress: bool) -> "Probes | None":
    """The texts that a plan needs: those of the user's file, or what the source writes; None where it needs none."""
    if not plan.runs_bases:
        return None
    from jcrosslora.evidence.probes import Probes, read_texts, written_probes

    if settings.probe_text is not None:
        texts = tuple(read_texts(settings.probe_text))
        return Probes(texts, f"read from {settings.probe_text}", path=settings.probe_text)
    if plan.method.then == "predictions" and not plan.reads_probes:
        return None  # completions are written instead, with the adapter
    return written_probes(source, settings.probe_count, seed=settings.seed, progress=progress)


def _effect(
    settings: TransferSettings,
    source: BaseModel,
    target: BaseModel,
    adapters: tuple[Adapter, Adapter],
    texts: tuple[Sequence[str], Sequence[str]],
    runs_bases: bool,
    progress: bool,
) -> "Effect | None":
    """What the original and the moved adapter change, or None where it is not wanted or cannot be measured.

    Measured on the completions (the second of `texts`) if there are any, else on the probes and on new text that the
    source writes with the adapter.
    """
    if settings.effect == "never" or (settings.effect == "auto" and not runs_bases):
        return None
    # A method that runs the bases has shown by now that they can be run.
    if not runs_bases and (obstacle := why_not_run(source, target)) is not None:
        msg = f"the effect cannot be measured: {obstacle}; leave out --effect always"
        raise CheckpointError(msg)
    from jcrosslora.evaluate.effect_check import adapter_texts, check_effect

    original, moved = adapters
    probes, completions = texts
    if completions:
        return check_effect(source, target, original, moved, (), written=completions, progress=progress)
    written = adapter_texts(source, original, seed=settings.seed, progress=progress)
    if not probes and not written:
        return None
    return check_effect(source, target, original, moved, probes, written=written, progress=progress)


def save_adapter(
    adapter: Adapter,
    out: str | Path,
    *,
    base: BaseModel | None = None,
    base_name: str | None = None,
    profile: Profile = "portable",
    dtype: FileDtype = "float32",
    overwrite: bool = False,
    frozen: Frozen | None = None,
) -> Path:
    """Write an adapter as a folder; a moved one with its model card and `transfer_report.json`.

    Args:
        adapter: what to write. Its changes of embedding and head are written in profile "peft" alone.
        out: the folder; it appears whole or not at all.
        base: the base that it is for. A moved adapter knows its own; of others profiles gguf and lora-xs need it.
        base_name: `base_model_name_or_path`; None is the base that the adapter is for.
        profile: "portable" is PEFT's format with every module padded to one rank, and alpha equal to it, which all
            engines read alike; "peft" keeps a rank for each module in patterns; "mlx" is the folder of mlx_lm, and
            "gguf" the file `adapter.gguf` of llama.cpp; "lora-xs" holds the part of each update in the span of
            `frozen`.
        dtype: number format of the file.
        overwrite: whether an adapter already there may be replaced.
        frozen: for profile lora-xs, from `jcrosslora.shifting.lora_xs_span.frozen_factors`.

    Returns:
        The folder.

    Raises:
        OutputError: the place exists, cannot be written to or is full, or the numbers do not fit the format.
    """
    extra: dict[str, Any] = {}
    if isinstance(adapter, MovedAdapter) and adapter.report and adapter.target:
        adapter = _written(adapter, profile)
        assert adapter.report is not None
        assert adapter.target is not None
        report, target = adapter.report, adapter.target
        recipe = recipe_of(report, out=Path(out).name, profile=profile, dtype=dtype)
        extra = {
            "fused": target.fused,
            "all_modules": list(target.shapes),
            "family": target.family,
            "heads": target.heads,
            "documents": {
                "README.md": card_text(report, recipe, profile),
                "transfer_report.json": report_json(report, recipe),
            },
            "metadata": _metadata(report.to_json()),
        }
        base_name = base_name or target.name
    elif base is not None:
        extra = {
            "fused": base.fused,
            "all_modules": list(base.modules),
            "family": base.family.name,
            "heads": (base.dims.heads, base.dims.kv_heads),
        }
        base_name = base_name or base.name
    return save_plain(
        adapter,
        out,
        base_name=base_name or adapter.info.base_name,
        profile=profile,
        dtype=dtype,
        overwrite=overwrite,
        frozen=frozen,
        **extra,
    )


def _written(moved: MovedAdapter, profile: str) -> MovedAdapter:
    """The adapter and its report as a profile holds them."""
    why = why_without_tokens(profile)
    if not moved.tokens or not why:
        return moved
    assert moved.report is not None
    left = [ignored_sentence(row.sort, row.modules, row.share, why) for row in moved.report.tokens]
    warnings = (*moved.report.warnings, *(f"not written: {text}" for text in left))
    report = dataclasses.replace(moved.report, tokens=(), warnings=warnings)
    return dataclasses.replace(moved, tokens=(), report=report)


def _metadata(report: Mapping[str, Any]) -> dict[str, str]:
    """Provenance for the header of the safetensors file, which holds strings only."""
    return {
        "jcrosslora.version": report["version"],
        "jcrosslora.recipe": json.dumps(report["recipe"]),
        "jcrosslora.source": json.dumps(report["source"]),
        "jcrosslora.target": json.dumps(report["target"]),
        "jcrosslora.adapter": json.dumps(report["adapter"]),
    }
