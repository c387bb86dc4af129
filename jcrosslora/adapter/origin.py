"""The origin of an adapter: the record of its moves, and signs that it belongs to another base than the given one.

The signs are digests, names, earlier moves, and weights that already contain the update. Adapters with other shapes are
refused on loading; these checks are for models of equal shapes.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jcrosslora.adapter.changes import update_norm
from jcrosslora.adapter.folder import REPORT, AdapterPaths, open_weights
from jcrosslora.adapter.records import Adapter, AdapterInfo, Earlier
from jcrosslora.checkpoint.base import BaseModel, quick_digest
from jcrosslora.checkpoint.hub import is_on_hub, public_name
from jcrosslora.errors import AdapterError

_MODULES = 4  # number of modules whose weights are read
# Smallest share of an update in the weights that counts as merged (about 1 if it is), and the number of standard
# deviations by which it must exceed chance.
_HELD, _DEVIATIONS = 0.5, 6.0
# Words that distinguish models of one size.
_KINDS = {word: word for word in ("instruct", "coder", "math", "vision", "guard", "thinking", "embedding")}
_KINDS |= {"it": "instruct", "chat": "instruct", "code": "coder", "vl": "vision"}


def mismatch_warnings(adapter: Adapter, base: BaseModel, *, weights: bool) -> tuple[str, ...]:
    """Return the signs that an adapter was not trained on a base, one sentence each.

    With `weights`, also check whether the base's weights already contain the update.
    """
    found = [] if (sentence := other_base(adapter.info, base, "source")) is None else [sentence]
    if adapter.info.earlier:
        first, line = (
            adapter.info.earlier[0],
            describe_history(adapter.info.earlier, public_name(base.name) or base.name),
        )
        said = f"this adapter was itself moved ({line}), and the errors of moves add up"
        found.append(f"{said}: move the original {first.adapter} instead ({first.digest}), if you have it")
    if weights and (share := _held_share(adapter, base)) is not None:
        said = f"the weights of the source seem to hold the adapter already ({share:.0%} of its update)"
        found.append(f"{said}, as those of a merged model do: give the model that it was trained on")
    return tuple(found)


def other_base(info: AdapterInfo, base: BaseModel, flag: str = "base") -> str | None:
    """Return a sentence if an adapter seems to belong to another base than the one given with `flag`, else None.

    The digest in a file of ours decides if the base's digest is quickly known; otherwise the two names are compared.
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
    """Return how the names of two models differ; None if they may be the same model.

    `stated` is the base that an adapter names, and `name` a hub id or the name in a GGUF file, which often
    lacks words of the id. Folder names are not compared.
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
    """Return <W, dW> / ||dW||^2 over some modules, about 1 if W contains the update; None if it may be chance.

    For a W unrelated to dW, <W, dW> has mean 0 and the standard deviation of an entry of W times ||dW||.
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


def read_record(files: AdapterPaths, header: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of a transfer from the report in the folder, and from the header of the weights.

    The header overrides the report, which may belong to other weights.
    """
    found: Any = {}
    with suppress(ValueError, RecursionError):
        found = json.loads(files.read_document(REPORT) or "{}")
    found = found if isinstance(found, dict) else {}
    for key, value in header.items():
        name = key.removeprefix("jcrosslora.")
        if name != key and name != "version":
            with suppress(ValueError, TypeError, RecursionError):
                found[name] = json.loads(value)
    return found


def earlier_of(record: Mapping[str, Any]) -> tuple[Earlier, ...]:
    """Return the adapters that a recorded adapter was moved from, the original first; empty if it was not moved."""
    if not isinstance(record.get("recipe"), dict):
        return ()
    before: tuple[Earlier, ...] = ()
    with suppress(msgspec.ValidationError, KeyError, TypeError):
        before = msgspec.convert(record["adapter"]["earlier"], tuple[Earlier, ...])
    keys = ("adapter", "name"), ("adapter", "digest"), ("source", "name"), ("source", "digest"), ("recipe", "method")
    return (*before, Earlier(*(text_of(record, *path) for path in keys)))


def describe_history(earlier: Sequence[Earlier], base: str) -> str:
    """Say how an adapter came to its base, in a phrase: "A of BASE, moved to BASE by METHOD, moved to ..."."""
    bases = *(one.base for one in earlier[1:]), base
    moves = (f"moved to {name} by {one.method}" for one, name in zip(earlier, bases, strict=True))
    return ", ".join([f"{earlier[0].adapter} of {earlier[0].base}", *moves])


def text_of(record: Any, *keys: str) -> str | None:
    """Return the string under nested `keys`; None if it is missing, empty or no string."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, str) and record else None


def read_header(files: AdapterPaths) -> Mapping[str, Any]:
    """Read the metadata of a safetensors file; empty for other formats and damaged files."""
    try:
        return open_weights(files.weights).metadata if files.form in ("PEFT", "MLX") else {}
    except AdapterError:  # reading its tensors says what is wrong
        return {}
