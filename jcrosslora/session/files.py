"""Transfers from files to files, for `jcrosslora transfer` and the jobs of a batch."""

from pathlib import Path

from jcrosslora.adapter.folder import find_adapter
from jcrosslora.adapter.lora_xs import span_rank
from jcrosslora.cache import open_cache
from jcrosslora.checkpoint import open_base
from jcrosslora.distill.sources import ServedModel, TorchModel
from jcrosslora.distributed import hosts
from jcrosslora.methods import make_method
from jcrosslora.relation.pairing import parse_depth
from jcrosslora.session.estimate import Estimate
from jcrosslora.session.pair_session import PairSession, lighter, with_one_writer
from jcrosslora.session.queried import QueriedModel, QueriedSession
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferSettings
from jcrosslora.session.timing import Stopwatch
from jcrosslora.session.transfer import given_probes, open_session
from jcrosslora.utils.cost import enough_memory
from jcrosslora.utils.files import ensure_free


def transfer_files(settings: TransferSettings) -> TransferResult:
    """Move an adapter from file to file. Groups of modules are aligned, used and dropped one after the other.

    If `jax.distributed` is initialised, all processes must make the same call. Each aligns its part of the modules;
    only the first checks the effect, if requested, and writes.

    Returns:
        The result; it is already written to `settings.out`.

    Raises:
        JCrossLoRAError: the input, the settings or the output folder is invalid; nothing is written.
    """
    method = make_method(settings.method)
    with hosts.together(), enough_memory(lighter(method, queried_model(settings))):
        if hosts.is_first():
            ensure_free(Path(settings.out), settings.overwrite)
        parse_depth(settings.depth)  # refused before anything is read
        span_rank(settings.profile, settings.out_rank)
        if settings.adapter:  # a server has its own
            find_adapter(settings.adapter, settings.adapter_revision)  # before the bases are read for their digests
        session = session_of(settings)
        result = session.transfer(
            session.load(settings.adapter, revision=settings.adapter_revision, rank=settings.adapter_rank),
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

    Raises:
        JCrossLoRAError: the input, the settings or the output folder is invalid.
    """
    ensure_free(Path(settings.out), settings.overwrite)
    return estimate_pair(settings, stopwatch or Stopwatch(), read_adapter=True)


def estimate_pair(settings: TransferSettings, stopwatch: Stopwatch, *, read_adapter: bool = False) -> Estimate:
    """Estimate transfers between two bases. Of their weights only those are read that `auto` looks at.

    Without `read_adapter` the adapter is taken to have all modules of the source.

    Raises:
        JCrossLoRAError: a file cannot be opened, or the bases, the adapter and the settings do not fit.
    """
    session, method = session_of(settings, store=False), make_method(settings.method)
    rank, revision = settings.adapter_rank, settings.adapter_revision
    adapter = session.load(settings.adapter, revision=revision, rank=rank) if read_adapter else None
    given = given_probes(settings.probe_text)
    prompts = 0 if given is None else len(given.texts)
    with enough_memory(lighter(method, queried_model(settings))):
        return session.estimate(adapter, method, settings, prompts, stopwatch)


def queried_model(settings: TransferSettings) -> QueriedModel | None:
    """Return the source if it can only be queried."""
    if settings.source_url is not None and settings.source_model and settings.source_tokenizer:
        named = settings.source_url, settings.source_model, settings.source_tokenizer, settings.source_base_model
        return ServedModel(*named, settings.source_template, settings.source_top_logprobs, settings.source_requests)
    if settings.source_backend == "torch":
        more = settings.source_revision, settings.source_tokenizer, settings.source_template
        return TorchModel(settings.source, *more)
    return None


def session_of(settings: TransferSettings, *, store: bool = True) -> PairSession | QueriedSession:
    """Open both bases of a transfer, and the cache if the settings and `store` have it take part."""
    model = queried_model(settings)
    source = model or open_base(
        settings.source, revision=settings.source_revision, chat_template=settings.source_template
    )
    target = open_base(
        settings.target,
        revision=settings.target_revision,
        name=settings.target_name,
        chat_template=settings.target_template,
    )
    return open_session(source, target, open_cache() if settings.cache and store else None)


def save_as(result: TransferResult, settings: TransferSettings) -> None:
    """Write a result to the folder and in the format of the settings."""
    result.save(settings.out, profile=settings.profile, dtype=settings.dtype, overwrite=settings.overwrite)
