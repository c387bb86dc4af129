"""Describe the contents of a path, for `jcrosslora inspect`."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from jcrosslora.adapter import Adapter, Carried, describe_adapter, load_adapter, update_norm
from jcrosslora.adapter.folder import is_adapter
from jcrosslora.adapter.records import describe_change, restrict, why_idle
from jcrosslora.checkpoint import BaseModel, is_hub_id, open_base
from jcrosslora.errors import CheckpointError, JCrossLoRAError, UsageError
from jcrosslora.methods import METHODS
from jcrosslora.report.record import REPORT, read_report
from jcrosslora.utils.terminal import print_table, say


def open_any(
    ref: str, *, revision: str | None = None, base: str | None = None, alpha: float | None = None
) -> Adapter | BaseModel:
    """Open an adapter (PEFT, MLX, llama.cpp or Orbax) or a base model; some adapters need `base`.

    A hub id is tried as an adapter first, because adapters are smaller. Raises CheckpointError with both reasons if it
    is neither, and UsageError if `base` is given with a base model.
    """
    path, refused = Path(ref), None
    if not path.exists() and not is_hub_id(ref):
        raise CheckpointError(f"{ref}: no such folder or file, and not a hub id of the form org/name")
    if not path.exists() or is_adapter(path):
        try:
            opened = None if base is None else open_base(base)
            # Open changes of embedding and head alone too, and list replaced tensors of the base as not moved.
            adapter = load_adapter(ref, opened, revision=revision, alpha=alpha, replaced=True)
            return restrict(adapter, Carried.EVERYTHING & ~Carried.REPLACED, "")
        except JCrossLoRAError as error:
            if path.exists():
                raise
            refused = error
    try:
        model = open_base(ref, revision=revision)
    except CheckpointError as error:
        if refused is None or str(refused) == str(error):  # such as no network
            raise
        raise CheckpointError(f"{ref} is neither an adapter ({refused}) nor a base model ({error})") from None
    if base is not None:
        msg = f"{ref} is a base model, but --base {base} was given, which applies to adapters only: leave it out"
        raise UsageError(msg)
    return model


def describe(found: Adapter | BaseModel) -> dict[str, Any]:
    """Describe an adapter or a base model as JSON data."""
    if isinstance(found, BaseModel):
        modules = {name: {"shape": list(one.shape), "dtype": one.dtype} for name, one in found.modules.items()}
        return {
            "type": "base",
            "name": found.name,
            "ref": str(found.ref),
            "family": found.family.name,
            "dimensions": dataclasses.asdict(found.dims),
            "modules": modules,
            "vocabulary_readable": found.vocabulary().tokens is not None,
            "notes": list(found.notes),
        }
    info = found.info
    return {
        "type": "adapter",
        "name": info.name,
        "format": info.form,
        "kind": info.kind,
        "base": info.base_name,
        "invocation": info.invocation,
        "modules": {name: {"rank": one.rank, "norm": float(update_norm(one))} for name, one in found.modules.items()},
        "token_updates": [describe_change(item.kind, item.modules, item.share) for item in found.tokens],
        "not_moved": list(info.ignored),
        "does_nothing": why_idle(found) is not None,
    }


def print_description(found: Adapter | BaseModel, console: Console) -> None:
    """Print an adapter or a base model as lines and a table."""
    if isinstance(found, Adapter):
        _print_adapter(found, console)
    else:
        _print_base(found, console)


def reported_family(path: Path) -> str | None:
    """Return the family of a moved adapter's base from its `transfer_report.json`; None if there is no such report."""
    folder = path.parent if path.is_file() else path
    try:
        return read_report(folder / REPORT).target.family or None
    except UsageError:
        return None


def _print_adapter(adapter: Adapter, console: Console) -> None:
    say(console, f"adapter: {adapter.info.name} (format of {adapter.info.form})")
    say(console, f"for: {adapter.info.base_name or 'its file does not name a base model'}")
    say(console, f"kind: {adapter.info.read_as or adapter.info.kind}")
    if adapter.info.invocation is not None:
        say(console, f"acts after the tokens: {', '.join(map(str, adapter.info.invocation))}")
    if rows := describe_adapter(adapter):
        print_table(console, rows[0], (row.values() for row in rows))
    say(console, why_idle(adapter) or f"can be moved: {len(adapter.modules)} modules")
    if adapter.experts:
        say(console, f"can be moved by distill, or to a copy of its base: {len(adapter.experts)} updates of experts")
    alone = not (adapter.modules or adapter.experts)
    holds = "cannot be moved alone, but merged and exported" if alone else f"can be moved by {_token_methods()} alone"
    for update in adapter.tokens:
        say(console, f"{holds}: {describe_change(update.kind, update.modules, update.share)}")
    for sentence in adapter.info.ignored:
        say(console, f"not moved: {sentence}")


def _print_base(base: BaseModel, console: Console) -> None:
    dims = base.dims
    say(console, f"base model: {base.name} ({base.ref})")
    inside = "" if base.wrapper is None else f", the text model of {base.wrapper.architecture}"
    say(console, f"family: {base.family.name}{inside}")
    say(
        console,
        f"shape: {dims.layers} layers, {dims.hidden} wide, MLP {dims.intermediate}, {dims.heads} query and "
        f"{dims.kv_heads} key/value heads of {dims.head_dim}, {dims.vocab} tokens",
    )
    by_role = Counter((module.role, module.shape, module.dtype) for module in base.modules.values())
    kinds = by_role.items()
    rows = ((role, str(count), f"{shape[0]} x {shape[1]}", dtype) for (role, shape, dtype), count in kinds)
    print_table(console, ("module", "n", "out x in", "stored as"), rows)
    for name, parts in list(base.fused.items())[:2]:
        say(console, f"fused: {name} holds {', '.join(part[0].rsplit('.', 1)[-1] for part in parts)}")
    vocabulary = base.vocabulary()
    tokens = f"{len(vocabulary.tokens):,} tokens" if vocabulary.tokens is not None else f"no ({vocabulary.reason})"
    say(console, f"vocabulary readable: {tokens}")
    say(console, f"modules LoRA can be moved to or from: {len(base.modules)}")
    others = sorted(set(base.store.names()) - {module.tensor for module in base.modules.values()})
    say(console, f"no updates for: {len(others)} other tensors (norms, biases, embedding, head)")
    say(console, f"embedding and head can be moved by {_token_methods()} alone")
    for note in base.notes:
        say(console, f"note: {note}")


def _token_methods() -> str:
    """Return the names of the methods that move changes of embedding and head."""
    return ", ".join(name for name, method in METHODS.items() if Carried.TOKENS in method().carries)
