"""The folder behind the lift table: trained adapters, moved adapters, prompts and further-trained bases.

Existing results are used again, so that a stopped run continues and adapters that were trained elsewhere can be added.
A moved adapter that was made from another trained adapter than the present one is refused. Changes of the package are
not
noticed: remove the folders that they concern.

    trained/TASK--BASE--seedN          an adapter trained on a base: the source's, and the target's (the oracle)
    moved/TASK--SOURCE--TARGET/ROW--seedN
    scores/TASK--SOURCE--TARGET/SPLIT--seedN/ROW.npz
    prompts/TASK--FIRST--N.jsonl       unlabelled prompts
    further/BASE--TASK[--dense]        a base's further-trained version, and beside it the adapter merged into it
    checkpoints/                       of the training under way
"""

import dataclasses
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from dense_training import train_dense
from lift_tasks import Row, Task, slug
from rich.console import Console
from safetensors import SafetensorError, safe_open
from written_task import written_example

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, find_adapter
from jcrosslora.evaluate import read_task
from jcrosslora.session.transfer import transfer_files
from jcrosslora.training import Example, TrainingSettings, read_examples, save_trained, train_lora
from jcrosslora.utils.files import write_whole

# Seed of the further training, apart from those of adapters, so that no adapter starts from the same factors.
_FURTHER_SEED = 1000


@dataclass(frozen=True)
class Base:
    """A base: what `jcl.open_base` takes, and the short name for its folders."""

    ref: str
    name: str

    @staticmethod
    def of(ref: str) -> "Base":
        """A base whose name is the last part of its path or id."""
        return Base(ref, slug(Path(ref).name.removesuffix(".gguf")))


@dataclass(frozen=True)
class Pair:
    """A direction: source and target base."""

    source: Base
    target: Base

    @property
    def name(self) -> str:
        """The name for folders."""
        return f"{self.source.name}--{self.target.name}"


@dataclass(frozen=True)
class Work:
    """The folder, and the settings of the trainings, whose seed is set for each adapter."""

    folder: Path
    settings: TrainingSettings
    console: Console

    def trained(self, task: Task, base: Base, seed: int) -> Path:
        """Train an adapter on a base for a task, unless it exists.

        Raises:
            UsageError: it exists, but was trained with other settings.
            JCrossLoRAError: it cannot be trained.
        """
        out = self.folder / "trained" / f"{task.name}--{base.name}--seed{seed}"
        settings = dataclasses.replace(self.settings, seed=seed)
        self._train(base.ref, task.examples, settings, out, {"task": task.name, "first": task.first}, train_lora)
        return out

    def moved(self, task: Task, pair: Pair, row: Row, seed: int) -> Path:
        """Move the source's adapter to the target by the row's method, unless the moved adapter exists.

        Raises:
            MethodError, PairingError: the row's method is not defined for this pair.
            UsageError: it exists, but was moved from another adapter.
            JCrossLoRAError: the move fails.
        """
        out = self.moved_folder(task, pair, row, seed)
        if out.exists():
            check_moved_from(out, self.trained(task, pair.source, seed))
            return out
        started = time.monotonic()
        settings = jcl.TransferSettings.of(
            adapter=str(self.trained(task, pair.source, seed)),
            source=pair.source.ref,
            target=pair.target.ref,
            out=str(out),
            seed=seed,
            prompts=self._prompts_file(task, row),
            **row.settings,
        )
        result = transfer_files(settings)
        self._say(f"{row.name}, seed {seed}: moved in {time.monotonic() - started:.0f} s. {result.verdict.text}")
        _forget()
        return out

    def moved_folder(self, task: Task, pair: Pair, row: Row, seed: int) -> Path:
        """Return the folder of a moved adapter."""
        return self.folder / "moved" / f"{task.name}--{pair.name}" / f"{row.slug}--seed{seed}"

    def scores(self, task: Task, pair: Pair, split: str, seed: int) -> Path:
        """Return the folder of the scores of all rows of one seed."""
        return self.folder / "scores" / f"{task.name}--{pair.name}" / f"{split}--seed{seed}"

    def further_trained(
        self, base: Base, file: Path, rank: int, steps: int, *, written: bool = False, dense_rate: float | None = None
    ) -> Base:
        """Train a base further on all of a task file, unless that exists: a LoRA of a larger rank, merged into it.

        Args:
            base: the base.
            file: of questions with choices.
            rank: of the LoRA.
            steps: of the training.
            written: whether to train on written answers (`written_task.py`).
            dense_rate: train all weights of the modules at this rate instead of a LoRA (`dense_training.py`).

        Raises:
            UsageError: it exists, but was trained with other settings.
            JCrossLoRAError: it cannot be trained or written.
        """
        name = f"{file.stem}_written" if written else file.stem
        out = self.folder / "further" / f"{base.name}--{slug(name)}{'' if dense_rate is None else '--dense'}"
        adapter = out.with_name(f"{out.name}--adapter")
        examples = [written_example(one) for one in read_task(file)] if written else read_examples(file)
        settings = dataclasses.replace(self.settings, rank=rank, alpha=2.0 * rank, steps=steps, seed=_FURTHER_SEED)
        facts, train = {"task": name, "first": len(examples)}, train_lora
        if dense_rate is not None:
            settings, train = dataclasses.replace(settings, rate=dense_rate), train_dense
        self._train(base.ref, examples, settings, adapter, facts, train)
        if not out.exists():
            self._say(f"merging {adapter.name} into {base.name}")
            # In float32: updates are smaller than the rounding of weights to bfloat16.
            jcl.merge(jcl.MergeSettings(base=base.ref, adapter=str(adapter), out=str(out), dtype="float32"))
            _forget()
        return Base(str(out), out.name)

    def _train(
        self,
        ref: str,
        examples: Sequence[Example],
        settings: TrainingSettings,
        out: Path,
        facts: Mapping[str, Any],
        train: Callable[..., Adapter],
    ) -> None:
        made = {**dataclasses.asdict(settings), **facts}
        if out.exists():
            check_same(out, made)
            return
        self._say(f"training {out.name}: {settings.steps} steps on {len(examples)} examples")
        base, checkpoints = jcl.open_base(ref), self.folder / "checkpoints" / out.name
        adapter = train(base, examples, settings, checkpoints=checkpoints)
        save_trained(adapter, out, base, made)
        shutil.rmtree(checkpoints, ignore_errors=True)
        _forget()

    def _prompts_file(self, task: Task, row: Row) -> str | None:
        path = self._prompts(task, row.prompts) if row.prompts else row.text
        return None if path is None else str(path)

    def _prompts(self, task: Task, count: int) -> Path:
        path = self.folder / "prompts" / f"{task.name}--{task.first}--{count}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{json.dumps({'text': text})}\n" for text in task.prompts(count))
            write_whole(path, lines.encode())
        return path

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def check_same(adapter: Path, made: Mapping[str, Any]) -> None:
    """Refuse an adapter whose metadata has other settings than asked for; settings that are missing there are accepted.

    The task is not compared: `jcrosslora train` names it by its file.

    Raises:
        UsageError: a setting differs, or the file cannot be read.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.exists():  # of a format without metadata
        return
    try:
        with safe_open(path, framework="numpy") as file:
            stated = json.loads((file.metadata() or {}).get("jcrosslora.training", "{}"))
    except (SafetensorError, ValueError) as error:
        msg = f"{path}: cannot be read ({error}): remove its folder, and it will be trained again"
        raise jcl.UsageError(msg) from error
    wanted = json.loads(json.dumps(made))
    for key in sorted((stated.keys() & wanted.keys()) - {"task"}):
        if stated[key] != wanted[key]:
            msg = f"{adapter}: was trained with {key} {stated[key]}, {wanted[key]} is asked for: remove it, or ask so"
            raise jcl.UsageError(msg)


def check_moved_from(moved: Path, source: Path) -> None:
    """Refuse a moved adapter that was made from another one than the present one at `source`.

    Raises:
        UsageError: the digest in its report differs; an adapter without a report is accepted.
    """
    report = moved / "transfer_report.json"
    if not report.exists():
        return
    stated = json.loads(report.read_text(encoding="utf-8"))["adapter"]["digest"]
    with find_adapter(source).weights.open("rb") as file:
        own = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    if stated != own:
        msg = f"{moved}: was not moved from what lies in {source} now: remove it, and it will be made again"
        raise jcl.UsageError(msg)


def _forget() -> None:
    """Free weights and compiled code between jobs, so that memory is bounded by one of them."""
    gc.collect()
    jax.clear_caches()
