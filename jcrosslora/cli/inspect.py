"""`jcrosslora inspect`, `compare`, `check` and `methods`: what adapters, bases, engines and methods are."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console

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
        from jcrosslora.report.inspect import print_engines, reported_family

        base = None if self.base is None else open_base(self.base)
        verdicts = check_engines(self.path, base_family=self.family or reported_family(self.path), base=base)
        if self.json:
            print_json([asdict(one) for one in verdicts])
        else:
            print_engines(verdicts, console)
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
        from jcrosslora.report.inspect import print_methods

        if self.json:
            keys = ("name", "summary", "needs", "reference")
            print_json([{key: getattr(method(), key) for key in keys} for method in METHODS.values()])
        else:
            print_methods(console)
