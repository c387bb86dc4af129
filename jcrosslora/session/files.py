"""Transfers from files to files, for `jcrosslora transfer` and the jobs of a batch."""

from pathlib import Path

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.adapter.folder import find_adapter
from jcrosslora.cache import open_cache
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.distributed import hosts
from jcrosslora.lineage.pairing import parse_depth
from jcrosslora.methods import make_method
from jcrosslora.session.estimate import Estimate, estimate
from jcrosslora.session.pair_session import PairSession, lighter, with_one_writer
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferSettings
from jcrosslora.session.timing import Stopwatch
from jcrosslora.session.transfer import given_probes, share_digests
from jcrosslora.shifting.truncate import span_rank
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.memory import enough_memory


def transfer_files(settings: TransferSettings, *, progress: bool = False) -> TransferResult:
    """Move an adapter from file to file. Groups of modules are aligned, used and dropped one after the other.

    If `jax.distributed` is initialised, all processes must make the same call. Each aligns its part of the modules;
    only the first checks the effect, if requested, and writes.

    Args:
        settings: what to move, where to, and how.
        progress: whether to show progress.

    Returns:
        The result; it is already written to `settings.out`.

    Raises:
        JCrossLoRAError: the input, the settings or the output folder is invalid; nothing is written.
    """
    method = make_method(settings.method)
    with hosts.together(), enough_memory(lighter(method)):
        if hosts.is_first():
            ensure_free(Path(settings.out), settings.overwrite)
        parse_depth(settings.depth)  # refused before anything is read
        span_rank(settings.profile, settings.out_rank)
        find_adapter(settings.adapter, settings.adapter_revision)  # before the bases are read for their digests
        session = open_session(settings, progress=progress)
        result = session.transfer(
            _load(settings, session),
            method,
            with_one_writer(settings),
            probes=given_probes(settings.probe_text),
            profile=settings.profile,
        )
        if hosts.is_first():
            save_as(result, settings)
    return result


def estimate_files(settings: TransferSettings, stopwatch: Stopwatch | None = None) -> Estimate:
    """Check a transfer as `transfer_files` does, and estimate what it takes; nothing is computed or written.

    Args:
        settings: what to move, where to, and how.
        stopwatch: times parts of the work on this machine.

    Raises:
        JCrossLoRAError: anything that is wrong with the input, the settings or the place to write to.
    """
    ensure_free(Path(settings.out), settings.overwrite)
    return estimate_pair(settings, stopwatch or Stopwatch(), read_adapter=True)


def estimate_pair(settings: TransferSettings, stopwatch: Stopwatch, *, read_adapter: bool = False) -> Estimate:
    """Estimate transfers between two bases. Of their weights only those are read that `auto` looks at.

    Args:
        settings: of a transfer.
        stopwatch: times parts of the work on this machine.
        read_adapter: whether to read the adapter for its modules; else it may have all that the source has.

    Raises:
        JCrossLoRAError: a file cannot be opened, or the bases, the adapter and the settings do not fit.
    """
    session = PairSession(*_open_bases(settings))
    method, sources, choice = make_method(settings.method), None, None
    if read_adapter:
        move = session.start(_load(settings, session), method, settings, settings.profile)
        method, choice, sources = move.method, move.choice, move.shifter.adapter.modules.keys()
    else:
        method, choice = session.resolve(method)
    task = session.plan(method, settings, sources)
    given = given_probes(settings.probe_text)
    prompts = 0 if given is None else len(given.texts)
    return estimate(task, settings, prompts, stopwatch, choice and choice.reason)


def _open_bases(settings: TransferSettings) -> tuple[BaseModel, BaseModel]:
    source = open_base(settings.source, revision=settings.source_revision, chat_template=settings.source_template)
    return source, open_base(
        settings.target,
        revision=settings.target_revision,
        name=settings.target_name,
        chat_template=settings.target_template,
    )


def _load(settings: TransferSettings, session: PairSession) -> Adapter:
    return load_adapter(
        settings.adapter, session.pair.source, revision=settings.adapter_revision, rank=settings.adapter_rank
    )


def open_session(settings: TransferSettings, *, progress: bool = False) -> PairSession:
    """Open both bases of a transfer, and the cache if it is to take part."""
    session = PairSession(*_open_bases(settings), store=open_cache() if settings.cache else None, progress=progress)
    share_digests(session)
    return session


def save_as(result: TransferResult, settings: TransferSettings) -> None:
    """Write a result to the folder and in the format of the settings."""
    result.save(settings.out, profile=settings.profile, dtype=settings.dtype, overwrite=settings.overwrite)
