"""Find signs that an adapter is of another base: digests, names, earlier moves, weights that hold the update already.

Adapters of other shapes are refused on loading; this is for models of equal shapes.
"""

import math
import re
from pathlib import Path

import numpy as np

from jcrosslora.adapter.changes import update_norm
from jcrosslora.adapter.lineage import told
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.checkpoint.base import BaseModel, quick_digest
from jcrosslora.checkpoint.hub import is_on_hub, public_name

_MODULES = 4  # whose weights are read
# Least part of an update in the weights that counts as merged (1 up to rounding if it is); and by how many standard
# deviations it has to exceed what unrelated weights hold by chance.
_HELD, _DEVIATIONS = 0.5, 6.0
# Words that distinguish models of one size.
_KINDS = {word: word for word in ("instruct", "coder", "math", "vision", "guard", "thinking", "embedding")}
_KINDS |= {"it": "instruct", "chat": "instruct", "code": "coder", "vl": "vision"}


def doubts(adapter: Adapter, base: BaseModel, *, weights: bool) -> tuple[str, ...]:
    """Give the signs that an adapter was not trained on a base, one sentence each.

    With `weights` some of the base's weights are compared too.
    """
    found = [] if (sentence := other_base(adapter.info, base, "source")) is None else [sentence]
    if adapter.info.earlier:
        first, line = adapter.info.earlier[0], told(adapter.info.earlier, public_name(base.name) or base.name)
        said = f"this adapter was itself moved ({line}), and the errors of moves add up"
        found.append(f"{said}: move the original {first.adapter} instead ({first.digest}), if you have it")
    if weights and (share := _held_share(adapter, base)) is not None:
        said = f"the weights of the source seem to hold the adapter already ({share:.0%} of its update)"
        found.append(f"{said}, as those of a merged model do: give the model that it was trained on")
    return tuple(found)


def other_base(info: AdapterInfo, base: BaseModel, flag: str = "base") -> str | None:
    """Say in a sentence that an adapter is of another base than the one given with `flag`; None if nothing tells.

    The digest that a file of ours records decides, where that of the base is quickly known; else the two names.
    """
    stated, given = info.base_name, public_name(base.name)
    if info.base_digest is not None and (digest := quick_digest(base)) is not None:
        if digest == info.base_digest:
            return None
        said = f"adapter {public_name(info.name)} was written for {stated or 'a base'} ({info.base_digest[:19]}...), "
        said += f"and the {flag} is {given}, whose digest is another ({digest[:19]}...)"
        return f"{said}: the adapter is used on it as it is"
    if stated is None or (evidence := other_model(stated, base.name)) is None:
        return None
    said = f"the adapter's configuration names {stated} as its base, and the {flag} is {given} ({evidence})"
    return f"{said}: if they are two models, give --{flag} {stated}"


def other_model(stated: str, name: str) -> str | None:
    """Return what distinguishes two models in their names; None if they may be the same.

    `stated` is the base that an adapter names, and `name` a hub id or the name in a GGUF file, which often
    lacks words of the id. Names of folders do not count.
    """
    if not is_on_hub(stated) or (not is_on_hub(name) and ("/" in name or Path(name).exists())):
        return None
    said, own = _words(stated), _words(name)
    sizes = [{word for word in words if re.fullmatch(r"\d+(\.\d+)?[bm]", word)} for words in (said, own)]
    if all(sizes) and sizes[0].isdisjoint(sizes[1]):
        return f"{min(sizes[0])} and {min(sizes[1])}"
    kinds = [{_KINDS[word] for word in words & _KINDS.keys()} for words in (said, own)]
    differ = kinds[1] - kinds[0] | (kinds[0] - kinds[1] if is_on_hub(name) else set())
    return f"one of them is called {min(differ)!r}" if differ else None


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9.]+", name.rpartition("/")[2].lower()))


def _held_share(adapter: Adapter, base: BaseModel) -> float | None:
    """Return <W, dW> / ||dW||^2 over some modules, if W holds the update; it is 0 for W that knows nothing of dW.

    The standard deviation by chance of <W, dW> is that of an entry of W times ||dW||.
    """
    names = [name for name in adapter.modules if name in base.modules]
    inner = size = chance = 0.0
    for name in names[:: max(1, len(names) // _MODULES)][:_MODULES]:
        factors, weight = adapter.modules[name], base.weight(name).astype(np.float32)
        a, b = (np.asarray(matrix).astype(np.float32) for matrix in (factors.a, factors.b))
        inner += factors.scale * float(np.sum((b.T @ weight) * a, dtype=np.float64))
        size += (squared := update_norm(factors) ** 2)
        chance += squared * float(np.mean(np.square(weight), dtype=np.float64))
    held = size > 0 and inner > _HELD * size and inner > _DEVIATIONS * math.sqrt(chance)
    return inner / size if held else None
