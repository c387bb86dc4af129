"""`jcrosslora inspect`: what a path holds."""

from dataclasses import dataclass

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json


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
