"""`jcrosslora.transfer` does a whole transfer; `align` and `shift` are its two steps (arXiv 2508.05232)."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jcrosslora.adapter import Adapter, find_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.distill.sources import ServedModel, TorchModel
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.evaluate.examples import as_completion, parse_examples, read_examples, read_prompts
from jcrosslora.evaluate.probes import Probes
from jcrosslora.maps.align import align_groups
from jcrosslora.maps.planning import plan_between, with_text
from jcrosslora.maps.record import transport_of
from jcrosslora.maps.transport import Transport
from jcrosslora.methods import AUTO, MethodLike, make_method
from jcrosslora.relation import parse_depth
from jcrosslora.relation.pairing import Depth
from jcrosslora.report.documents import with_settings
from jcrosslora.session.estimate import Estimate
from jcrosslora.session.job import Job
from jcrosslora.session.result import TransferResult
from jcrosslora.session.session import QueriedModel, Session, out_of_memory_advice
from jcrosslora.session.settings import TransferOptions, TransferSettings, make_options
from jcrosslora.text import Message, Prompt
from jcrosslora.text.completion import parse_prompt
from jcrosslora.utils.cache import Cache, open_cache
from jcrosslora.utils.cost import check_devices, enough_memory
from jcrosslora.utils.files import ensure_free


def transfer(
    adapter: Adapter | str | Path | Any,
    source: BaseModel | ServedModel | TorchModel | str | Path | Any,
    target: BaseModel | str | Path | Any,
    method: MethodLike = AUTO,
    *,
    prompts: Sequence[Any] | str | Path | None = None,
    examples: Sequence[Any] | str | Path | None = None,
    alpha: float | None = None,
    cache: bool = True,
    **options: Any,
) -> TransferResult:
    """Move an adapter from the base it was trained on to another base. Nothing is written.

    Args:
        adapter: a path, a hub id, or an adapter in memory, see `load_adapter`; None for a served source.
        source: the base it was trained on: a path, a hub id, or a base in memory, see `open_base`; or a source that can
            only be queried: a `ServedModel`, or a `TorchModel` for classes that only transformers knows.
        target: the base to move it to, a path, a hub id, or a base in memory.
        method: a name ("auto", "distill", "cross-lora"), or a method object with its hyper-parameters, such as
            `methods.Distill(completions=600)`.
        prompts: text that both bases are run on, as a file (see `--prompts`) or as a list of texts and of
            conversations, each a list of {"role", "content"}.
            For a fit, prompts of the adapter's task recover more than those that the source writes.
        examples: prompts with answers that you know to be right, as a file (see `--examples`) or as a list of
            {"prompt", "answer"} and {"messages"}. They are taught as they are; the source answers other prompts. Only
            for methods that fit an update to answers, of which "auto" then takes one.
        alpha: the training's alpha, for LoRA of a JAX trainer whose files do not contain it, see `load_adapter`.
        cache: whether to use the user's cache folder for factors and transports.
        options: fields of `TransferOptions`: depth, calibrate, scale, out_rank, seed, probe_count, effect, divide.

    Returns:
        The adapter for the target with its report.

    Raises:
        JCrossLoRAError: the input or the options are invalid, see its subclasses.
    """
    wanted, chosen = make_method(method), make_options(options)
    with enough_memory(out_of_memory_advice(wanted, source)):
        session = open_session(source, target, open_cache() if cache else None)
        job = Job(adapter, wanted, chosen, given_probes(prompts, examples), alpha=alpha)
        return session.transfer(job)


def align(
    source: BaseModel | str | Path | Any,
    target: BaseModel | str | Path | Any,
    method: MethodLike = AUTO,
    *,
    depth: Depth = "proportional",
    seed: int = 0,
    sources: Collection[str] | None = None,
    probes: Probes | None = None,
    cache: Cache | None = None,
) -> Transport:
    """Compute the maps from `source` to `target`, as a transport on the default devices (LoRA-Align).

    Args:
        source: the base that adapters come from, opened, or what `open_base` opens.
        target: the base that they go to, given in the same way.
        method: a name, or a method object with its hyper-parameters, such as `methods.CrossLoRA(svd_rank=64)`; "auto"
            chooses by the weights of both bases. A method that fits an update has no maps: its fit is run by `shift`,
            adapter by adapter.
        depth: which source layer feeds which target layer, see `jcrosslora.relation.pairing.pair_modules`.
        sources: align only what these source modules feed (those an adapter has); None is all.
        probes: text for the methods that run both bases; None lets the source base write it.
        cache: where factors and transports are kept and looked for, such as `jcrosslora.open_cache()`; None computes
            everything and keeps nothing. The numbers are the same.

    Raises:
        MethodError: the method is unknown, or cannot be used on these bases.
        PairingError: the modules cannot be paired as asked.
        UsageError: a setting of the method, or a seed, that is out of range.
        CheckpointError: weights that cannot be read or are not finite.
    """
    check_devices()
    session = Session(open_base(source), open_base(target), store=cache)
    assert session.pair is not None  # both are bases
    wanted, _ = session.resolve(Job(None, make_method(method), TransferOptions()))
    plan = plan_between(session.pair, wanted, depth=depth, seed=seed, sources=sources)
    plan = with_text(replace(plan, given=probes))
    return transport_of(plan, tuple(align_groups(plan)))


def shift(
    transport: Transport,
    adapter: Adapter | str | Path | Any,
    *,
    prompts: Any = None,
    examples: Any = None,
    **options: Any,
) -> TransferResult:
    """Move an adapter through a transport (LoRA-Shift, arXiv 2508.05232, section 3), and run the stages after the maps.

    The effect is measured only on request.

    Args:
        adapter: an adapter of the transport's source: a path, a hub id, or an adapter in memory.
        prompts: text for a method that fits an update, see `transfer`, as for `examples`.
        options: fields of `TransferOptions` except depth, which the transport determines.

    Raises:
        AdapterError: the adapter does not fit the source base.
        MethodError: the transport has lost its bases.
        UsageError: options out of range, or that do not fit the method.
    """
    if transport.bases is None:
        raise MethodError("the transport has lost its bases, which shift needs; use jcrosslora.apply, or align again")
    chosen = make_options({"effect": "never", "seed": transport.recipe.seed} | options)
    with enough_memory(out_of_memory_advice(transport.method)):
        session = Session(transport.bases.source, transport.bases.target)
        job = Job(adapter, transport.method, chosen, given_probes(prompts, examples))
        return session.finish_aligned(job, transport)


def transfer_files(settings: TransferSettings) -> TransferResult:
    """Move an adapter from file to file. Groups of modules are aligned, used and dropped one after the other.

    Raises:
        JCrossLoRAError: the input, the settings or the output folder is invalid; nothing is written.
    """
    with enough_memory(_memory_advice(settings)):
        ensure_free(Path(settings.out), settings.overwrite)
        parse_depth(settings.depth)  # refused before anything is read
        if settings.adapter:  # a server has its own
            find_adapter(settings.adapter, settings.adapter_revision)  # before the bases are read for their digests
        result = session_of(settings).transfer(job_of(settings, text_of(settings)))
        save_as(result, settings)
    return result


def estimate_files(settings: TransferSettings) -> Estimate:
    """Check a transfer as `transfer_files` does, and estimate time and memory; nothing is computed or written.

    Raises:
        JCrossLoRAError: the input, the settings or the output folder is invalid.
    """
    ensure_free(Path(settings.out), settings.overwrite)
    return estimate_pair(settings, settings.adapter)


def estimate_pair(settings: TransferSettings, adapter: str | None = None) -> Estimate:
    """Estimate the transfer of an adapter; without one (None), of an adapter of all source modules.

    No weights are read, except by `auto`, which compares some.
    """
    session = session_of(settings, store=False)
    with enough_memory(_memory_advice(settings)):
        return session.estimate(replace(job_of(settings, text_of(settings)), adapter=adapter))


def save_as(result: TransferResult, settings: TransferSettings) -> None:
    """Write a result as the settings say; the recipe names the files of chat templates."""
    templates = {"source_template": settings.source_template, "target_template": settings.target_template}
    named = {name: public_name(path) or Path(path).name for name, path in templates.items() if path is not None}
    shown = replace(result, report=with_settings(result.report, **named))
    shown.save(settings.out, profile=settings.profile, dtype=settings.dtype, overwrite=settings.overwrite)


def session_of(settings: TransferSettings, *, store: bool = True) -> Session:
    """Open both bases of a transfer, and the cache if both the settings and `store` allow it."""
    revision, template = settings.source_revision, settings.source_template
    source = _queried_model(settings) or open_base(settings.source, revision=revision, chat_template=template)
    target = open_base(
        settings.target,
        revision=settings.target_revision,
        name=settings.target_id,
        chat_template=settings.target_template,
    )
    return open_session(source, target, open_cache() if settings.cache and store else None)


def open_session(
    source: BaseModel | QueriedModel | str | Path, target: BaseModel | str | Path, store: Cache | None
) -> Session:
    """Return the session of a source, a base or a model that can only be queried, and a target."""
    opened = open_base(target)
    if isinstance(source, ServedModel | TorchModel):
        if store is not None:
            opened.digest(store.digests)
        return Session(source, opened, store=store)
    return Session(open_base(source), opened, store=store)


def given_probes(
    prompts: Sequence[Any] | str | Path | None, examples: Sequence[Any] | str | Path | None = None
) -> Probes | None:
    """Return the user's texts, conversations and labelled examples, from lists or files; None if none was given.

    Raises UsageError if a file cannot be read, there is no example, or an entry is neither text nor a conversation.
    """
    if examples is None:
        return None if prompts is None else _given_prompts(prompts)
    in_file = isinstance(examples, str | Path)
    known = [as_completion(one) for one in (read_examples(examples) if in_file else parse_examples(examples))]
    if not known:
        raise UsageError("examples is empty: give at least one prompt with its right answer, or leave it out")
    if prompts is None:
        found = Probes.given([one.prompt for one in known], "of the examples")
    else:
        found = _given_prompts(prompts)
    return replace(found, examples=tuple(known), examples_path=str(examples) if in_file else None)


def _given_prompts(prompts: Sequence[Any] | str | Path) -> Probes:
    if isinstance(prompts, str | Path):
        return Probes.given(read_prompts(prompts), f"read from {Path(prompts).name}", str(prompts))

    def parsed(number: int, prompt: Any) -> Prompt:
        if isinstance(prompt, str):
            return prompt
        messages = prompt.get("messages") if isinstance(prompt, dict) else prompt
        if isinstance(messages, tuple) and all(isinstance(one, Message) for one in messages):
            return messages
        return parse_prompt(messages, f"prompt {number}")

    return Probes.given([parsed(number, prompt) for number, prompt in enumerate(prompts)], "given")


def text_of(settings: TransferSettings) -> Probes | None:
    """Read the user's text that the settings name; None if they name none."""
    return given_probes(settings.prompts, settings.examples)


def job_of(settings: TransferSettings, text: Probes | None) -> Job:
    """Return the job of a transfer from files, with the text that its settings name."""
    reading = settings.adapter_revision, settings.adapter_rank, settings.alpha
    method = make_method(settings.method)
    return Job(settings.adapter, method, settings, text, settings.profile, *reading)


def _memory_advice(settings: TransferSettings) -> str:
    return out_of_memory_advice(make_method(settings.method), _queried_model(settings))


def _queried_model(settings: TransferSettings) -> QueriedModel | None:
    """Return the source if it can only be queried."""
    if settings.source_url is not None and settings.source_model and settings.source_tokenizer:
        named = settings.source_url, settings.source_model, settings.source_tokenizer, settings.source_base_model
        return ServedModel(*named, settings.source_template, settings.source_top_logprobs, settings.source_requests)
    if settings.source_backend == "torch":
        more = settings.source_revision, settings.source_tokenizer, settings.source_template
        return TorchModel(settings.source, *more)
    return None
