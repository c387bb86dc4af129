"""Sentences on the changes of an adapter that do not move to another base."""

import dataclasses
from collections.abc import Sequence

from jcrosslora.adapter.records import Adapter
from jcrosslora.adapter.token_updates import TokenUpdate

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


def token_update_sentences(tokens: Sequence[TokenUpdate], why: str) -> tuple[str, ...]:
    """Say of each change of embedding or head, in one sentence, that it does not move."""
    return tuple(ignored_sentence(update.kind, update.modules, update.share, why) for update in tokens)


def drop_experts(adapter: Adapter, why: str) -> Adapter:
    """Return the adapter without its updates of experts, listed in `info.ignored` with the reason."""
    if not adapter.experts:
        return adapter
    known = [update.share for update in adapter.experts if update.share is not None]
    share = sum(known) if len(known) == len(adapter.experts) else None
    sentence = ignored_sentence("experts", [update.name for update in adapter.experts], share, why)
    info = dataclasses.replace(adapter.info, ignored=(*adapter.info.ignored, sentence))
    return dataclasses.replace(adapter, experts=(), info=info)


def drop_replaced(adapter: Adapter, why: str) -> Adapter:
    """Return the adapter without the tensors that replace those of its base, listed in `info.ignored`."""
    if not adapter.replaced:
        return adapter
    ignored = tuple(ignored_sentence(group.kind, group.modules, group.share, why) for group in adapter.replaced)
    info = dataclasses.replace(adapter.info, ignored=adapter.info.ignored + ignored)
    return dataclasses.replace(adapter, replaced=(), info=info)


def drop_token_updates(adapter: Adapter, why: str) -> Adapter:
    """Return the adapter without its changes of embedding and head, listed in `info.ignored` with the reason."""
    if not adapter.tokens:
        return adapter
    ignored = adapter.info.ignored + token_update_sentences(adapter.tokens, why)
    return dataclasses.replace(adapter, tokens=(), info=dataclasses.replace(adapter.info, ignored=ignored))
