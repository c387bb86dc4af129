"""What labelled examples bring a moved adapter, by how many there are: a curve with four ways to use them.

    python experiments/examples.py --adapter ADAPTER --source SOURCE --target TARGET --train TRAIN.jsonl
        --test TEST.jsonl --work WORK [--counts 10 50 200 1000] [--prompts 200] [--seeds 0 1] [--method distill]

The first N lines of TRAIN are the labelled examples, and its last lines are prompts without answers. For each N the
target answers the test examples with

    moved               ADAPTER, moved with the prompts alone
    moved, examples     moved with the prompts and N examples (`transfer --examples`)
    trained             a LoRA that is trained on the N examples from scratch
    moved, trained      the moved one, trained on by the N examples (`train --start`)

A line of JSON for each goes to WORK/examples.jsonl: every figure with its interval over test examples. Adapters are
kept in WORK: the same command continues a stopped run. Choose settings on another file than the one that is reported.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from jobs import timed
from lift_tasks import parse_row
from result_lines import append, commit, versions
from scripts import as_command

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model
from jcrosslora.evaluate import Interval, answer
from jcrosslora.evaluate.examples import as_completion
from jcrosslora.methods import make_method
from jcrosslora.text import Completion
from jcrosslora.training import TrainingSettings, read_examples, save_trained, train_lora

EPOCHS, FEWEST = 4, 40  # of a training: passes over the examples, and at least so many steps


class Point(msgspec.Struct, kw_only=True):
    """What came of one way to use so many `labelled` examples; `examples` were answered, and making it took seconds."""

    source: str
    target: str
    test: str
    way: str
    method: str
    labelled: int
    prompts: int
    examples: int
    seed: int
    seconds: float
    figures: dict[str, Interval]
    versions: dict[str, str]
    commit: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("adapter", "source", "target"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("train", "test", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 50, 200, 1000], help="labelled examples")
    parser.add_argument("--prompts", type=int, default=200, help="unlabelled prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--method", default="distill", help="METHOD or METHOD:KEY=VALUE,...")
    parser.add_argument("--limit", type=int, default=200, help="test examples that are answered")
    return parser.parse_args()


def move(arguments: argparse.Namespace, known: list[Completion], count: int, seed: int, out: Path) -> None:
    """Move the adapter with the prompts and the first examples."""
    settings = dict(parse_row(arguments.method).settings)
    given: dict[str, Any] = {"examples": known[:count]} if count else {}
    prompts = [one.prompt for one in known[len(known) - arguments.prompts :]] or None
    method, places = make_method(settings.pop("method"), settings), (arguments.source, arguments.target)
    jcl.transfer(arguments.adapter, *places, method, prompts=prompts, seed=seed, effect="never", **given).save(out)


def train(
    arguments: argparse.Namespace, examples: list[Completion], seed: int, out: Path, start: Path | None = None
) -> None:
    """Train a LoRA of the target on examples, from scratch or from an adapter."""
    base, steps = jcl.open_base(arguments.target), max(FEWEST, EPOCHS * len(examples) // TrainingSettings().batch)
    settings, states = TrainingSettings(steps=steps, seed=seed), out.with_name(f"{out.name}.states")
    adapter = train_lora(base, examples, settings, start=start, checkpoints=states)
    save_trained(adapter, out, base, {"steps": steps, "seed": seed, "examples": len(examples)})


Way = tuple[str, int, Path, Callable[[Path], None]]


def ways(arguments: argparse.Namespace, known: list[Completion], seed: int) -> Iterator[Way]:
    """Yield each way with the number of examples, its folder, and what makes that."""
    first = arguments.work / f"moved-{seed}"
    yield "moved", 0, first, partial(move, arguments, known, 0, seed)
    for count in arguments.counts:
        places = [arguments.work / f"{name}-{count}-{seed}" for name in ("with", "trained", "continued")]
        taught = partial(train, arguments, known[:count], seed)
        yield "moved, examples", count, places[0], partial(move, arguments, known, count, seed)
        yield "trained", count, places[1], taught
        yield "moved, trained", count, places[2], partial(taught, start=first)


def run(arguments: argparse.Namespace) -> None:
    target, work = jcl.open_base(arguments.target), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    known, test = ([as_completion(one) for one in read_examples(path)] for path in (arguments.train, arguments.test))
    if max(arguments.counts) + arguments.prompts > len(known):
        msg = f"{arguments.train}: has {len(known)} examples, expected {max(arguments.counts)} and as many as --prompts"
        raise jcl.UsageError(msg)
    model, tokenizer, part = load_model(target, fast_dtype()), load_tokenizer(target), test[: arguments.limit]
    for seed in arguments.seeds:
        rows = list(ways(arguments, known, seed))
        taken = [timed(out, partial(make, out)) for _, _, out, make in rows]
        found = answer(target, part, [out for _, _, out, _ in rows], model=model, tokenizer=tokenizer)
        for place, (way, count, _, _) in enumerate(rows, 1):
            point = Point(
                source=Path(arguments.source).name,
                target=target.name,
                test=arguments.test.name,
                way=way,
                method=arguments.method,
                labelled=count,
                prompts=0 if way == "trained" else arguments.prompts,
                examples=len(part),
                seed=seed,
                seconds=taken[place - 1],
                figures={name: found.bootstrap(name)[place] for name in found.figures},
                versions=dict(versions()),
                commit=commit(),
            )
            append(work / "examples.jsonl", [point])
            exact = point.figures["exact"]
            print(f"seed {seed}, {count} examples, {way}: exact {exact.value:.2f} [{exact.low:.2f}, {exact.high:.2f}]")


def main() -> None:
    with as_command():
        run(parse())


if __name__ == "__main__":
    main()
