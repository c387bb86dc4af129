"""The sum of several adapters of one base, exactly: factors side by side."""

from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.ignored import drop_token_updates
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.errors import AdapterError


def add_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose update of each module is the sum of the updates that the adapters have for it.

    The rank of a module is the sum of its ranks; where only one adapter has it, its factors are left alone. Changes of
    embedding and head go along where one adapter alone has any; else they are listed in `info.ignored`.

    Args:
        adapters: at least one. Of a single one the result is that adapter itself.

    Raises:
        AdapterError: none was given, one acts only after certain tokens, or updates of one module have different
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
    """Refuse to add an adapter that does not always act.

    Raises:
        AdapterError: one acts only after certain tokens.
    """
    bound = next((adapter for adapter in adapters if adapter.info.invocation is not None), None)
    if bound is not None:
        msg = f"adapter {bound.info.name} acts only after its invocation tokens (aLoRA): it has no sum with others"
        raise AdapterError(msg + ", write it alone")


def add_factors(name: str, terms: Sequence[LoRAFactors]) -> LoRAFactors:
    """The factors of a sum of updates of one module, side by side; see `add_adapters`."""
    if len(terms) == 1:
        return terms[0]
    if len({factors.shape for factors in terms}) > 1:
        shapes = " and ".join(f"{rows} x {columns}" for rows, columns in sorted({each.shape for each in terms}))
        msg = f"module {name!r} has updates of {shapes}: adapters of one base were wanted"
        raise AdapterError(msg)
    a = np.concatenate([np.asarray(factors.a).astype(np.float32) for factors in terms])
    b = [np.asarray(factors.b).astype(np.float32) * np.float32(factors.scale) for factors in terms]
    return LoRAFactors(a=a, b=np.concatenate(b, axis=1))
