"""Run tasks of lm-evaluation-harness by name on a base alone and with adapters (`evaluate --tasks`)."""

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import cause_of, public_names, reaches_hub
from jcrosslora.decoder import load_model
from jcrosslora.errors import UsageError, suggestion
from jcrosslora.utils.progress import track

_LOG = logging.getLogger("lm_eval")
_PATTERN = frozenset("*?[")  # in names such as arc_*, which stand for several
# The words of YAML files, which include the names of all tasks; and most of these names, to suggest one.
_WORDS = re.compile(rb"""[^\s"',\[\]]+""")
_NAMES = re.compile(rb"""^[ \t]*["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s"'#\[]+)""", re.MULTILINE)


@dataclass(frozen=True)
class TaskFigure:
    """A metric of a task under A models: the base first, then its adapters.

    Attributes:
        metric: its name, behind a comma the harness's filter of the answers where it has one.
        examples: how many were judged; None for the mean of a group of tasks, as the next one.
        shots: worked examples in front of each.
        values: (A,), as the harness gives them.
        stderrs: (A,), standard errors; None where the harness gives none.
    """

    task: str
    metric: str
    examples: int | None
    shots: int | None
    values: tuple[float, ...]
    stderrs: tuple[float | None, ...]


class Tasks:
    """Tasks of lm_eval by name, and of the user's own from the YAML files of a folder, with their data."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        """Check the names without importing lm_eval, which takes some seconds and lists its tasks for some more.

        Raises:
            UsageError: lm_eval is not installed, no task was named, or one is unknown.
        """
        if include_path is not None and not include_path.is_dir():
            msg = f"include-path {include_path}: is no folder: give the one that holds the YAML files of your tasks"
            raise UsageError(msg)
        if not names:
            raise UsageError("no task was named: give names of lm_eval's tasks, such as arc_easy,hellaswag")
        self.names, self._folder = list(dict.fromkeys(names)), include_path
        if include_path is None:
            _check_names(self.names)

    def load(self) -> None:
        """Find the tasks and load their data, before any weights are read.

        Raises:
            UsageError: a task is unknown, or its data cannot be had.
        """
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars would run through our line
        self.model = importlib.import_module("jcrosslora.evaluate.harness_model").JCrossLoRALM
        if not _LOG.isEnabledFor(logging.INFO):
            _LOG.setLevel(logging.ERROR)  # it warns of defaults in its own task files
        self._manager = self._find(self._folder)
        matched = (one for name in self.names for one in self._manager.match_tasks([name]))  # name may be arc_*
        self.names = list(dict.fromkeys(matched))
        self._load_data()

    def judge(
        self, base: BaseModel, adapters: Sequence[Adapter], *, limit: int | None = None, num_fewshot: int | None = None
    ) -> list[TaskFigure]:
        """Run all tasks on the base and on the base with each adapter.

        `limit` is the number of examples of each task, and `num_fewshot` of the worked examples in front of each; None
        leaves both to the task.
        """
        settings = {"limit": limit, "num_fewshot": num_fewshot, "task_manager": self._manager, "log_samples": False}
        weights, found = load_model(base), []
        with track(1 + len(adapters), "evaluate", "models") as bar:
            for adapter in (None, *adapters):
                model = self.model(base, adapter, model=weights, bars=False)
                found.append(importlib.import_module("lm_eval").simple_evaluate(model, tasks=self.names, **settings))
                bar.update()
        return list(_figures(found))

    def _find(self, include_path: Path | None) -> Any:
        """Return what knows the tasks: the folder alone where it has them all, as lm_eval's own take 7 s to list."""
        manage = importlib.import_module("lm_eval.tasks").TaskManager
        folder = None if include_path is None else str(include_path)
        manager = manage(include_path=folder, include_defaults=False)
        if others := self._unknown(manager):
            _check_names(others, manager.all_tasks)
            with track(1, "list the tasks of lm_eval"):
                manager = manage(include_path=folder)
        for name in self._unknown(manager):
            raise _unknown_task(name, manager.all_tasks)
        return manager

    def _unknown(self, manager: Any) -> list[str]:
        return [name for name in self.names if not manager.match_tasks([name])]

    def _load_data(self) -> None:
        online = reaches_hub()
        if not online:  # else each file would be tried for 20 s
            importlib.import_module("datasets").config.HF_HUB_OFFLINE = True
        load = getattr(self._manager, "load", None) or self._manager.load_task_or_group
        for name in self.names:
            try:
                load([name])
            except Exception as error:  # of lm_eval, of datasets, or of the code of a task
                why = f"task {name!r} cannot be loaded ({cause_of(error)}): "
                advice = "see that its file and its data are there and right"
                if not online:
                    advice = "its data is not in the cache, and the hub cannot be reached: check the network"
                raise UsageError(why + advice) from error


def _check_names(names: Sequence[str], others: Iterable[str] = ()) -> None:
    """Refuse a name that is no word of lm_eval's task files; `others` may be suggested in its place.

    Whether a word of them is the name of a task is only known when lm_eval has listed its tasks.
    """
    text = _task_files()
    words = set(_WORDS.findall(text))
    for name in names:
        if not _PATTERN.intersection(name) and name.encode() not in words:
            raise _unknown_task(name, [*others, *(found.decode(errors="replace") for found in _NAMES.findall(text))])


def _task_files() -> bytes:
    """Read the task files of lm_eval, 8 MB; those that others include end in _yaml or have no ending.

    Raises:
        UsageError: lm_eval is not installed.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise UsageError("--tasks needs the lm_eval package, which is not installed: pip install 'jcrosslora[eval]'")
    texts = []
    for folder, _, names in os.walk(Path(found.submodule_search_locations[0]) / "tasks"):
        texts += [Path(folder, name).read_bytes() for name in names if "yaml" in name or "." not in name]
    return b"\n".join(texts)


def _unknown_task(name: str, known: Iterable[str]) -> UsageError:
    if Path(name).is_file():
        msg = f"--tasks takes names of lm_eval's tasks, and {name} is a file: give it with --data, or the folder "
        return UsageError(msg + "of a task file with --include-path")
    said = f"task {name!r} is unknown to lm_eval{suggestion(name, known)}"
    msg = f"{said}: `lm_eval ls tasks` lists all; the folder of a task file of yours is given with --include-path"
    return UsageError(msg)


def _figures(found: Sequence[dict[str, Any]]) -> Iterator[TaskFigure]:
    """Yield the figures of all models, task by task."""
    for task, metrics in found[0]["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            each = [one["results"][task] for one in found]
            stderrs = [one.get(f"{name}_stderr,{kind}") for one in each]
            yield TaskFigure(
                task,
                name if kind == "none" else key,
                found[0].get("n-samples", {}).get(task, {}).get("effective"),
                found[0].get("n-shot", {}).get(task),
                tuple(float(one[key]) for one in each),
                tuple(float(one) if isinstance(one, int | float) else None for one in stderrs),
            )


def figures_json(figures: Sequence[TaskFigure], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the figures as JSON data; `names` are those of the models, the base first."""
    return [
        {
            **{name: getattr(one, name) for name in ("task", "metric", "examples", "shots")},
            "models": [
                {"name": name, "value": value, "stderr": stderr}
                for name, value, stderr in zip(public_names(names), one.values, one.stderrs, strict=True)
            ],
        }
        for one in figures
    ]


def print_figures(figures: Sequence[TaskFigure], names: Sequence[str], console: Console) -> None:
    """Print a row for each figure and a column for each model: "base", then the names of the adapters."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("task", "n", "shots", "metric", "base", *public_names(names[1:])):
        left = title in ("task", "metric")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for one in figures:
        counts = ("" if count is None else f"{count:,}" for count in (one.examples, one.shots))
        table.add_row(one.task, *counts, one.metric, *map(_shown, one.values, one.stderrs))
    console.print(table, highlight=False, markup=False)
    console.print("value ± standard error, as lm_eval gives them", highlight=False)


def _shown(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
