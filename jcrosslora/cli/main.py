"""The command line: parse, call, print. Everything it does can be done from Python as well."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

# JAX on a CPU calls LAPACK from threads of its own; OpenBLAS's spinning ones beside them only take the cores away.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Without torch, which nothing here needs, transformers says on import that there are no models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import tyro
from rich.console import Console

from jcrosslora.cache.compiled import keep_compiled
from jcrosslora.cli.cache import CacheCommand
from jcrosslora.cli.demo import Demo
from jcrosslora.cli.transfer_flags import method_flags, setting_flags
from jcrosslora.distributed.join import join, leave
from jcrosslora.errors import BatchError, JCrossLoRAError, LostHostError, UsageError
from jcrosslora.export.export import ExportSettings
from jcrosslora.export.merge import MergeSettings
from jcrosslora.session.settings import OWN_FIELDS, TransferSettings
from jcrosslora.session.settings_file import check_settings, read_toml
from jcrosslora.utils.attribute_docs import attribute_docs
from jcrosslora.utils.memory import enough_memory

S = TypeVar("S")


@dataclass(frozen=True)
class _TransferExtras:
    """Move an adapter to another base model."""

    recipe: Path | None = None
    """A TOML file with any of these settings, by the same names (with _ for -); flags given here come first."""
    table: Literal["role", "module", "none"] = "role"
    """How detailed a table to print; the full account is in transfer_report.json."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes that make one transfer together; auto where the cluster tells."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0; process 0 writes."""

    def run(self, console: Console) -> None:
        """Transfer, then print the table and the verdict."""
        join(self.coordinator, self.processes, self.process)
        from jcrosslora.distributed import hosts
        from jcrosslora.report.table import print_report
        from jcrosslora.session.files import transfer_files

        result = transfer_files(self.settings(), progress=sys.stderr.isatty() and hosts.is_first())
        if not hosts.is_first():
            return
        if self.table != "none":
            print_report(result.report, console, by_module=self.table == "module")
        _say(console, f"written: {self.out}")  # type: ignore[attr-defined]

    def settings(self) -> TransferSettings:
        """Return the settings among the flags; hyper-parameters that were not given are left to the method."""
        extras = {field.name for field in fields(_TransferExtras)}
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in extras}
        return TransferSettings.of(
            **{name: value for name, value in given.items() if name in OWN_FIELDS or value is not None}
        )


_extras = [
    (
        field.name,
        Annotated[field.type, tyro.conf.arg(help=attribute_docs(_TransferExtras)[field.name])],
        dataclasses.field(default=field.default),
    )
    for field in fields(_TransferExtras)
]
Transfer: Any = dataclasses.make_dataclass(
    "Transfer", [*setting_flags(), *method_flags(), *_extras], bases=(_TransferExtras,), frozen=True, kw_only=True
)
Transfer.__doc__ = _TransferExtras.__doc__


@dataclass(frozen=True)
class Export(ExportSettings):
    """Write an adapter again for the base that it has: for another engine, at another rank, or several as their sum."""

    adapter: tyro.conf.Positional[tuple[str, ...]]

    def run(self, console: Console) -> None:
        """Export, then say what was lost."""
        from jcrosslora.export.export import export_adapter

        exported = export_adapter(_settings(self, ExportSettings))
        for sentence in exported.losses:
            _say(console, f"lost: {sentence}")
        if exported.cut is not None:
            _say(console, f"cut: {exported.cut.sentence}")
        if exported.magnitudes is not None:
            _say(console, f"kept: a DoRA, with the magnitudes of its {len(exported.magnitudes)} modules")
        for sentence in exported.adapter.info.ignored:
            _say(console, f"not written: {sentence}")
        _say(console, f"written: {self.out}")


@dataclass(frozen=True)
class Merge(MergeSettings):
    """Merge an adapter into its base: a checkpoint of its own, for engines that take no adapters."""

    base: tyro.conf.Positional[str]
    adapter: tyro.conf.Positional[str]

    def run(self, console: Console) -> None:
        """Merge, then say what is not in it."""
        from jcrosslora.export.merge import merge

        merged = merge(_settings(self, MergeSettings), progress=sys.stderr.isatty())
        for sentence in merged.notes:
            _say(console, sentence)
        _say(console, f"written: {merged.folder} ({merged.modules} modules changed)")


@dataclass(frozen=True)
class Inspect:
    """Show what an adapter or a base model is: family, shapes, ranks, norms, what can be moved and what cannot."""

    path: tyro.conf.Positional[str]
    """A folder or GGUF file of an adapter or of a base model, or a hub id."""
    revision: str | None = None
    """Hub revision."""
    base: str | None = None
    """The base of an adapter, which some kinds (DoRA, PiSSA, ...) are no update without."""

    def run(self, console: Console) -> None:
        """Print the description."""
        from jcrosslora.report.inspect import inspect

        inspect(self.path, console, revision=self.revision, base=self.base)


@dataclass(frozen=True)
class Compare:
    """Say what two base models have to do with each other, from their weights: same, quantised, trained, pruned, ..."""

    source: tyro.conf.Positional[str]
    """The base that an adapter comes from: a folder of safetensors, a GGUF file or a hub id."""
    target: tyro.conf.Positional[str]
    """The base that it would go to, likewise."""
    source_revision: str | None = None
    """Hub revision of the source."""
    target_revision: str | None = None
    """Hub revision of the target."""
    json: bool = False
    """Print everything as JSON instead, tensor by tensor."""

    def run(self, console: Console) -> None:
        """Compare, and print the evidence and the relation."""
        import json

        from jcrosslora.checkpoint import open_base
        from jcrosslora.lineage.base_comparison import compare_bases
        from jcrosslora.report.base_comparison import print_comparison

        source = open_base(self.source, revision=self.source_revision)
        relation = compare_bases(source, open_base(self.target, revision=self.target_revision))
        if self.json:
            print(json.dumps(relation.to_json(), indent=2, allow_nan=False))
        else:
            print_comparison(relation, console)


@dataclass(frozen=True)
class Check:
    """Say which engines will read an adapter, and why not."""

    path: tyro.conf.Positional[Path]
    """The adapter: a folder of PEFT or MLX, or a GGUF file of llama.cpp."""
    family: str | None = None
    """Family of its base model (llama, gemma2, ...), where an engine's answer depends on it; a moved adapter tells."""

    def run(self, console: Console) -> None:
        """Print one line for each engine."""
        from jcrosslora.adapter import check_engines
        from jcrosslora.report.inspect import print_engines, reported_family

        family = self.family or reported_family(self.path)
        print_engines(check_engines(self.path, base_family=family), console)


@dataclass(frozen=True)
class Evaluate:
    """Score a base, alone and with adapters, on multiple-choice questions; say for each whether it is better."""

    base: str
    """The base model: a folder of safetensors, a GGUF file or a hub id."""
    task: Path
    """JSONL with question, choices and answer (the index of the right choice), one question a line."""
    adapter: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Adapters of this base, scored beside each other."""
    limit: int | None = None
    """Only the first so many questions."""

    def run(self, console: Console) -> None:
        """Print each figure with its interval, and the difference to the base."""
        from jcrosslora.adapter import load_adapter
        from jcrosslora.adapter.ignored import token_update_sentences
        from jcrosslora.checkpoint import open_base
        from jcrosslora.evaluate import print_scores, read_task, score

        questions = read_task(self.task)
        if self.limit is not None and self.limit < 1:
            msg = f"limit {self.limit} is out of range; it must be at least 1"
            raise UsageError(msg)
        base = open_base(self.base)
        adapters = [load_adapter(ref, base) for group in self.adapter for ref in group]
        for adapter in adapters:
            for sentence in token_update_sentences(adapter.tokens, "bases are run without it"):
                _say(console, f"not scored: {adapter.info.name}: {sentence}")
        print_scores(score(base, questions[: self.limit], adapters, progress=sys.stderr.isatty()), console)


@dataclass(frozen=True)
class Batch:
    """Do many transfers by a plan: every pair of bases is aligned once, and what is done is not done again."""

    plan: tyro.conf.Positional[Path]
    """A TOML file: out, [bases], [adapters] and [[moves]]; see the README."""
    shard: str = "1/1"
    """i/n: do only the i-th of n parts, for n runs side by side."""
    dry_run: bool = False
    """Only show the jobs, those that are done included, with an estimate of time and memory."""
    overwrite: bool = False
    """Replace adapter folders that are there but were made from other input."""
    ray: str | None = None
    """Do it by the workers of a Ray cluster: HOST:PORT, auto for the one that this machine belongs to, or local."""
    ray_cpus: float | None = None
    """CPUs of a worker; all that the smallest machine has if not given."""
    ray_gpus: float | None = None
    """GPUs of a worker; all that the smallest machine with any has if not given."""

    def run(self, console: Console) -> None:
        """Run or show the plan, and print what became of each job."""
        from jcrosslora.batch import print_estimates, read_plan, run_batch, run_on_ray

        plan, shard = read_plan(self.plan), _shard(self.shard)
        if self.dry_run:
            print_estimates(plan, console, shard=shard)
            return
        shared: dict[str, Any] = {"shard": shard, "overwrite": self.overwrite, "progress": sys.stderr.isatty()}
        try:
            if self.ray is None:
                summary = run_batch(plan, **shared)
            else:
                summary = run_on_ray(plan, address=self.ray, cpus=self.ray_cpus, gpus=self.ray_gpus, **shared)
        except KeyboardInterrupt:
            sys.exit(_fail("interrupted; what is done stays, and the same command goes on from there", 130))
        summary.print_to(console)
        if failed := summary.count("failed"):
            msg = f"{failed} of {len(summary.outcomes)} jobs failed; their reasons are above and in the summary"
            raise BatchError(msg)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _settings(command: Any, kind: type[S]) -> S:
    """The settings among the fields of a command."""
    return kind(**{field.name: getattr(command, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        msg = f"shard {text!r} is not of the form i/n, such as 1/4"
        raise UsageError(msg)
    return int(index), int(count)


@dataclass(frozen=True)
class Methods:
    """List the transfer methods: name, what each needs, where it is published."""

    def run(self, console: Console) -> None:
        """Print the registry."""
        from jcrosslora.report.inspect import print_methods

        print_methods(console)


COMMANDS = {
    "transfer": Transfer,
    "export": Export,
    "merge": Merge,
    "inspect": Inspect,
    "compare": Compare,
    "check": Check,
    "evaluate": Evaluate,
    "batch": Batch,
    "methods": Methods,
    "cache": CacheCommand,
    "demo": Demo,
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `jcrosslora`. Exits with 0, with 2 after an error of the user's, or with 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if args is None else args)
    if args is None:  # a process of our own, not someone's Python
        keep_compiled()
    # A table cut to 80 columns because it goes to a file would lose figures.
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        with enough_memory():
            _parse(arguments).run(console)
    except LostHostError as error:
        leave(_fail(str(error), 2))
    except JCrossLoRAError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        code = _fail("interrupted; nothing was written", 130)
        if args is None:
            leave(code)
        sys.exit(code)


def _fail(text: str, code: int) -> int:
    print(f"jcrosslora: {' '.join(text.split())}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Any:
    recipe = _recipe(arguments)
    options: Any = None
    for name, command in COMMANDS.items():
        default = _with_defaults(recipe) if command is Transfer and recipe else tyro.MISSING_NONPROP
        entry = Annotated[command, tyro.conf.subcommand(name, default=default)]
        options = entry if options is None else options | entry
    return tyro.cli(options, args=arguments, prog="jcrosslora", description="Move LoRA adapters between base models.")


def _recipe(arguments: list[str]) -> dict[str, Any]:
    """The settings of the recipe file named on the command line, {} without one."""
    for place, argument in enumerate(arguments):
        if argument == "--recipe" and place + 1 < len(arguments):
            return _read_recipe(Path(arguments[place + 1]))
        if argument.startswith("--recipe="):
            return _read_recipe(Path(argument.removeprefix("--recipe=")))
    return {}


def _read_recipe(path: Path) -> dict[str, Any]:
    settings = read_toml(path, "recipe", 'method = "cross-lora"')
    check_settings(settings, f"recipe {path}")
    return settings


def _with_defaults(recipe: dict[str, Any]) -> Any:
    required = [field.name for field in fields(TransferSettings) if field.default is MISSING]
    return Transfer(**({name: tyro.MISSING for name in required} | recipe))


if __name__ == "__main__":
    main()
