"""Measure whole jobs in chat form: how much of a trained adapter's gain a moved one brings, in what it writes.

    python experiments/jobs.py --source SOURCE --target TARGET --data DIR --task snips [--task banking77 ...]
        --work WORK [--seeds 0 1] [--prompts 0 200]
        [--method distill --method distill:completions=1260] [--control random] [--answers] [--loss all]

DIR holds `TASK_train.jsonl` and `TASK_test.jsonl`, lines of {"messages": [...]}. For each task and seed a LoRA adapter
is trained on the source and one on the target, on the same examples. The first is moved by every method, with no data
at all and with unlabelled prompts from the end of the train file, on which neither was trained (beyond 200, with those
that they were trained on as well). All answer the test examples on the target. A line of JSON for each row goes to
WORK/results.jsonl: every figure with its interval, and the share of the trained adapter's gain ("lift") with intervals
over the same resampled examples. With `--ceiling` the source answers them with its own adapter as well: more than that
a moved one can hardly bring. `--answers` compares with what needs no method: an adapter that is trained on the target
as the others are, on the likeliest answers of the source, with its adapter, to the prompts; without prompts, to those
that the adapter wrote for the first method. `--loss all` trains the source's adapter on whole texts, prompts included.

Adapters are kept in WORK and used again: the same command continues a stopped run. Choose settings with `--split
train`, which answers train examples in front of the prompts; never on the test file.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from lift_tasks import parse_row
from result_lines import Figure, ResultLine, append, commit, versions
from rich.console import Console
from scripts import as_command, wide_console

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Generator, fast_dtype, load_model
from jcrosslora.evaluate import Answers, answer, print_answers
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.methods import make_method
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.completion import COMPLETIONS
from jcrosslora.text.reading import template_of, with_own_template
from jcrosslora.training import Example, TrainingSettings, read_examples, save_trained, train_lora
from jcrosslora.utils.progress import track

ANSWER = 96  # tokens of an answer that is trained on, at most
HELD_BACK = 400  # examples at the end of a train file that nothing is trained on: 200 to choose by, 200 prompts


def parse() -> argparse.Namespace:
    usual = TrainingSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--task", action="append", required=True, help="name of a task in DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 200], help="numbers of unlabelled prompts")
    parser.add_argument("--method", action="append", default=[], help="METHOD or METHOD:KEY=VALUE,...")
    parser.add_argument("--control", action="append", default=[], help="methods that are run without prompts alone")
    parser.add_argument("--ceiling", action="store_true", help="the source answers as well")
    parser.add_argument("--answers", action="store_true", help="train on the source's answers to the prompts as well")
    parser.add_argument("--loss", choices=("answers", "all"), default="answers", help="of the source's adapter")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--limit", type=int, default=200, help="examples that are answered")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--rank", type=int, default=usual.size[0])
    return parser.parse_args()


def train(ref: str, examples: Sequence[Example], settings: TrainingSettings, out: Path) -> None:
    """Train an adapter unless it is there."""
    if out.exists():
        return
    base = jcl.open_base(ref)
    states, tokenizer = out.with_name(f"{out.name}.states"), load_tokenizer(base)
    adapter = train_lora(base, examples, settings, checkpoints=states, tokenizer=tokenizer)
    made = {**dataclasses.asdict(settings), "examples": len(examples)}
    save_trained(adapter, out, base, made, chat_template=template_of(tokenizer))


def timed(out: Path, make: Callable[[], Any]) -> float:
    """Make a folder unless it is there; returns the seconds that it took."""
    note = out.with_suffix(".seconds")
    if not out.exists():
        start = time.monotonic()
        make()
        note.write_text(f"{time.monotonic() - start:.0f}")
    return float(note.read_text())


def move(adapter: Path, arguments: argparse.Namespace, method: str, prompts: list[Any], seed: int, out: Path) -> None:
    """Move an adapter."""
    settings = dict(parse_row(method).settings)
    result = jcl.transfer(
        adapter,
        arguments.source,
        arguments.target,
        make_method(settings.pop("method"), settings),
        prompts=prompts or None,
        seed=seed,
        effect="never",
    )
    result.save(out)


def greedy_answers(adapter: Path, source: str, prompts: list[Prompt]) -> list[Completion]:
    """Return what the source says to prompts with its own adapter, without what does not end."""
    base = jcl.open_base(source)
    held = jcl.load_adapter(adapter, base)
    tokenizer = with_own_template(load_tokenizer(base), held.info.chat_template)
    generator = Generator.of(base, held, tokenizer=tokenizer)
    with track(len(prompts), "answer prompts", "answers") as bar:
        written = generator.write(prompts, ANSWER, 0.0, jax.random.key(0), bar=bar)
    found = zip(prompts, written, strict=True)
    return [Completion(prompt, one.text) for prompt, one in found if one.ended and one.text.strip()]


def imitate(
    adapter: Path, arguments: argparse.Namespace, prompts: list[Prompt], settings: TrainingSettings, out: Path
) -> None:
    """Train an adapter of the target on the source's answers to prompts."""
    train(arguments.target, greedy_answers(adapter, arguments.source, prompts), settings, out)


def run(arguments: argparse.Namespace, console: Console) -> None:
    work, target = arguments.work, jcl.open_base(arguments.target)
    source_name = jcl.open_base(arguments.source).name
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(target, fast_dtype()), load_tokenizer(target)
    for task in arguments.task:
        known = read_examples(arguments.data / f"{task}_train.jsonl")
        kept_back = known[-HELD_BACK:]
        tested = kept_back if arguments.split == "train" else read_examples(arguments.data / f"{task}_test.jsonl")
        # More than were held back are prompts that the adapters may have been trained on.
        pool = [*known[-HELD_BACK // 2 :], *known[:-HELD_BACK]]
        given = [one.prompt for one in pool if isinstance(one, Completion)]
        for seed in arguments.seeds:
            settings = TrainingSettings(
                steps=arguments.steps, rank=arguments.rank, alpha=2.0 * arguments.rank, seed=seed
            )
            name = f"{task}-{seed}" if arguments.loss == "answers" else f"{task}-{seed}-{arguments.loss}"
            source, oracle = work / f"{name}-source", work / f"{task}-{seed}-target"
            train(arguments.source, known[:-HELD_BACK], dataclasses.replace(settings, loss=arguments.loss), source)
            train(arguments.target, known[:-HELD_BACK], settings, oracle)
            rows: list[tuple[str, int, Path, float]] = []
            wanted = [(method, count) for method in arguments.method for count in arguments.prompts]
            for method, count in [*wanted, *((method, 0) for method in arguments.control)]:
                out = work / f"{name}-{method.replace(':', '-').replace('=', '')}-{count}"
                moved = partial(move, source, arguments, method, given[:count], seed, out)
                rows.append((method, count, out, timed(out, moved)))
            for count in arguments.prompts if arguments.answers else ():
                asked = given[:count] if count else _written(rows)
                if not asked:
                    continue
                out = work / f"{name}-answers-{count}"
                taught = partial(imitate, source, arguments, asked, settings, out)
                rows.append(("answers", count, out, timed(out, taught)))
            adapters = [oracle, *(out for _, _, out, _ in rows)]
            part = tested[: min(arguments.limit, HELD_BACK // 2) if arguments.split == "train" else arguments.limit]
            found = answer(target, part, adapters, model=model, tokenizer=tokenizer)
            print_answers(found, console, show=3)
            own = answer(jcl.open_base(arguments.source), part, [source]) if arguments.ceiling else None
            for place, (method, count, _, seconds) in enumerate(rows, 2):
                figures = {name: _figure(found, name, place, own) for name in found.figures}
                line = ResultLine(
                    source=source_name,
                    target=target.name,
                    task=task if arguments.loss == "answers" else f"{task}, loss on {arguments.loss}",
                    split=arguments.split,
                    examples=len(part),
                    seed=seed,
                    training_steps=arguments.steps,
                    method=method,
                    prompts=count,
                    figures=figures,
                    versions=dict(versions()),
                    commit=commit(),
                )
                append(work / "results.jsonl", [line])
                shares = ", ".join(f"{name} {one.lift.value:.2f}" for name, one in figures.items() if one.lift)
                console.print(f"{task}, seed {seed}, {method}, {count} prompts, {seconds:.0f} s: lift {shares}")


def _written(rows: Sequence[tuple[str, int, Path, float]]) -> list[Prompt]:
    """Return the prompts that a base wrote for the first move without prompts; none if no move has any."""
    files = [out / COMPLETIONS for _, count, out, _ in rows if not count and (out / COMPLETIONS).exists()]
    return read_prompts(files[0]) if files else []


def _figure(found: Answers, name: str, place: int, own: Answers | None) -> Figure:
    """Take a figure of the moved adapter at a place among the answers, the base and the trained one in front of it."""
    base, trained, moved = (found.bootstrap(name)[index] for index in (0, 1, place))
    try:
        lift = found.lift(name, place, 1)
    except jcl.UsageError:  # training brings nothing, such as exact words where there are several good answers
        lift = None
    return Figure(base, trained, moved, lift, None if own is None else own.bootstrap(name)[1])


def main() -> None:
    with as_command():
        run(parse(), wide_console())


if __name__ == "__main__":
    main()
