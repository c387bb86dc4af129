"""Make the lift table: how much of the gain of a LoRA trained on the target a moved adapter brings.

    python experiments/lift.py --work WORK --pair SOURCE TARGET [--pair TARGET SOURCE] --task TRAIN TEST [--task ...]
        [--written TRAIN TEST] [--seeds 0 1 2] [--method theseus --method cross-lora:svd_rank=64 ...]
        [--prompts 200 --prompted METHOD] [--text FILE --texted METHOD]
        [--lineage OTHER_TRAIN [--lineage-written] [--lineage-dense]]
        [--markdown TABLE.md]

For each task, pair of bases and seed the script trains a LoRA adapter on the source and one on the target (the
oracle), moves the first by every method and scores all on the target. Lift recovered = (base - moved) / (base -
oracle), of negative log-likelihoods of right answers: of all answers together per character, and of the mean over
questions of each answer's own per character. Intervals: 95% over questions, the same resampled questions in all
terms, averaged over seeds inside each resample; "sd" is the standard deviation over seeds.

All results are kept in WORK and used again (see `lift_work.py`): the same command continues a stopped run. After a
change of the package remove the folders below WORK/moved that it concerns.

Hyper-parameters are chosen with --split train-rest, which scores train questions that no adapter was trained on, and
never on test questions. --written makes a task whose answers are written, in JSON (`written_task.py`); its accuracy is
exact match. --lineage adds the pair of the first source and its own further-trained version, trained on another task;
with --lineage-written on its answers in JSON, which have another form, and with --lineage-dense in all weights of its
modules; otherwise a LoRA of --lineage-rank is merged into it.

On 2 cores, for SmolLM2-135M to Gemma-3-270M, theseus takes about 5 minutes a seed, and 300 questions 1 minute a row.
"""

import argparse
import gc
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from lift_scores import Scorer
from lift_table import BASE, ORACLE, Sheet, make_sheet, print_sheet, write_markdown
from lift_tasks import Row, Task, load_task, parse_row, slug
from lift_work import Base, Pair, Work
from rich.console import Console
from scripts import as_command

import jcrosslora as jcl
from jcrosslora.evaluate import read_questions
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.training import TrainingSettings

# Between a base and its own further-trained version: the recommended method, the literature's, and the control.
LINEAGE_ROWS = ("auto", "copy", "random")
_ORACLE_FILE = "oracle"


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    usual = TrainingSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair, files = {"nargs": 2, "action": "append", "default": []}, ("TRAIN", "TEST")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--pair", **pair, metavar=("SOURCE", "TARGET"), help="bases; again for another direction")
    parser.add_argument("--task", **pair, metavar=files, type=Path, help="JSONL with question, choices, answer")
    parser.add_argument("--written", **pair, metavar=files, type=Path, help="the same files, answers to be written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", action="append", help="METHOD or METHOD:KEY=VALUE,...; default: all, and auto")
    parser.add_argument("--prompts", type=int, default=0, help="unlabelled train questions as probe text")
    parser.add_argument("--prompted", action="append", default=[], help="a method to run with these as well")
    parser.add_argument("--text", type=Path, help="a file of other texts as probe text, such as generic passages")
    parser.add_argument("--texted", action="append", default=[], help="a method to run with these as well")
    parser.add_argument("--lineage", type=Path, help="train file of another task, for the further-trained version")
    parser.add_argument("--lineage-written", action="store_true", help="that version answers in writing, in JSON")
    parser.add_argument("--lineage-dense", action="store_true", help="that version is trained in all weights")
    parser.add_argument("--lineage-rate", type=float, default=5e-5, help="of --lineage-dense")
    parser.add_argument("--lineage-rank", type=int, default=64, help="of the LoRA that is merged without it")
    parser.add_argument("--lineage-steps", type=int, default=2 * usual.steps)
    parser.add_argument("--split", choices=("test", "train-rest"), default="test")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--write-limit", type=int, default=100, help="questions of --written that models answer")
    parser.add_argument("--first", type=int, default=1200, help="train on so many; 300 or a quarter are always left")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--rank", type=int, default=usual.size[0])
    parser.add_argument("--rate", type=float, default=usual.rate)
    parser.add_argument("--markdown", type=Path, help="file for the tables as Markdown")
    return parser.parse_args(given)


def check(arguments: argparse.Namespace) -> None:
    """Check what would fail or mislead only after hours.

    Raises:
        UsageError: the first such argument.
    """
    refs, rows = {ref for pair in arguments.pair for ref in pair}, rows_of(arguments)
    rules = {
        "--pair SOURCE TARGET is expected": arguments.pair,
        "--task or --written TRAIN TEST is expected": arguments.task or arguments.written,
        "two bases have the same last part of their path: rename one": len({Base.of(ref).name for ref in refs})
        == len(refs),
        "--text FILE and --texted METHOD are expected together": (arguments.text is not None) == bool(arguments.texted),
        "a method is given twice": len({slug(row.name) for row in rows}) == len(rows),
        "--prompts N and --prompted METHOD are expected together": (arguments.prompts > 0) == bool(arguments.prompted),
        "--lineage-written and --lineage-dense want --lineage OTHER_TRAIN": arguments.lineage is not None
        or not (arguments.lineage_written or arguments.lineage_dense),
        "--lineage wants the train file of another task than those that are measured": arguments.lineage is None
        or any(_task_of(files[0]) != _task_of(arguments.lineage) for files in arguments.task + arguments.written),
        "--seeds wants different numbers from 0 on": len(set(arguments.seeds)) == len(arguments.seeds)
        and min(arguments.seeds) >= 0,
        "--limit and --write-limit want 1 or more": all(
            limit is None or limit > 0 for limit in (arguments.limit, arguments.write_limit)
        ),
    }
    for message, holds in rules.items():
        if not holds:
            raise jcl.UsageError(message)


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    """List the rows: methods as they are, then methods with prompts, then methods with other texts."""
    plain = [parse_row(text) for text in arguments.method or dict.fromkeys([*jcl.methods.METHODS, "auto"])]
    prompted = [parse_row(text, arguments.prompts) for text in arguments.prompted]
    return plain + prompted + [parse_row(text, file=arguments.text) for text in arguments.texted]


def make_table(work: Work, task: Task, pair: Pair, rows: Sequence[Row], arguments: argparse.Namespace) -> Sheet:
    """Train, move and score; make the table of one task and direction."""
    undefined: dict[str, str] = {}
    seeds = [_seed_figures(work, task, pair, rows, seed, arguments, undefined) for seed in arguments.seeds]
    names = [name for name in seeds[0] if name not in undefined]
    figures = {
        name: {figure: np.stack([seed[name][figure] for seed in seeds]) for figure in seeds[0][name]} for name in names
    }
    counted = f"{figures[BASE]['nll_pooled'].shape[1]} {arguments.split} questions"
    if task.written:
        counted += f" ({figures[BASE]['exact'].shape[1]} of them answered in writing)"
    made = f"{task.first} trained on, seeds {arguments.seeds}"
    title = f"{task.name}: {pair.source.name} to {pair.target.name}, {counted}, {made}"
    return make_sheet(title, figures, undefined, ["exact"] if task.written else ["accuracy", "accuracy_norm"])


def _seed_figures(
    work: Work,
    task: Task,
    pair: Pair,
    rows: Sequence[Row],
    seed: int,
    arguments: argparse.Namespace,
    undefined: dict[str, str],
) -> dict[str, dict[str, np.ndarray]]:
    """Compute name -> figure -> (n,) of one seed; add rows that are not defined to `undefined`, with the reason."""
    adapters = {_ORACLE_FILE: work.trained(task, pair.target, seed)}
    work.trained(task, pair.source, seed)
    for row in (row for row in rows if row.name not in undefined):
        try:
            adapters[row.slug] = work.moved(task, pair, row, seed)
        except (jcl.MethodError, jcl.PairingError) as error:
            undefined[row.name] = str(error)
    questions = task.questions(arguments.split, arguments.prompts)
    scorer = Scorer(pair.target.ref, questions, work.scores(task, pair, arguments.split, seed))
    found = scorer.figures(adapters, arguments.limit)
    if task.written:
        for name, exact in scorer.exact(adapters, arguments.write_limit).items():
            found[name]["exact"] = exact
    del scorer
    gc.collect()
    jax.clear_caches()
    shown = {BASE: BASE, _ORACLE_FILE: ORACLE, **{row.slug: row.name for row in rows}}
    return {shown[name]: figures for name, figures in found.items()}


def plan(arguments: argparse.Namespace, work: Work) -> list[tuple[Task, Pair, list[Row]]]:
    """List the tables to make; train the further-trained version if it is asked for and missing.

    Raises:
        JCrossLoRAError: before any training, if a file or a base cannot be read, there are too few questions, or a
            target cannot be scored on one.
    """
    tasks = [load_task(*files, first=arguments.first, written=False) for files in arguments.task]
    tasks += [load_task(*files, first=arguments.first, written=True) for files in arguments.written]
    rows, pairs = rows_of(arguments), [Pair(*map(Base.of, refs)) for refs in arguments.pair]
    tables = [(task, pair, rows) for task in tasks for pair in pairs]
    for task in tasks:
        task.questions(arguments.split, arguments.prompts)
        task.prompts(arguments.prompts)
    if arguments.text is not None:
        read_prompts(arguments.text)
    for ref in {ref for refs in arguments.pair for ref in refs}:
        jcl.open_base(ref)
    if arguments.lineage is not None:
        source = pairs[0].source
        version = work.further_trained(
            source,
            arguments.lineage,
            arguments.lineage_rank,
            arguments.lineage_steps,
            written=arguments.lineage_written,
            dense_rate=arguments.lineage_rate if arguments.lineage_dense else None,
        )
        lineage = [parse_row(name) for name in LINEAGE_ROWS]
        # A version that was trained on the task itself gains nothing.
        others = [task for task in tasks if task.name.removesuffix("_written") != _task_of(arguments.lineage)]
        tables += [(task, Pair(source, version), lineage) for task in others]
    for task, pair, _ in tables:
        read_questions(
            jcl.open_base(pair.target.ref), task.questions(arguments.split, arguments.prompts)[: arguments.limit]
        )
    return tables


def _task_of(train: Path) -> str:
    return train.stem.removesuffix("_train")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    settings = TrainingSettings(
        steps=arguments.steps, rank=arguments.rank, alpha=2.0 * arguments.rank, rate=arguments.rate, dtype="float32"
    )
    work, sheets = Work(arguments.work, settings, console), []
    for task, pair, rows in plan(arguments, work):
        sheets.append(make_table(work, task, pair, rows, arguments))
        print_sheet(sheets[-1], console)
        if arguments.markdown is not None:
            write_markdown(arguments.markdown, sheets, shlex.join(["python", *sys.argv]))


def main() -> None:
    try:
        with as_command():
            run(parse())
    except KeyboardInterrupt:
        sys.exit("lift: interrupted; the same command continues from here")


if __name__ == "__main__":
    main()
