"""`jcrosslora inspect`, `check` and `methods`: what adapters, bases, engines and methods are."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from jcrosslora.cli.output import print_json, say


@dataclass(frozen=True)
class Inspect:
    """Show what an adapter or a base model is: family, shapes, ranks, norms, what can be moved and what cannot."""

    path: tyro.conf.Positional[str]
    """A folder or GGUF file of an adapter or of a base model, or a hub id."""
    revision: str | None = None
    """Hub revision."""
    base: str | None = None
    """The base of an adapter. Some kinds (DoRA, PiSSA, ...) are an update only together with it."""
    json: bool = False
    """Print the description as JSON."""

    def run(self, console: Console) -> None:
        """Print the description."""
        from jcrosslora.report.inspect import describe, open_any, print_description

        found = open_any(self.path, revision=self.revision, base=self.base)
        if self.json:
            print_json(describe(found))
        else:
            print_description(found, console)


@dataclass(frozen=True)
class Check:
    """Say which engines will read an adapter, and why others will not."""

    path: tyro.conf.Positional[Path]
    """The adapter: a folder of PEFT or MLX, or a GGUF file of llama.cpp."""
    base: str | None = None
    """The base that it is for: a folder, a GGUF file or a hub id. Every module of the adapter is looked up in it: one
    that is not there, or is called otherwise, would load and do nothing. What an engine reads can depend on the base's
    family, and on whether its output head is its embedding."""
    family: str | None = None
    """Family of its base model (llama, gemma2, ...), where an engine's answer depends on it. A moved adapter's report
    names it."""
    json: bool = False
    """Print the answers as JSON."""

    def run(self, console: Console) -> None:
        """Print one line for each engine."""
        from jcrosslora.adapter import check_engines
        from jcrosslora.checkpoint import open_base
        from jcrosslora.report.inspect import reported_family

        base = None if self.base is None else open_base(self.base)
        verdicts = check_engines(self.path, base_family=self.family or reported_family(self.path), base=base)
        if self.json:
            print_json([asdict(one) for one in verdicts])
        else:
            table = Table("engine", "reads it", "reasons and notes")
            for one in verdicts:
                table.add_row(one.engine, "yes" if one.reads else "no", "\n".join((*one.reasons, *one.notes)))
            console.print(table, highlight=False, markup=False)
            if base is None:
                say(console, "modules: not looked up in the base; name it with --base")


@dataclass(frozen=True)
class Methods:
    """List the transfer methods: name, what each does and needs, where it is published."""

    json: bool = False
    """Print the list as JSON."""

    def run(self, console: Console) -> None:
        """Print the registry."""
        from jcrosslora.methods import METHODS

        found = [kind() for kind in METHODS.values()]
        if self.json:
            keys = ("name", "summary", "needs", "reference")
            print_json([{key: getattr(method, key) for key in keys} for method in found])
            return
        table = Table("method", "what it does", "needs", "reference")
        for method in found:
            table.add_row(method.name, method.summary, method.needs, method.reference)
        console.print(table, highlight=False, markup=False)
