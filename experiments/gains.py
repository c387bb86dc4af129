"""Answer test items with a moved adapter and with all that it is compared with, item by item, for shares of the gain.

    python experiments/gains.py --source SOURCE --target TARGET --data DIR --task snips --work WORK [--seed 0]
        [--prompts 200 0] [--method distill] [--control cross-lora --control random --control copy] [--torch]
        [--limit 500]

DIR holds `TASK_train.jsonl` and `TASK_test.jsonl`: conversations, prompts with answers, or questions with choices. A
LoRA adapter is trained on the source and one on the target, on the same examples; as in jobs.py the last 400 are kept
back, and the last 200 are prompts without answers. More than 200 prompts are filled up with those of training examples.
The rows, in the order in which they are made:

    base            the target alone
    source          the source with its adapter
    trained         the target with the adapter that was trained on it
    CONTROL         moved without prompts; a method that the two bases do not allow is left out
    answers         trained on the target on the source's greedy answers to the prompts, as the others are trained
    answers, torch  the same on the same answers in the same batches, by transformers and peft (`--torch`)
    METHOD          moved with each number of prompts

An item is right if each token of the right answer, the end included, is the likeliest, so that the model would write
it greedily; of a question, if the right choice is the likeliest. A line of JSON for each row goes to WORK/gains.jsonl
as soon as it is known. Lines, adapters, scores and states of trainings in WORK are used again, also by other pairs of
bases: the same command continues a stopped run. `gain_table.py` makes the table of all lines.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jobs import HELD_BACK, greedy_answers, move, train
from lift_scores import read_arrays, write_arrays
from lift_tasks import slug
from result_lines import GainLine, append, commit, read_lines, versions
from scripts import as_command, score_answers
from torch_training import train_by_peft

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Model, StackedAdapter, fast_dtype, load_model, stack_adapter
from jcrosslora.evaluate import Question, score
from jcrosslora.evaluate.examples import Example, as_completion
from jcrosslora.training import TrainingSettings, read_examples
from jcrosslora.training.batches import encode
from jcrosslora.utils.digests import sha256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "task"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, nargs="+", default=[200, 0], help="numbers of unlabelled prompts")
    parser.add_argument("--method", action="append", default=[], help="METHOD or METHOD:KEY=VALUE,...; distill if none")
    parser.add_argument("--control", action="append", default=[], help="a method that is run without prompts alone")
    parser.add_argument("--torch", action="store_true", help="train on the source's answers by peft as well")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--limit", type=int, default=500, help="items that are answered")
    parser.add_argument("--steps", type=int, default=TrainingSettings().steps)
    return parser.parse_args()


@dataclass(frozen=True)
class Side:
    """A base that answers items, and the folder of what it answered."""

    ref: str
    items: Sequence[Example]
    folder: Path

    @cached_property
    def base(self) -> jcl.BaseModel:
        """The opened base."""
        return jcl.open_base(self.ref)

    @cached_property
    def name(self) -> str:
        """The last part of its path, as a file name."""
        return slug(Path(self.ref).name.removesuffix(".gguf"))

    @cached_property
    def _model(self) -> tuple[Model, Tokenizer]:
        return load_model(self.base, fast_dtype()), load_tokenizer(self.base)

    def judged(self, path: Path | None) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each item is right, and its NLL a character, with an adapter or alone; kept on disk."""
        adapter = None if path is None else jcl.load_adapter(path, self.base)
        own = "none" if adapter is None else adapter.info.digest
        made = f"base {self.base.digest()}, adapter {own}, items {sha256(repr(self.items).encode())}"
        file = self.folder / f"{self.name}--{sha256(made.encode())[:16]}.npz"
        found = read_arrays(file, made)
        if not found:
            right, nll = (self._choose if isinstance(self.items[0], Question) else self._write)(adapter)
            write_arrays(file, made, found := {"right": right, "nll": nll})
        return found["right"], found["nll"]

    def _choose(self, adapter: jcl.Adapter | None) -> tuple[np.ndarray, np.ndarray]:
        model, tokenizer = self._model
        questions = [one for one in self.items if isinstance(one, Question)]
        found = score(self.base, questions, [adapter] if adapter else [], model=model, tokenizer=tokenizer)
        return found.by_question("accuracy")[-1] == 1, found.by_question("nll_per_char")[-1]

    def _write(self, adapter: jcl.Adapter | None) -> tuple[np.ndarray, np.ndarray]:
        model, tokenizer = self._model
        items = [as_completion(one) for one in self.items]
        encoded = [encode(tokenizer, one) for one in items]
        update = StackedAdapter({}) if adapter is None else stack_adapter(adapter, self.base)
        sums, written = score_answers(model, update, encoded)
        return written, -sums / [len(one.answer.strip()) for one in items]


@dataclass(frozen=True)
class Row:
    """A row: its name, its prompts, the side that answers, and the adapter with what makes it."""

    name: str
    prompts: int
    side: Side
    adapter: Path | None = None
    make: Callable[[], None] | None = None


def made(out: Path, make: Callable[[], None] | None) -> dict[str, Any]:
    """Make a folder unless it is there; return the seconds that it took and the commit that it was made at."""
    note = out.with_name(f"{out.name}.json")
    if not out.exists():
        assert make is not None
        start = time.monotonic()
        make()
        note.write_text(json.dumps({"seconds": round(time.monotonic() - start), "commit": commit()}))
    return json.loads(note.read_text()) if note.exists() else {}


class Run:
    """One task, pair of bases and seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        known = read_examples(arguments.data / f"{arguments.task}_train.jsonl")
        self.arguments, self.examples = arguments, known[:-HELD_BACK]
        unseen = known[-HELD_BACK // 2 :]
        self.given = [as_completion(one).prompt for one in [*unseen, *reversed(self.examples)]]
        test = known[-HELD_BACK : -HELD_BACK // 2]
        if arguments.split == "test":
            test = read_examples(arguments.data / f"{arguments.task}_test.jsonl")
        self.items = test[: arguments.limit]
        self.settings = TrainingSettings(steps=arguments.steps, seed=arguments.seed)
        self.source, self.target = (
            Side(ref, self.items, arguments.work / "scores") for ref in (arguments.source, arguments.target)
        )
        self.pair = arguments.work / f"{self.source.name}--{self.target.name}"

    def rows(self) -> Iterator[Row]:
        """Yield the rows in the order in which they are made."""
        arguments, target = self.arguments, self.target
        own, trained = (self.folder(side.name, arguments.work / "trained") for side in (self.source, target))
        yield Row("base", 0, target)
        yield Row("source", 0, self.source, own, partial(train, arguments.source, self.examples, self.settings, own))
        taught = partial(train, arguments.target, self.examples, self.settings, trained)
        yield Row("trained", 0, target, trained, taught)
        for method in arguments.control:
            yield self.moved(method, 0, own)
        for count in filter(None, arguments.prompts):
            out = self.folder(f"answers-{count}")
            said = cache(partial(self.answers, own, count))
            imitate = partial(self.imitate, said, partial(train, arguments.target), out)
            yield Row("answers", count, target, out, imitate)
            if arguments.torch:
                out = self.folder(f"answers-torch-{count}")
                by_peft = partial(self.imitate, said, partial(train_by_peft, arguments.target), out)
                yield Row("answers, torch", count, target, out, by_peft)
        for count in arguments.prompts:
            for method in arguments.method or ["distill"]:
                yield self.moved(method, count, own)

    def folder(self, name: str, parent: Path | None = None) -> Path:
        """Return the folder of an adapter of this task and seed."""
        return (parent or self.pair) / f"{self.arguments.task}--{slug(name)}--seed{self.arguments.seed}"

    def moved(self, method: str, count: int, own: Path) -> Row:
        """Return the row of a method."""
        out = self.folder(f"{method}-{count}")
        make = partial(move, own, self.arguments, method, self.given[:count], self.arguments.seed, out)
        return Row(method, count, self.target, out, make)

    def answers(self, own: Path, count: int) -> list[Example]:
        """Let the source answer the prompts, once, and keep those answers that end in a file."""
        path = self.folder(f"greedy-{count}").with_suffix(".jsonl")
        if not path.exists():
            found = greedy_answers(own, self.arguments.source, self.given[:count])
            lines = []
            for one in found:
                if isinstance(one.prompt, str):
                    entry: dict[str, Any] = {"prompt": one.prompt, "answer": one.answer.strip()}
                else:
                    said = {"role": "assistant", "content": one.answer}
                    entry = {"messages": [*map(asdict, one.prompt), said]}
                lines.append(json.dumps(entry) + "\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
        return read_examples(path)

    def imitate(self, said: Callable[[], list[Example]], trainer: Callable[..., None], out: Path) -> None:
        """Train on the source's answers."""
        trainer(said(), self.settings, out)

    def line(self, row: Row) -> GainLine:
        """Make, judge and describe a row."""
        note = {} if row.adapter is None else made(row.adapter, row.make)
        right, nll = row.side.judged(row.adapter)
        return GainLine(
            source=self.source.base.name,
            target=self.target.base.name,
            task=self.arguments.task,
            split=self.arguments.split,
            seed=self.arguments.seed,
            training_steps=self.arguments.steps,
            row=row.name,
            prompts=row.prompts,
            measure="accuracy" if isinstance(self.items[0], Question) else "exact",
            right="".join("1" if one else "0" for one in right),
            nll_per_char=[round(float(value), 4) for value in nll],
            seconds=note.get("seconds"),
            versions=dict(versions()),
            commit=note.get("commit", commit()),
        )


def run(arguments: argparse.Namespace) -> None:
    work, job = arguments.work, Run(arguments)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "gains.jsonl"
    there = {(one.key, len(one.right)) for one in read_lines(file, GainLine)} if file.exists() else set()
    names = job.source.base.name, job.target.base.name
    for row in job.rows():
        key = (*names, arguments.task, arguments.split, arguments.seed, row.name, row.prompts)
        if (key, len(job.items)) in there:
            continue
        try:
            line = job.line(row)
        except (jcl.MethodError, jcl.PairingError) as error:
            print(f"{row.name} is not defined: {error}", flush=True)
            continue
        append(file, [line])
        share, nll = line.right.count("1") / len(line.right), np.mean(line.nll_per_char)
        print(f"{arguments.task}, seed {arguments.seed}, {row.name}, {row.prompts} prompts: ", end="")
        print(f"{share:.3f} right, {nll:.4f} nats a character", flush=True)


def main() -> None:
    with as_command():
        run(parse())


if __name__ == "__main__":
    main()
