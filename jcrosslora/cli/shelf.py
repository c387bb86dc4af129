"""`jcrosslora shelf`: keep adapters of one base, and find those for a prompt."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jcrosslora.cli.output import print_json, say
from jcrosslora.cli.shelf_search import Evaluate, Search, Train, sample_json
from jcrosslora.errors import AdapterError, UsageError

if TYPE_CHECKING:
    from jcrosslora.shelf import ShelfEntry


@dataclass(frozen=True)
class Add:
    """Add adapters, or all below a folder such as the output of a batch; a shelf that is not there is made."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    adapters: tyro.conf.Positional[tuple[str, ...]]
    """Adapters, hub ids, or folders with adapters below."""
    base: str | None = None
    """The base of all adapters: a folder of safetensors, a GGUF file or a hub id. A new shelf needs it; later it is
    needed if the base has moved."""
    samples: Path | None = None
    """Prompts of the adapters' task, as --probe-text of a transfer takes them. Without it, the prompts that the source
    wrote when an adapter was moved."""
    name: str | None = None
    """Name of a single adapter in place of that of its folder."""
    lift: float | None = None
    """Of a single adapter, the share of a trained adapter's gain that it recovers, where you have measured it."""
    encoder: str | None = None
    """Of a new shelf: what makes vectors of samples. hidden, the default: states of the base itself. sentences:MODEL: a
    model of sentence-transformers. none: no vectors, for searches by words or certainty."""

    def run(self, console: Console) -> int:
        """Add them, and say what came of each."""
        from jcrosslora.adapter.folder import is_adapter
        from jcrosslora.cli.main import INTERRUPTED, OK, fail
        from jcrosslora.shelf import Shelf

        if not self.adapters:
            msg = f"no adapter was given for the shelf {self.folder}: give adapters, or a folder with adapters below"
            raise UsageError(msg)
        shelf = Shelf(self.folder, self.base, encoder=self.encoder)
        try:
            found = shelf.add(self.adapters, name=self.name, samples=self.samples, lift=self.lift)
        except KeyboardInterrupt:
            return fail("interrupted; what was added stays, and the same command goes on from there", INTERRUPTED)
        for name in found.added:
            say(console, f"added: {name} ({_facts(shelf.entry(name))})")
        for name in found.kept:
            say(console, f"kept: {name}, which was on the shelf as it is")
        for one in found.refused:
            say(console, f"not added: {one.place}: {one.reason}")
        say(console, f"{self.folder}: {len(shelf)} adapters of {shelf.info.name}")
        # Of what lies below a folder the damaged are left out; what was named is an error.
        named = {str(Path(ref).expanduser()) for ref in self.adapters if is_adapter(Path(ref).expanduser())}
        if bad := [one for one in found.refused if one.place in named or one.place in self.adapters]:
            msg = f"{bad[0].place}: not added: {bad[0].reason}"
            raise AdapterError(msg)
        return OK


@dataclass(frozen=True)
class List:
    """Show every adapter with its rank, samples, origin and what is known of its effect."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    json: bool = False
    """Print the entries as JSON, without samples."""

    def run(self, console: Console) -> None:
        """Print the table."""
        from jcrosslora.shelf import Shelf

        shelf = Shelf(self.folder)
        if self.json:
            base = dataclasses.asdict(shelf.info)
            print_json(
                {"base": base, "encoder": shelf.encoder_name, "adapters": [_json(shelf, e) for e in shelf.entries]}
            )
            return
        table = Table()
        for name in ("adapter", "rank", "samples", "base", "moved from", "expected", "lift", "files"):
            table.add_column(name, overflow="fold")
        for entry in shelf.entries:
            origin = entry.origin and f"{entry.origin.adapter} ({entry.origin.base})"
            table.add_row(
                Text(entry.name),
                str(entry.rank),
                f"{len(entry.samples)} ({entry.samples_from})",
                "verified" if entry.verified else "not verified",
                Text(origin or "-"),
                entry.verdict or "-",
                "-" if entry.lift is None else f"{entry.lift:.2f}",
                "missing" if shelf.missing(entry) else f"{entry.size / 1e6:.1f} MB",
            )
        if len(shelf):
            console.print(table)
        say(console, f"{self.folder}: {len(shelf)} adapters of {shelf.info.name}, encoder {shelf.encoder_name}")


@dataclass(frozen=True)
class Show:
    """Show what is known of one adapter, with its samples."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    name: tyro.conf.Positional[str]
    """The adapter."""
    json: bool = False
    """Print it as JSON."""

    def run(self, console: Console) -> None:
        """Print it, one fact a line."""
        from jcrosslora.shelf import Shelf
        from jcrosslora.text.completion import prompt_text

        shelf = Shelf(self.folder)
        entry = shelf.entry(self.name)
        if self.json:
            print_json(_json(shelf, entry) | {"samples": list(map(sample_json, entry.samples))})
            return
        base = "verified by the adapter's record" if entry.verified else "not verified, its shapes fit"
        say(console, f"{entry.name}: {entry.kind} of rank {entry.rank}, {entry.modules} modules")
        say(console, f"files: {shelf.place(entry.name)}{' (missing)' if shelf.missing(entry) else ''}, {entry.digest}")
        say(console, f"base: {shelf.info.name}, {base}")
        if entry.origin is not None:
            say(console, f"moved from: {entry.origin.adapter}, of {entry.origin.base}, by {entry.origin.method}")
        if entry.verdict is not None:
            outcome = "" if entry.effect is None else f"; measured effect: {entry.effect.get('outcome')}"
            say(console, f"expected: {entry.verdict}{outcome}")
        if entry.lift is not None:
            say(console, f"lift: {entry.lift:.2f} of a trained adapter's gain")
        if entry.licence is not None:
            say(console, f"licence: {entry.licence}")
        say(console, f"samples: {len(entry.samples)}, from {entry.samples_from}")
        for sample in entry.samples:
            say(console, f"  {' '.join(prompt_text(sample).split())[:200]}")


@dataclass(frozen=True)
class Remove:
    """Take adapters off the shelf; their files stay."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    names: tyro.conf.Positional[tuple[str, ...]]
    """The adapters."""

    def run(self, console: Console) -> None:
        """Remove them."""
        from jcrosslora.shelf import Shelf

        shelf = Shelf(self.folder)
        shelf.remove(self.names)
        for name in self.names:
            say(console, f"removed: {name}")
        say(console, f"{self.folder}: {len(shelf)} adapters of {shelf.info.name}")


Action = (
    Annotated[Add, tyro.conf.subcommand("add")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Remove, tyro.conf.subcommand("remove")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


@dataclass(frozen=True)
class ShelfCommand:
    """Keep adapters of one base on a shelf, a folder with an index, and find those for a prompt."""

    action: Annotated[Action, tyro.conf.arg(name="")]
    """The action."""

    def run(self, console: Console) -> int | None:
        """Run the action."""
        return self.action.run(console)


def _facts(entry: "ShelfEntry") -> str:
    samples = (
        f"{len(entry.samples)} samples from {entry.samples_from}" if entry.samples else "no samples: give --samples"
    )
    return samples if entry.verified else f"{samples}; its base is not verified, its shapes fit"


def _json(shelf: Any, entry: "ShelfEntry") -> dict[str, Any]:
    fields = dataclasses.asdict(entry) | {"samples": len(entry.samples), "missing": shelf.missing(entry)}
    return fields | {"place": shelf.place(entry.name)}
