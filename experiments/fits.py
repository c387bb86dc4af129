"""Compare settings of the fit of `distill`, or of `distilled-copy`, on the same completions.

    python experiments/fits.py --source SOURCE --target TARGET --adapter ADAPTER --data train.jsonl --work WORK
        --completions 300 --prompts 200 --answers --fit passes=1 --fit passes=4

The last prompts of the file are answered by the source with its adapter, once, and kept in WORK; with `--prompts 0` the
source writes its own. The teacher then has the weights that it has with given ones, unless `--known` says how well the
adapter's task is known, which experiments/discovery.py prints as "explained". Every `--fit` starts from nothing, or
with `--method distilled-copy` from the adapter. The first row is of no fit; `--trained` adds one of an adapter of the
target to compare with, `--answers` one of an adapter that is trained on the target, as experiments/jobs.py does, on the
source's greedy answers to the prompts. With `--labels` the prompts have their right answers, to fit and to train on: so
much is in so many prompts.

The rows judge by the `--judged` examples in front of the last 200 prompts, and further prompts are those in front of
these: the NLL of the right answers in nats a token; how many of them the target would write, as each of their tokens,
the end included, is the likeliest ("right"); and how many of the source's greedy answers ("agreement"). The held-out
divergence cannot be compared where the teacher differs. With `--write N` the N examples in front of those are answered
in writing. A list is written as `roles=["v_proj","o_proj"]`. Data must be training data: choices are made by it. Rows
are added to WORK/fits.jsonl.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lift_tasks import parse_row
from result_lines import commit
from rich.console import Console
from rich.table import Table
from scripts import as_command, score_answers, wide_console

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Model, StackedAdapter, fast_dtype, load_model, stack_adapter, unstack_adapter
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.completions import answer_given, write_completions
from jcrosslora.distill.distillation import end_tokens, hold_out
from jcrosslora.distill.fit import Fit
from jcrosslora.distill.judge import Judge
from jcrosslora.distill.output_columns import find_columns
from jcrosslora.distill.settings import USUAL
from jcrosslora.distill.sources.decoder import DecoderReader, DecoderSource, RestrictedModel
from jcrosslora.distill.task_search import choose_writer
from jcrosslora.distill.teacher import Teacher
from jcrosslora.distill.templates import Sampler
from jcrosslora.evaluate import answer
from jcrosslora.methods import Distill, make_method
from jcrosslora.text import Completion, Message, Reading
from jcrosslora.training import TrainingSettings, read_examples, train_lora
from jcrosslora.training.batches import as_completion, encode

MOST = 96  # tokens of an answer that is compared
USUAL_PROMPTS = 200  # at the end of the file; more are taken from in front of the examples that judge


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "adapter"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--completions", type=int, default=USUAL)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--temperature", type=float, help="of the source's answers; if not given, that of the method")
    parser.add_argument("--known", type=float, default=1.0, help="how well the adapter's task is known, 0 to 1")
    parser.add_argument("--method", choices=("distill", "distilled-copy"), default="distill")
    parser.add_argument("--fit", action="append", default=[], help="KEY=VALUE,... of the method")
    parser.add_argument("--trained", type=Path, help="an adapter of the target that is scored as well")
    parser.add_argument("--answers", action="store_true", help="train on the source's greedy answers as well")
    parser.add_argument("--labels", action="store_true", help="right answers instead of the source's")
    parser.add_argument("--judged", type=int, default=100, help="examples whose right answers are scored")
    parser.add_argument("--write", type=int, default=0, help="answers in writing that are judged")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_completions(path: Path) -> list[Completion]:
    """Read completions that an earlier run wrote."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if isinstance(entry["prompt"], list):
            entry["prompt"] = tuple(Message(**message) for message in entry["prompt"])
        found.append(Completion(**entry))
    return found


def save_completions(path: Path, items: Sequence[Completion]) -> None:
    """Keep completions for another run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in items), encoding="utf-8")


def judged_by(model: Model, update: StackedAdapter, right: list[Reading], said: list[Reading]) -> list[float]:
    """Return the NLL a token of right answers, and the shares of these and of the source's that the update writes."""
    sums, written = score_answers(model, update, [*right, *said])
    count = len(right)
    tokens = sum(one.answer_tokens for one in right)
    return [-sums[:count].sum() / tokens, written[:count].mean(), written[count:].mean()]


def run(arguments: argparse.Namespace, console: Console) -> None:
    source, target = jcl.open_base(arguments.source), jcl.open_base(arguments.target)
    adapter = jcl.load_adapter(arguments.adapter, source)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    models = load_model(source, fast_dtype()), load_model(target, fast_dtype())
    generator = DecoderSource.of(source, adapter, model=models[0], tokenizer=tokenizers[0])
    known = [as_completion(one) for one in read_examples(arguments.data)]
    last, more = min(arguments.prompts, USUAL_PROMPTS), max(0, arguments.prompts - USUAL_PROMPTS)
    known, given = known[: len(known) - last], known[len(known) - last :]
    known, judged = known[: len(known) - arguments.judged], known[len(known) - arguments.judged :]
    known, asked = known[: len(known) - arguments.write], known[len(known) - arguments.write :]
    given = [*known[len(known) - more :], *given]
    usual = make_method(arguments.method)
    assert isinstance(usual, Distill)
    warmth = arguments.temperature
    if warmth is None:
        warmth = usual.course(prompted=bool(given)).temperature
    sampler = Sampler(arguments.completions, temperature=warmth, seed=arguments.seed)
    name = f"completions-{arguments.completions}-{arguments.prompts}-{arguments.seed}-{warmth:g}.jsonl"
    path, greedy = arguments.work / name, arguments.work / f"greedy-{arguments.judged}-{arguments.prompts}.jsonl"
    if not path.exists() and not arguments.labels:
        writer = choose_writer(generator, DecoderSource.of(target, model=models[1], tokenizer=tokenizers[1]))
        if given:
            made = answer_given(generator, writer, [one.prompt for one in given], sampler)
        else:
            made = write_completions(generator, writer, sampler, Distill.discovery)
        save_completions(path, made.items)
    if not greedy.exists():
        prompts = [Completion(one.prompt) for one in [*judged, *given]]
        save_completions(greedy, Sampler(tokens=MOST, temperature=0.0).answer(generator, prompts))
    said = {one.prompt: one for one in load_completions(greedy)}
    labelled = [dataclasses.replace(one, taught="answer") for one in given]
    items = labelled if arguments.labels else load_completions(path)
    imitated = [said[one.prompt] for one in judged if one.prompt in said]
    right = sum(found.answer == one.answer for one in judged if (found := said.get(one.prompt))) / len(judged)
    console.print(f"{right:.3f} of the source's greedy answers are right")
    encoded = [[encode(tokenizers[1], one) for one in part] for part in (judged, imitated)]
    start = stack_adapter(adapter, target) if arguments.method == "distilled-copy" else None
    table = Table("fit", "steps", "seconds", "divergence", "NLL", "right", "agreement", "written")

    def add(
        name: str, update: StackedAdapter, steps: int = 0, seconds: float = 0, divergence: float | None = None
    ) -> None:
        figures: list[float | None] = [divergence, *judged_by(models[1], update, *encoded), None]
        if asked:
            wrote = answer(target, asked, [unstack_adapter(update, target)], model=models[1], tokenizer=tokenizers[1])
            figure = next(name for name in ("json", "exact") if name in wrote.figures)
            figures[-1] = wrote.bootstrap(figure)[1].value
        rounded = [None if value is None else round(float(value), 4) for value in figures]
        values = (name, steps, round(seconds), *rounded)
        table.add_row(*("" if value is None else str(value) for value in values))
        row = dict(zip((str(column.header) for column in table.columns), values, strict=True))
        console.print(", ".join(f"{key} {value}" for key, value in row.items() if value is not None))
        made = {"source": source.name, "target": target.name, "data": arguments.data.name}
        made["texts"] = "labels" if arguments.labels else path.name
        with (arguments.work / "fits.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(made | row | {"commit": commit()}) + "\n")

    add("none", start or StackedAdapter({}))
    if arguments.trained:
        add("trained", stack_adapter(jcl.load_adapter(arguments.trained, target), target))
    if arguments.answers:
        begun = time.monotonic()
        greedily = [found for one in given if (found := said.get(one.prompt)) and found.ended]
        taught = labelled if arguments.labels else greedily
        settings = TrainingSettings(seed=arguments.seed)
        update = stack_adapter(train_lora(target, taught, settings, tokenizer=tokenizers[1]), target)
        add("answers", update, settings.steps, time.monotonic() - begun)
    for text in arguments.fit:
        settings = dict(parse_row(f"{arguments.method}:{text}").settings)
        if given:  # the more there are, the fewer passes
            settings.setdefault("completions", arguments.completions)
        method = make_method(settings.pop("method"), settings)
        assert isinstance(method, Distill)
        parts = hold_out(items, method, arguments.seed, prompted=bool(given))
        weighed = partial(make_batches, text_weight=method.text_weight, ends=method.end != "never")
        batches, held_out = (weighed(part, tokenizers, method.prompt_weight) for part in parts)
        ends, read = end_tokens(tokenizers, items), [*batches, *held_out]
        columns = find_columns(source, target, read, method.compared_tokens, ends)
        src, tgt = (
            RestrictedModel.of(model, columns.head_rows(side), len(ends.symbol[side]))
            for side, model in enumerate(models)
        )
        reader = DecoderReader(src.with_adapter(stack_adapter(adapter, source)))
        teacher = Teacher(reader, tgt, columns, method.teacher_weights(arguments.known))
        judge = Judge([teacher.read(batch) for batch in held_out])
        begun, prompted = time.monotonic(), bool(given)
        found = Fit(teacher, judge, method, start, prompted=prompted, begun=begun, seed=arguments.seed).run(
            batches, lambda *_: []
        )
        seconds, steps = time.monotonic() - begun, len(batches) * method.course(prompted=prompted).passes
        for point in found.curve:
            console.print(
                f"{text}: {point.completions} completions, {point.seconds:.0f} s, {point.divergence:.4f} nats"
            )
        add(text, found.adapter, steps, seconds, min(point.divergence for point in found.curve))
    console.print(table)


def main() -> None:
    with as_command():
        run(parse(), wide_console())


if __name__ == "__main__":
    main()
