"""`jcrosslora methods`: the registry of methods."""

from dataclasses import dataclass

from rich.console import Console

from jcrosslora.cli.output import print_json


@dataclass(frozen=True)
class Methods:
    """List the transfer methods: name, what each does and needs, where it is published."""

    json: bool = False
    """Print the list as JSON."""

    def run(self, console: Console) -> None:
        """Print the registry."""
        from jcrosslora.methods import METHODS
        from jcrosslora.report.inspect import print_methods

        if self.json:
            keys = ("name", "summary", "needs", "reference")
            print_json([{key: getattr(method(), key) for key in keys} for method in METHODS.values()])
        else:
            print_methods(console)
