"""Compare settings of the fit of `distill`, or of `distilled-copy`, on the same completions.

    python experiments/fits.py --source SOURCE --target TARGET --adapter ADAPTER --data train.jsonl --work WORK
        --completions 300 --prompts 200 --fit passes=1 --fit passes=4 --fit optimizer=lora-rite,passes=4

The last prompts of the file are answered by the source with its adapter, once, and kept in WORK; with `--prompts 0` the
source writes its own. The teacher then has the weights that it has with given ones, unless `--known` says how well the
adapter's task is known, which experiments/discovery.py prints as "explained". Every `--fit` starts from nothing, or
with `--method distilled-copy` from the adapter; the figure without a fit is printed first, and that of `--trained`, an
adapter of the target to compare with. Of the 100 examples in front of the prompts the table has the NLL of the right
answers with the fitted update, in nats a token, beside the held-out divergence, which cannot be compared where the
teacher differs; with `--write N` also how many of the next N answers in writing are right. A list is written as
`roles=["v_proj","o_proj"]`. Data must be training data: choices are made by it.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
from lift_tasks import parse_row
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import (
    StackedAdapter,
    fast_dtype,
    load_model,
    stack_adapter,
    unstack_adapter,
)
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.completions import answer_given, write_completions
from jcrosslora.distill.fit import Fit
from jcrosslora.distill.run import end_tokens, hold_out
from jcrosslora.distill.sources.decoder import DecoderReader, DecoderSource, RestrictedModel
from jcrosslora.distill.symbols import find_symbols
from jcrosslora.distill.task_search import choose_writer
from jcrosslora.distill.teacher import Teacher
from jcrosslora.distill.templates import Sampler
from jcrosslora.evaluate import answer
from jcrosslora.methods import Distill, make_method
from jcrosslora.text import Completion, Message
from jcrosslora.training import read_examples
from jcrosslora.training.batches import Plan, answer_loss, as_completion, encode

JUDGED = 100  # examples whose right answers are scored


def parse() -> argparse.Namespace:
    usual = Distill()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "adapter"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--completions", type=int, default=usual.completions)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=usual.answer_temperature, help="of the source's answers")
    parser.add_argument("--known", type=float, default=1.0, help="how well the adapter's task is known, 0 to 1")
    parser.add_argument("--method", choices=("distill", "distilled-copy"), default="distill")
    parser.add_argument("--fit", action="append", required=True, help="KEY=VALUE,... of the method")
    parser.add_argument("--trained", type=Path, help="an adapter of the target that is scored as well")
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


def run(arguments: argparse.Namespace, console: Console) -> None:
    source, target = jcl.open_base(arguments.source), jcl.open_base(arguments.target)
    adapter = jcl.load_adapter(arguments.adapter, source)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    models = load_model(source, fast_dtype()), load_model(target, fast_dtype())
    known = [as_completion(one) for one in read_examples(arguments.data)]
    known, given = known[: len(known) - arguments.prompts], known[len(known) - arguments.prompts :]
    judged = known[-JUDGED - arguments.write :]
    sampler = Sampler(arguments.completions, temperature=arguments.temperature, seed=arguments.seed)
    name = f"completions-{arguments.completions}-{arguments.prompts}-{arguments.seed}-{arguments.temperature:g}.jsonl"
    path = arguments.work / name
    if not path.exists():
        generator = DecoderSource.of(source, adapter, model=models[0], tokenizer=tokenizers[0])
        writer = choose_writer(generator, DecoderSource.of(target, model=models[1], tokenizer=tokenizers[1]))
        if given:
            made = answer_given(generator, writer, [one.prompt for one in given], sampler)
        else:
            made = write_completions(generator, writer, sampler, Distill.discovery)
        arguments.work.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in made.items), encoding="utf-8")
    items = load_completions(path)
    plan = Plan([encode(tokenizers[1], one) for one in judged[:JUDGED]], 1, JUDGED, 0)
    start = stack_adapter(adapter, target) if arguments.method == "distilled-copy" else None

    def likelihood(update: StackedAdapter) -> str:
        total = count = 0.0
        for step in range(JUDGED):
            batch = plan.batch(step)
            used = float(batch.used.sum())
            total += used * float(scored(models[1].with_adapter(update), batch))
            count += used
        return f"{total / count:.4f}"

    scored = jax.jit(answer_loss)
    console.print(f"without a fit: NLL {likelihood(start or StackedAdapter({}))}")
    if arguments.trained:
        trained = stack_adapter(jcl.load_adapter(arguments.trained, target), target)
        console.print(f"{arguments.trained}: NLL {likelihood(trained)}")
    table = Table("fit", "steps", "seconds", "divergence", "NLL", *(["right"] if arguments.write else []))
    for text in arguments.fit:
        settings = dict(parse_row(f"{arguments.method}:{text}").settings)
        method = make_method(settings.pop("method"), settings)
        assert isinstance(method, Distill)
        parts = hold_out(items, method.held_out, arguments.seed)
        batches, held_out = (make_batches(part, tokenizers, method.prompt_weight) for part in parts)
        ends, read = end_tokens(tokenizers, items), [*batches, *held_out]
        symbols = find_symbols(source, target, read, method.compared_tokens, ends)
        src, tgt = (
            RestrictedModel.of(model, symbols.heads(side), len(ends.symbol[side])) for side, model in enumerate(models)
        )
        reader = DecoderReader(src.with_adapter(stack_adapter(adapter, source)))
        teacher = Teacher(reader, tgt, symbols, method.teacher_weights(arguments.known), method.token_share)
        kept_back = [teacher.read(batch) for batch in held_out]
        begun = time.monotonic()
        fit = Fit(teacher, kept_back, method, start, begun=begun, seed=arguments.seed)
        found = fit.run(batches, lambda *_: [])
        seconds = time.monotonic() - begun
        for look in found.looks:
            console.print(f"{text}: {look.completions} completions, {look.seconds:.0f} s, {look.divergence:.4f} nats")
        row = [text, str(len(batches) * method.passes), f"{seconds:.0f}"]
        row += [f"{min(look.divergence for look in found.looks):.4f}", likelihood(found.adapter)]
        if arguments.write:
            update = unstack_adapter(found.adapter, target)
            wrote = answer(target, judged[JUDGED:], [update], model=models[1], tokenizer=tokenizers[1])
            figure = next(name for name in ("json", "exact") if name in wrote.figures)
            row.append(f"{wrote.bootstrap(figure)[1].value:.3f} ({figure})")
        table.add_row(*row)
        console.print(f"{text}: " + ", ".join(row[1:]))
    console.print(table)


def main() -> None:
    jcl.show_progress()
    try:
        run(parse(), Console(width=None if sys.stdout.isatty() else 120))
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"fits: {error}")


if __name__ == "__main__":
    main()
