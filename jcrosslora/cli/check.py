"""`jcrosslora check`: which engines read an adapter."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json, say


@dataclass(frozen=True)
class Check:
    """Say which engines will read an adapter, and why others will not."""

    path: tyro.conf.Positional[Path]
    """The adapter: a folder of PEFT or MLX, or a GGUF file of llama.cpp."""
    family: str | None = None
    """Family of its base model (llama, gemma2, ...), where an engine's answer depends on it. A moved adapter's report
    names it."""
    base: str | None = None
    """The base that it is for: a folder, a GGUF file or a hub id. Every module of the adapter is looked up in it: one
    that is not there, or is called otherwise, would load and do nothing."""
    json: bool = False
    """Print the answers as JSON."""

    def run(self, console: Console) -> None:
        """Print one line for each engine."""
        from jcrosslora.adapter import check_engines
        from jcrosslora.checkpoint import open_base
        from jcrosslora.report.inspect import print_engines, reported_family

        base = None if self.base is None else open_base(self.base)
        verdicts = check_engines(self.path, base_family=self.family or reported_family(self.path), base=base)
        if self.json:
            print_json([asdict(one) for one in verdicts])
        else:
            print_engines(verdicts, console)
            if base is None:
                say(console, "modules: not looked up in the base; name it with --base")
