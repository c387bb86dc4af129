"""Train the same examples by both optimisers at several learning rates, and print the loss on examples held back.

    python experiments/rates.py --base BASE --data TRAIN.jsonl --held-back 100 \
        --rate 5e-4 --rate 1e-3 --rate 2e-3 --seeds 3 [--adapter ADAPTER --magnitude-rate 0.05]

The last examples of the file are held back from training. A seed decides the first factors and the order of the
examples, so both optimisers start at the same factors. With `--adapter`, one of this base such as a moved one, the
magnitudes of its updates are trained on the same examples as well. The loss is the mean over the tokens of the right
answers, in nats. Seconds are those of a whole training; every one compiles anew. The table on held-back examples is
for the choice of a rate: test questions are not looked at.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.training import Example, read_examples
from jcrosslora.training.batches import Plan, answer_loss, encode
from jcrosslora.training.checkpoints import Optimizer


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    usual = jcl.TrainingSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL as `jcrosslora train` takes it")
    parser.add_argument("--held-back", type=int, default=100, help="examples at the end of the file")
    parser.add_argument("--limit", type=int, default=None, help="only the first examples of the rest are trained on")
    parser.add_argument("--optimizer", action="append", choices=get_args(Optimizer), help="both, if none is given")
    parser.add_argument("--rate", type=float, action="append", help=f"{usual.rate:g}, if none is given")
    parser.add_argument("--adapter", help="whose magnitudes are trained")
    parser.add_argument("--magnitude-rate", type=float, action="append", help="0.05, if none is given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--rank", type=int, default=usual.size[0])
    parser.add_argument("--dtype", default=usual.dtype, help="of the base's weights")
    return parser.parse_args(given)


def split(arguments: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those held back.

    Raises:
        UsageError: a number is below 1, or the file has too few examples.
    """
    for name in ("held_back", "seeds", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise jcl.UsageError(f"--{name.replace('_', '-')} {value} is out of range; it must be at least 1")
    examples = read_examples(arguments.data)
    if len(examples) <= arguments.held_back:
        msg = f"{arguments.data} has {len(examples)} examples: expected more than the {arguments.held_back} held back"
        raise jcl.UsageError(msg)
    return examples[: -arguments.held_back][: arguments.limit], examples[-arguments.held_back :]


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    examples, held = split(arguments)
    settings = jcl.TrainingSettings(
        steps=arguments.steps, batch=arguments.batch, rank=arguments.rank, dtype=arguments.dtype
    )
    base = jcl.open_base(arguments.base)
    tokenizer, model = load_tokenizer(base), load_model(base, settings.dtype)
    moved = [jcl.load_adapter(arguments.adapter, base)] if arguments.adapter else []

    encoded = [encode(tokenizer, one) for one in held]
    plan = Plan(encoded, 1, len(encoded), 0)
    loss_of = jax.jit(answer_loss)

    def losses(adapters: Sequence[jcl.Adapter]) -> list[float]:
        """NLL of the held-back answers, their ends included, in nats a token: of the base, and with each adapter."""
        batches = [plan.batch(step) for step in range(len(encoded))]
        counts = [float(batch.used.sum()) for batch in batches]
        models = [model, *(model.with_adapter(stack_adapter(adapter, base)) for adapter in adapters)]
        return [
            sum(count * float(loss_of(one, batch)) for count, batch in zip(counts, batches, strict=True)) / sum(counts)
            for one in models
        ]

    for name, loss in zip(("the base", "the adapter"), losses(moved), strict=False):
        console.print(f"{name}: {loss:.4f} nats a token on {len(held)} examples", highlight=False)
    table = Table("trained", "rate", "nats a token", "over seeds", "seconds")
    given = {"model": model, "tokenizer": tokenizer}
    for name, rate, train in _runs(arguments, moved):
        seconds, found = [], []
        for seed in range(arguments.seeds):
            jax.clear_caches()
            start = time.perf_counter()
            adapter = train(base, examples, dataclasses.replace(settings, rate=rate, seed=seed), **given)
            seconds.append(time.perf_counter() - start)
            found.append(losses([adapter])[1])
        each = ", ".join(f"{one:.4f}" for one in found)
        table.add_row(name, f"{rate:g}", f"{np.mean(found):.4f}", each, f"{statistics.median(seconds):.1f}")
    console.print(table)


def _runs(
    arguments: argparse.Namespace, moved: Sequence[jcl.Adapter]
) -> Iterator[tuple[str, float, Callable[..., jcl.Adapter]]]:
    """Each way to train with each of its rates."""
    for optimizer in arguments.optimizer or get_args(Optimizer):
        for rate in arguments.rate or (jcl.TrainingSettings().rate,):
            yield optimizer, rate, _factors(optimizer)
    for adapter in moved:
        for rate in arguments.magnitude_rate or (0.05,):
            yield "magnitudes", rate, _magnitudes(adapter)


def _factors(optimizer: Optimizer) -> Callable[..., jcl.Adapter]:
    def train(base, examples, settings, **given):
        return jcl.train_lora(base, examples, dataclasses.replace(settings, optimizer=optimizer), **given)

    return train


def _magnitudes(adapter: jcl.Adapter) -> Callable[..., jcl.Adapter]:
    def train(base, examples, settings, **given):
        return jcl.fit_magnitudes(base, examples, adapter, settings, **given)

    return train


def main() -> None:
    try:
        run(parse())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"rates: {error}")


if __name__ == "__main__":
    main()
