"""`jcrosslora.transfer`, `align` and `shift`: transfers in memory, at once and in two steps (arXiv 2508.05232)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter import Adapter
from jcrosslora.cache import Cache, open_cache
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.distill.sources import ServedModel, TorchModel
from jcrosslora.distributed import hosts
from jcrosslora.errors import MethodError
from jcrosslora.maps.align import align_groups
from jcrosslora.maps.plan import check_hosts, plan_alignment, with_text
from jcrosslora.maps.transport import Transport
from jcrosslora.methods import AUTO, MethodLike, make_method
from jcrosslora.relation.pairing import Depth
from jcrosslora.session.pair_session import PairSession, lighter, with_one_writer
from jcrosslora.session.queried import QueriedModel, QueriedSession
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.text import Message, Prompt
from jcrosslora.text.completion import parse_prompt
from jcrosslora.utils.cost import enough_memory

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import Probes


def transfer(
    adapter: Adapter | str | Path | Any,
    source: BaseModel | ServedModel | TorchModel | str | Path,
    target: BaseModel | str | Path,
    method: MethodLike = AUTO,
    *,
    prompts: Sequence[Any] | str | Path | None = None,
    cache: bool = True,
    **options: Any,
) -> TransferResult:
    """Move an adapter from the base it was trained on to another base. Nothing is written.

    Args:
        adapter: a path, a hub id, or an adapter in memory, see `load_adapter`; None for a served source.
        source: the base it was trained on: a path, a hub id, or a base in memory, see `open_base`; or a source that can
            only be queried: a `ServedModel`, or a `TorchModel` for classes that only transformers knows.
        target: the base to move it to: a path, a hub id, or a base in memory.
        method: a name ("auto", "distill", "cross-lora"), or a method object with its hyper-parameters, such as
            `methods.Distill(completions=600)`.
        prompts: text that both bases are run on, as a file (see `--probe-text`) or as a list of texts and of
            conversations, each a list of {"role", "content"}.
            Where an update is fitted, prompts of the adapter's own task recover more than what the source writes.
        cache: whether factors and transports are kept in the user's cache folder, and looked for there.
        options: fields of `TransferOptions`: depth, calibrate, scale, out_rank, seed, probe_count, effect, divide.

    Returns:
        The adapter for the target with its report.

    Raises:
        JCrossLoRAError: the input or the options are invalid, see its subclasses.
    """
    wanted, chosen = make_method(method), TransferOptions(**options)
    with hosts.together(), enough_memory(lighter(wanted, source)):
        session = open_session(source, target, open_cache() if cache else None)
        loaded = session.load(adapter)
        return session.transfer(loaded, wanted, with_one_writer(chosen), probes=given_probes(prompts))


def align(
    source: BaseModel | str | Path,
    target: BaseModel | str | Path,
    method: MethodLike = AUTO,
    *,
    depth: Depth = "proportional",
    seed: int = 0,
    sources: Collection[str] | None = None,
    probes: Probes | None = None,
    cache: Cache | None = None,
) -> Transport:
    """Find the maps that carry adapters of `source` over to `target`.

    Args:
        source: the base that adapters come from, opened, or what `open_base` opens.
        target: the base that they go to.
        method: a name, or a method object with its hyper-parameters, such as `methods.CrossLoRA(svd_rank=64)`; "auto"
            chooses by the weights of both bases. A method that fits an update has no maps: its fit is run by `shift`,
            adapter by adapter.
        depth: which source layer feeds which target layer, see `jcrosslora.relation.pairing.pair_modules`.
        seed: of everything that is drawn.
        sources: align only what these source modules feed (those an adapter has); None is all.
        probes: text for the methods that run both bases; None lets the source base write it.
        cache: where factors and transports are kept and looked for, such as `jcrosslora.open_cache()`; None computes
            everything and keeps nothing. The numbers are the same.

    Returns:
        The transport, on the default devices.

    Where `jax.distributed` has been initialised, all processes have to call this alike: each reads and decomposes its
    part of the modules, and all of them get the whole transport.

    Raises:
        MethodError: an unknown method, one that cannot be used on these bases, or one that several processes cannot do
            together.
        PairingError: the modules cannot be paired as asked.
        UsageError: a setting of the method, or a seed, that is out of range.
        CheckpointError: weights that cannot be read or are not finite.
        HostError: another process failed.
    """
    with hosts.together():
        session = PairSession(open_base(source), open_base(target), store=cache)
        wanted, _ = session.resolve(make_method(method))
        task = plan_alignment(session.pair, wanted, depth=depth, seed=seed, sources=sources)
        check_hosts(task)
        task = with_text(task, probes)
        groups = tuple(align_groups(task))
        return task.transport(groups, [kernel for group in groups for kernel in group.kernels])


def shift(
    transport: Transport, adapter: Adapter | str | Path | Any, *, prompts: Any = None, **options: Any
) -> TransferResult:
    """Move an adapter through a transport (LoRA-Shift, arXiv 2508.05232, section 3), and run the stages after the maps.

    Args:
        transport: from `align`.
        adapter: an adapter of the transport's source: a path, a hub id, or an adapter in memory.
        prompts: text for a method that fits an update, see `transfer`.
        options: fields of `TransferOptions` except depth, which the transport determines.

    Returns:
        The adapter for the target base with its report. The effect is measured only on request.

    Raises:
        AdapterError: the adapter does not fit the source base.
        MethodError: the transport has lost its bases.
        UsageError: options out of range, or that do not fit the method.
    """
    if transport.bases is None:
        msg = "the transport has lost its bases, which shift needs; use jcrosslora.apply, or align again"
        raise MethodError(msg)
    chosen = TransferOptions(**({"effect": "never", "seed": transport.recipe.seed} | options))
    with hosts.together(), enough_memory(lighter(transport.method)):
        session = PairSession(*transport.bases)
        move = session.start(session.load(adapter), transport.method, chosen)
        return session.finish_aligned(move, transport, given_probes(prompts))


def given_probes(prompts: Sequence[Any] | str | Path | None) -> Probes | None:
    """Return the user's texts and conversations, from a list or from a file; None if none was given.

    Raises:
        UsageError: the file cannot be read, or an entry of the list is neither text nor a conversation.
    """
    if prompts is None:
        return None
    from jcrosslora.evaluate.examples import read_prompts
    from jcrosslora.evaluate.probes import Probes

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


def open_session(
    source: BaseModel | QueriedModel | str | Path, target: BaseModel | str | Path, store: Cache | None
) -> PairSession | QueriedSession:
    """Open what moves adapters of a base, or of a source that can only be queried, to a target.

    All processes take the digests of the weights that the cache of any of them remembers, so that files are not read
    again.
    """
    digests = hosts.shared(None if store is None else store.digests)
    if isinstance(source, ServedModel | TorchModel):
        opened = [open_base(target)]
        session = QueriedSession(source, opened[-1], store=store)
    else:
        opened = [open_base(source), open_base(target)]
        session = PairSession(*opened, store=store)
    for base in opened if digests is not None else ():
        base.digest(digests)
    return session
