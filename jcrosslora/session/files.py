"""Transfers from files to files, for `jcrosslora transfer` and the jobs of a batch."""

from pathlib import Path

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.folder import find_adapter
from jcrosslora.cache import open_cache
from jcrosslora.checkpoint import open_base
from jcrosslora.distributed import hosts
from jcrosslora.lineage.pairing import parse_depth
from jcrosslora.methods import make_method
from jcrosslora.session.pair_session import PairSession, lighter, with_one_writer
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferSettings
from jcrosslora.session.transfer import given_probes, share_digests
from jcrosslora.shifting.lora_xs_span import span_rank
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
        adapter = load_adapter(
            settings.adapter, session.pair.source, revision=settings.adapter_revision, rank=settings.adapter_rank
        )
        result = session.transfer(
            adapter,
            method,
            with_one_writer(settings),
            probes=given_probes(settings.probe_text),
            profile=settings.profile,
        )
        if hosts.is_first():
            save_as(result, settings)
    return result


def open_session(settings: TransferSettings, *, progress: bool = False) -> PairSession:
    """Open both bases of a transfer, and the cache if the settings enable it."""
    source = open_base(settings.source, revision=settings.source_revision)
    target = open_base(settings.target, revision=settings.target_revision, name=settings.target_name)
    session = PairSession(source, target, store=open_cache() if settings.cache else None, progress=progress)
    share_digests(session)
    return session


def save_as(result: TransferResult, settings: TransferSettings) -> None:
    """Write a result to the folder and in the format of the settings."""
    result.save(settings.out, profile=settings.profile, dtype=settings.dtype, overwrite=settings.overwrite)
