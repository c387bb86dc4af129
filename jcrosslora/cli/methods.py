"""`jcrosslora methods`: the registry of methods."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jcrosslora.cli.output import print_json


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
