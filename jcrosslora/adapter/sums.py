"""The sum of several adapters of one base, exactly: factors side by side."""

from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.ignored import drop_token_updates
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.errors import AdapterError


def add_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Add adapters: the update of each module is the sum of their updates.

    The rank of a module is the sum of its ranks; a module of one adapter only keeps its factors. Changes of embedding
    and head are kept if only one adapter has any; else they are listed in `info.ignored`.

    Args:
        adapters: at least one. A single adapter is returned as it is.

    Raises:
        AdapterError: none was given, one is active only after certain tokens, or updates of one module have different
            shapes.
    """
    if not adapters:
        msg = "no adapters to add: give at least one"
        raise AdapterError(msg)
    if len(adapters) == 1:
        return adapters[0]
    check_always_active(adapters)
    with_tokens = [adapter for adapter in adapters if adapter.tokens]
    if len(with_tokens) > 1:
        adapters = [drop_token_updates(adapter, "several adapters of the sum change them") for adapter in adapters]
    found: dict[str, list[LoRAFactors]] = {}
    for adapter in adapters:
        for name, factors in adapter.modules.items():
            found.setdefault(name, []).append(factors)
    info = AdapterInfo(
        name=" + ".join(adapter.info.name for adapter in adapters),
        base_name=adapters[0].info.base_name,
        ignored=tuple(sentence for adapter in adapters for sentence in adapter.info.ignored),
    )
    tokens = tuple(update for adapter in adapters for update in adapter.tokens)
    return Adapter({name: add_factors(name, terms) for name, terms in found.items()}, info, tokens)


def check_always_active(adapters: Sequence[Adapter]) -> None:
    """Refuse an adapter that is not always active.

    Raises:
        AdapterError: one is active only after certain tokens.
    """
    bound = next((adapter for adapter in adapters if adapter.info.invocation is not None), None)
    if bound is not None:
        msg = f"adapter {bound.info.name} is active only after its invocation tokens (aLoRA) and has no sum with others"
        raise AdapterError(msg + "; write it alone")


def add_factors(name: str, terms: Sequence[LoRAFactors]) -> LoRAFactors:
    """Concatenate the factors of updates of one module along the rank; see `add_adapters`."""
    if len(terms) == 1:
        return terms[0]
    if len({factors.shape for factors in terms}) > 1:
        shapes = " and ".join(f"{rows} x {columns}" for rows, columns in sorted({each.shape for each in terms}))
        msg = f"module {name!r} has updates of {shapes}; give adapters of one base"
        raise AdapterError(msg)
    a = np.concatenate([np.asarray(factors.a).astype(np.float32) for factors in terms])
    b = [np.asarray(factors.b).astype(np.float32) * np.float32(factors.scale) for factors in terms]
    return LoRAFactors(a=a, b=np.concatenate(b, axis=1))
