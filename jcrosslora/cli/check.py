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
    base: str | None = None
    """Its base model: a folder of safetensors, a GGUF file or a hub id. What an engine reads can depend on the base's
    family, and on whether its output head is its embedding."""
    family: str | None = None
    """The base's family alone (llama, gemma2, ...), in place of --base. A moved adapter's report names it."""
    json: bool = False
    """Print the answers as JSON."""

    def run(self, console: Console) -> None:
        """Print one line for each engine."""
        from jcrosslora.adapter import check_engines
        from jcrosslora.checkpoint import open_base
        from jcrosslora.report.inspect import print_engines, reported_family

        base = None if self.base is None else open_base(self.base)
        family = base.family.name if base else self.family or reported_family(self.path)
        verdicts = check_engines(self.path, base_family=family, base_tied=base.tied if base else None)
        if self.json:
            print_json([asdict(one) for one in verdicts])
        else:
            print_engines(verdicts, console)
