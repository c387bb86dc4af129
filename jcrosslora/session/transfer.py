"""`jcrosslora.transfer` and `jcrosslora.shift`: transfers in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.cache import open_cache
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.distill.sources.served.model import ServedModel
from jcrosslora.distill.sources.torch_model import TorchModel
from jcrosslora.distributed import hosts
from jcrosslora.errors import MethodError
from jcrosslora.maps.alignment.transport import Transport
from jcrosslora.methods import AUTO, Auto, Method, MethodLike, make_method
from jcrosslora.session.pair_session import PairSession, lighter, with_one_writer
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.text import Message, Prompt
from jcrosslora.text.completion import parse_prompt
from jcrosslora.utils.memory import enough_memory

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
        source: the base it was trained on: a path, a hub id, or a base in memory, see `open_base`; or a source that is
            asked: a `ServedModel`, or a `TorchModel` for classes that only transformers knows.
        target: the base it shall work on, likewise.
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
    if isinstance(source, ServedModel | TorchModel):
        return _ask(adapter, source, target, wanted, chosen, prompts, cache=cache)
    with hosts.together(), enough_memory(lighter(wanted)):
        session = PairSession(open_base(source), open_base(target), store=open_cache() if cache else None)
        share_digests(session)
        loaded = load_adapter(adapter, session.pair.source)
        return session.transfer(loaded, wanted, with_one_writer(chosen), probes=given_probes(prompts))


def _ask(
    adapter: Any,
    source: ServedModel | TorchModel,
    target: BaseModel | str | Path,
    method: Method | Auto,
    options: TransferOptions,
    prompts: Sequence[Any] | str | Path | None,
    *,
    cache: bool,
) -> TransferResult:
    """Move an adapter from a source that is asked."""
    from jcrosslora.session.asked import check_asked, transfer_asked
    from jcrosslora.session.asked_opening import open_asked

    with enough_memory("a shorter answer_tokens"):
        opened, store, probes = open_base(target), open_cache() if cache else None, given_probes(prompts)
        request = check_asked(opened, method, options)
        asked = open_asked(source, adapter, store=store)
        states = None if store is None else store.root / "fits"
        return transfer_asked(asked, opened, request, probes=probes, states=states)


def shift(
    transport: Transport,
    adapter: Adapter | str | Path | Any,
    *,
    prompts: Any = None,
    **options: Any,
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
        move = session.start(load_adapter(adapter, session.pair.source), transport.method, chosen)
        return session.finish_aligned(move, transport, given_probes(prompts))


def given_probes(prompts: Sequence[Any] | str | Path | None) -> Probes | None:
    """Return the user's texts and conversations, from a list or from a file; None if none was given.

    Raises:
        UsageError: the file cannot be read, or an entry of the list is neither text nor a conversation.
    """
    if prompts is None:
        return None
    from jcrosslora.evaluate.probes import Probes, read_prompts

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


def share_digests(session: PairSession) -> None:
    """Digest both bases with the digests that the cache of any process remembers, so that files are not read again."""
    store = session.pair.store
    digests = hosts.shared(None if store is None else store.digests)
    if digests is not None:
        for base in (session.pair.source, session.pair.target):
            base.digest(digests)
