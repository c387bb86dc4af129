"""What a path holds, for `jcrosslora inspect`, and the other short listings."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jcrosslora.adapter import Adapter, EngineVerdict, describe_adapter, load_adapter
from jcrosslora.adapter.dropped import described
from jcrosslora.adapter.folder import is_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.errors import CheckpointError, JCrossLoRAError, UsageError
from jcrosslora.methods import METHODS


def inspect(ref: str, console: Console, *, revision: str | None = None, base: str | None = None) -> None:
    """Print what `ref` is: an adapter (of PEFT, MLX or llama.cpp) or a base model.

    Args:
        ref: a path or a hub id.
        console: to print to.
        revision: hub revision.
        base: the base of an adapter, which some kinds are no update without: a path or a hub id.

    Raises:
        JCrossLoRAError: it is neither, or cannot be read.
        UsageError: a base of a base model.
    """
    path = Path(ref)
    if is_adapter(path):
        _print_adapter(load_adapter(ref, None if base is None else open_base(base), revision=revision), console)
        return
    if path.exists():
        model = open_base(ref, revision=revision)
        _check_no_base(ref, base)
        _print_base(model, console)
        return
    if not is_hub_id(ref):
        msg = f"{ref}: no such folder or file, and not a hub id of the form org/name"
        raise CheckpointError(msg)
    _inspect_hub(ref, console, revision, base)


def reported_family(path: Path) -> str | None:
    """Family of the base that a moved adapter is for, from its `transfer_report.json`; None for other adapters."""
    folder = path.parent if path.is_file() else path
    try:
        report = json.loads((folder / "transfer_report.json").read_text(encoding="utf-8"))
        return str(report["target"]["family"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def print_engines(verdicts: Sequence[EngineVerdict], console: Console) -> None:
    """One row for each engine: whether it reads the folder, and why not."""
    table = Table("engine", "reads it", "reasons and notes")
    for item in verdicts:
        table.add_row(item.engine, "yes" if item.reads else "no", "\n".join((*item.reasons, *item.notes)))
    console.print(table, highlight=False, markup=False)


def print_methods(console: Console) -> None:
    """The registry as a table."""
    table = Table("method", "what it does", "needs", "reference")
    for method in METHODS.values():
        table.add_row(method.name, method.summary, method().needs, method.reference)
    console.print(table, highlight=False, markup=False)


def _inspect_hub(ref: str, console: Console, revision: str | None, base_ref: str | None) -> None:
    """A hub id may be either kind: try the small one first, and report the base's error if it is neither."""
    try:
        adapter = load_adapter(ref, None if base_ref is None else open_base(base_ref), revision=revision)
    except JCrossLoRAError as adapter_error:
        try:
            base = open_base(ref, revision=revision)
        except CheckpointError as error:
            msg = f"{ref} is neither an adapter ({adapter_error}) nor a base model ({error})"
            raise CheckpointError(msg) from None
        _check_no_base(ref, base_ref)
        _print_base(base, console)
    else:
        _print_adapter(adapter, console)


def _check_no_base(ref: str, base: str | None) -> None:
    if base is not None:
        msg = f"{ref} is a base model, and --base {base} was given, which goes with an adapter: leave it out"
        raise UsageError(msg)


def _print_adapter(adapter: Adapter, console: Console) -> None:
    _say(console, f"adapter: {adapter.info.name} (format of {adapter.info.form})")
    _say(console, f"for: {adapter.info.base_name or 'its file does not name a base model'}")
    _say(console, f"kind: {adapter.info.read_as or adapter.info.kind}")
    if adapter.info.invocation is not None:
        _say(console, f"acts after the tokens: {', '.join(map(str, adapter.info.invocation))}")
    rows = describe_adapter(adapter)
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        console.print(table, highlight=False, markup=False)
    _say(console, f"can be moved: {len(adapter.modules)} modules")
    for update in adapter.tokens:
        what = described(update.sort, update.modules, update.share)
        _say(console, f"can be moved by {_keeping()} alone: {what}")
    for sentence in adapter.info.ignored:
        _say(console, f"not moved: {sentence}")


def _print_base(base: BaseModel, console: Console) -> None:
    dims = base.dims
    _say(console, f"base model: {base.name} ({base.ref})")
    _say(console, f"family: {base.family.name}")
    _say(
        console,
        f"shape: {dims.layers} layers, {dims.hidden} wide, MLP {dims.intermediate}, {dims.heads} query and "
        f"{dims.kv_heads} key/value heads of {dims.head_dim}, {dims.vocab} tokens",
    )
    by_role = Counter((module.role, module.shape, module.dtype) for module in base.modules.values())
    table = Table("module", "n", "out x in", "stored as")
    for (role, shape, dtype), count in by_role.items():
        table.add_row(role, str(count), f"{shape[0]} x {shape[1]}", dtype)
    console.print(table, highlight=False, markup=False)
    for name, parts in list(base.fused.items())[:2]:
        _say(console, f"fused: {name} holds {', '.join(part[0].rsplit('.', 1)[-1] for part in parts)}")
    vocabulary = base.vocabulary()
    tokens = f"{len(vocabulary.tokens):,} tokens" if vocabulary.tokens is not None else f"no ({vocabulary.reason})"
    _say(console, f"vocabulary readable: {tokens}")
    _say(console, f"can receive and give updates: {len(base.modules)} modules")
    others = sorted(set(base.tensor_names()) - {module.tensor for module in base.modules.values()})
    _say(
        console, f"no updates for: {len(others)} other tensors (norms, biases; embedding and head but by {_keeping()})"
    )


def _keeping() -> str:
    """The methods that move changes of embedding and head."""
    return ", ".join(method.name for method in METHODS.values() if method.preserves_residual_basis)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
