"""Transfers from files to files, for `jcrosslora transfer` and the jobs of a batch."""

from pathlib import Path

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.adapter.folder import find_adapter
from jcrosslora.adapter.lora_xs import span_rank
from jcrosslora.cache import open_cache
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.distill.sources.served.model import ServedModel
from jcrosslora.distill.sources.torch_model import TorchModel
from jcrosslora.distributed import hosts
from jcrosslora.methods import make_method
from jcrosslora.relation.pairing import parse_depth
from jcrosslora.session.asked import check_asked, estimate_asked, transfer_asked
from jcrosslora.session.asked_opening import AskedModel, open_asked
from jcrosslora.session.estimate import Estimate, estimate
from jcrosslora.session.pair_session import PairSession, lighter, with_one_writer
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferSettings
from jcrosslora.session.timing import Stopwatch
from jcrosslora.session.transfer import given_probes, share_digests
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.memory import enough_memory


def transfer_files(settings: TransferSettings) -> TransferResult:
    """Move an adapter from file to file. Groups of modules are aligned, used and dropped one after the other.

    If `jax.distributed` is initialised, all processes must make the same call. Each aligns its part of the modules;
    only the first checks the effect, if requested, and writes.

    Args:
        settings: what to move, where to, and how.

    Returns:
        The result; it is already written to `settings.out`.

    Raises:
        JCrossLoRAError: the input, the settings or the output folder is invalid; nothing is written.
    """
    method = make_method(settings.method)
    if (model := asked_model(settings)) is not None:
        return _ask_files(settings, model)
    with hosts.together(), enough_memory(lighter(method)):
        if hosts.is_first():
            ensure_free(Path(settings.out), settings.overwrite)
        parse_depth(settings.depth)  # refused before anything is read
        span_rank(settings.profile, settings.out_rank)
        find_adapter(settings.adapter, settings.adapter_revision)  # before the bases are read for their digests
        session = open_session(settings)
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
    if (model := asked_model(settings)) is not None:
        return _estimate_asked(settings, model)
    return estimate_pair(settings, stopwatch or Stopwatch(), read_adapter=True)


def asked_model(settings: TransferSettings) -> AskedModel | None:
    """Return the source if it is asked and not read."""
    if settings.source_url is not None and settings.source_model and settings.source_tokenizer:
        return ServedModel(
            settings.source_url,
            settings.source_model,
            settings.source_tokenizer,
            settings.source_base_model,
            settings.source_template,
            settings.source_top_logprobs,
            settings.source_requests,
        )
    if settings.source_backend == "torch":
        more = settings.source_revision, settings.source_tokenizer, settings.source_template
        return TorchModel(settings.source, *more)
    return None


def _ask_files(settings: TransferSettings, model: AskedModel) -> TransferResult:
    with enough_memory("a shorter --answer-tokens"):
        ensure_free(Path(settings.out), settings.overwrite)
        target = _open_target(settings)
        request = check_asked(target, make_method(settings.method), settings, settings.profile)
        probes = given_probes(settings.probe_text)
        store = open_cache() if settings.cache else None
        if store is not None:
            target.digest(store.digests)
        asked = open_asked(model, settings.adapter or None, revision=settings.adapter_revision, store=store)
        states = None if store is None else store.root / "fits"
        result = transfer_asked(asked, target, request, probes=probes, states=states)
        save_as(result, settings)
    return result


def _estimate_asked(settings: TransferSettings, model: AskedModel) -> Estimate:
    """Check a transfer from a source that is asked: a server is reached, and torch loads nothing yet."""
    target = _open_target(settings)
    request = check_asked(target, make_method(settings.method), settings, settings.profile)
    given_probes(settings.probe_text)  # refused here if it cannot be read
    if isinstance(model, ServedModel):
        open_asked(model)
    else:
        find_adapter(settings.adapter, settings.adapter_revision)
    with enough_memory():
        return estimate_asked(target, request)


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
    with enough_memory(lighter(method)):
        return estimate(task, settings, prompts, stopwatch, choice and choice.reason)


def _open_bases(settings: TransferSettings) -> tuple[BaseModel, BaseModel]:
    source = open_base(settings.source, revision=settings.source_revision, chat_template=settings.source_template)
    return source, _open_target(settings)


def _open_target(settings: TransferSettings) -> BaseModel:
    return open_base(
        settings.target,
        revision=settings.target_revision,
        name=settings.target_name,
        chat_template=settings.target_template,
    )


def _load(settings: TransferSettings, session: PairSession) -> Adapter:
    return load_adapter(
        settings.adapter, session.pair.source, revision=settings.adapter_revision, rank=settings.adapter_rank
    )


def open_session(settings: TransferSettings) -> PairSession:
    """Open both bases of a transfer, and the cache if it is to take part."""
    session = PairSession(*_open_bases(settings), store=open_cache() if settings.cache else None)
    share_digests(session)
    return session


def save_as(result: TransferResult, settings: TransferSettings) -> None:
    """Write a result to the folder and in the format of the settings."""
    result.save(settings.out, profile=settings.profile, dtype=settings.dtype, overwrite=settings.overwrite)
