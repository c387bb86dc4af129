"""`jcrosslora compare`: how two bases are related."""

from dataclasses import dataclass

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json


@dataclass(frozen=True)
class Compare:
    """Say how two base models are related, from their weights: same, quantised, trained, pruned, ..."""

    source: tyro.conf.Positional[str]
    """The base that an adapter comes from: a folder of safetensors, a GGUF file or a hub id."""
    target: tyro.conf.Positional[str]
    """The base that it would go to (same forms)."""
    source_revision: str | None = None
    """Hub revision of the source."""
    target_revision: str | None = None
    """Hub revision of the target."""
    json: bool = False
    """Print everything as JSON instead, tensor by tensor."""

    def run(self, console: Console) -> None:
        """Compare, and print the evidence and the relation."""
        from jcrosslora.checkpoint import open_base
        from jcrosslora.relation.base_comparison import compare_bases
        from jcrosslora.report.base_comparison import print_comparison

        source = open_base(self.source, revision=self.source_revision)
        relation = compare_bases(source, open_base(self.target, revision=self.target_revision))
        if self.json:
            print_json(relation.to_json())
        else:
            print_comparison(relation, console)
