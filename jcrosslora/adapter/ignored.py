"""The kinds of change of an adapter: what a method or a format does not carry is left out, and said in sentences."""

import dataclasses
import enum
from collections.abc import Sequence

from jcrosslora.adapter.expert_updates import ExpertUpdate
from jcrosslora.adapter.records import Adapter
from jcrosslora.errors import AdapterError, JCrossLoRAError


class Carried(enum.Flag):
    """The kinds of change that a method, a profile or another user of an adapter takes; the others are left out."""

    LINEAR = enum.auto()  # updates of linear modules, which everything carries
    TOKENS = enum.auto()  # changes of the embedding and the output head
    REPLACED = enum.auto()  # tensors that replace those of the base
    EXPERTS = enum.auto()  # updates of experts
    EVERYTHING = LINEAR | TOKENS | REPLACED | EXPERTS


# Kind of change -> its name in a sentence.
CHANGES = {
    "embedding": "LoRA of an embedding",
    "head": "an update of the output head",
    "tokens": "trained tokens (trainable_token_indices)",
    "bias": "trained biases",
    "lora_bias": "biases that were trained with LoRA's B (lora_bias)",
    "experts": "LoRA of experts",
    "router": "an update of the router of experts",
    "layer inputs": "updates of what makes the inputs of layers",
    "full": "whole tensors (modules_to_save)",
    "other part": "updates of other parts than the text model",
}
_SHOWN = 3  # module names in a sentence


def ignored_sentence(kind: str, names: Sequence[str], share: float | None, why: str = "") -> str:
    """Say in one sentence what does not move.

    Args:
        kind: a key of `CHANGES`.
        names: the modules.
        share: of the whole adapter's squared Frobenius norm, or None if it is not known.
        why: the reason, without a full stop.
    """
    return f"{describe_change(kind, names, share)}{f': {why}' if why else ''}."


def describe_change(kind: str, names: Sequence[str], share: float | None) -> str:
    """Name a change, its modules and its size, for a sentence; arguments as for `ignored_sentence`."""
    names = list(dict.fromkeys(names))
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    part = "" if share is None else f" ({share:.1%} of the whole change's squared norm)"
    return f"{CHANGES[kind]}, {listed}{part}"


def describe_experts(updates: Sequence[ExpertUpdate]) -> str:
    """Name updates of experts and their size together, for a sentence."""
    known = [update.share for update in updates if update.share is not None]
    share = sum(known) if len(known) == len(updates) else None
    return describe_change("experts", [update.name for update in updates], share)


def left_out(adapter: Adapter, carried: Carried, why: str) -> tuple[str, ...]:
    """Say of each change of an adapter that is not carried, in one sentence, that it does not move.

    Args:
        adapter: any.
        carried: by a method, a profile or what else takes a part of the adapter.
        why: the reason, without a full stop, or "".
    """
    rows = () if Carried.TOKENS in carried else adapter.tokens
    tensors = () if Carried.REPLACED in carried else adapter.replaced
    left = [describe_change(change.kind, change.modules, change.share) for change in (*rows, *tensors)]
    if adapter.experts and Carried.EXPERTS not in carried:
        left.append(describe_experts(adapter.experts))
    return tuple(f"{change}{why and f': {why}'}." for change in left)


def restrict(adapter: Adapter, carried: Carried, why: str) -> Adapter:
    """Return the part of an adapter that is carried; the rest is listed in `info.ignored`, see `left_out`."""
    left = left_out(adapter, carried, why)
    if not left:
        return adapter
    return dataclasses.replace(
        adapter,
        tokens=adapter.tokens if Carried.TOKENS in carried else (),
        replaced=adapter.replaced if Carried.REPLACED in carried else (),
        experts=adapter.experts if Carried.EXPERTS in carried else (),
        info=dataclasses.replace(adapter.info, ignored=adapter.info.ignored + left),
    )


def check_always_active(adapter: Adapter, why: str, error: type[JCrossLoRAError] = AdapterError) -> None:
    """Refuse an adapter that acts only after its invocation tokens, with a message that ends in `why`."""
    if adapter.info.invocation is not None:
        msg = f"adapter {adapter.info.name} acts only after its invocation tokens (aLoRA), {why}"
        raise error(msg)
