"""`jcrosslora check`: which engines read an adapter."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json


@dataclass(frozen=True)
class Check:
    """Say which engines will read an adapter, and why others will not."""

    path: tyro.conf.Positional[Path]
    """The adapter: a folder of PEFT or MLX, or a GGUF file of llama.cpp."""
    family: str | None = None
    """Family of its base model (llama, gemma2, ...), where an engine's answer depends on it. A moved adapter's report
    names it."""
    json: bool = False
    """Print the answers as JSON."""

    def run(self, console: Console) -> None:
        """Print one line for each engine."""
        from jcrosslora.adapter import check_engines
        from jcrosslora.report.inspect import print_engines, reported_family

        verdicts = check_engines(self.path, base_family=self.family or reported_family(self.path))
        if self.json:
            print_json([asdict(one) for one in verdicts])
        else:
            print_engines(verdicts, console)
