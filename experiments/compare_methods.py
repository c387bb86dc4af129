"""Move one adapter by several methods and score the results side by side on the target.

    python experiments/compare_methods.py --adapter ADAPTER --source BASE --target BASE --task TEST.jsonl \
        --method theseus --method cross-lora --method random --seeds 3 [--limit 300]

Methods that draw at random (probe texts, random maps) run once for each seed. The script prints every figure with its
95% interval over questions, the paired difference to the base, and for each method the spread over seeds of the nats
per character of the right answer. Scales and other settings are the methods' own; nothing is tuned here. On 2 cores a
seed of theseus takes about 5 minutes for SmolLM2-135M to Gemma-3-270M, and 300 questions 1 minute a model.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import jcrosslora as jcl
from jcrosslora.evaluate import print_scores, read_task, score
from jcrosslora.maps import EvidenceKind
from jcrosslora.methods import find_method


def moved(arguments: argparse.Namespace, console: Console) -> list[tuple[str, jcl.Adapter]]:
    """Every method's adapters, one a seed where the method draws anything, each under a name that says so."""
    found = []
    for name in arguments.method:
        method = find_method(name)()
        draws = method.runs_bases or EvidenceKind.RANDOM_KEY in method.requires
        seeds = range(arguments.seeds) if draws else (0,)
        for seed in seeds:
            result = jcl.transfer(arguments.adapter, arguments.source, arguments.target, method, seed=seed)
            console.print(f"{name}, seed {seed}: {result.verdict.text}", highlight=False)
            label = f"{name}, seed {seed}" if len(seeds) > 1 else name
            plain = jcl.Adapter(result.adapter.modules, dataclasses.replace(result.adapter.info, name=label))
            found.append((name, plain))
    return found


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--task", type=Path, required=True, help="JSONL with question, choices, answer")
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=None)
    return parser.parse_args(given)


def check(arguments: argparse.Namespace) -> None:
    """Check what would fail only after the first moves.

    Raises:
        MethodError: an unknown method.
        UsageError: a method that is given twice, or a number below 1.
    """
    for name in arguments.method:
        find_method(name)
    if len(set(arguments.method)) < len(arguments.method):
        raise jcl.UsageError(f"--method {' '.join(arguments.method)}: one is given twice; give each once")
    for name, value in (("seeds", arguments.seeds), ("limit", arguments.limit)):
        if value is not None and value < 1:
            raise jcl.UsageError(f"--{name} {value} is out of range; it must be at least 1")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    console = Console(width=140)
    questions = read_task(arguments.task)[: arguments.limit]
    adapters = moved(arguments, console)
    scores = score(jcl.open_base(arguments.target), questions, [adapter for _, adapter in adapters])
    print_scores(scores, console)
    differences = scores.differences("nll_per_char")[1:]
    for name in arguments.method:
        values = [item.value for (own, _), item in zip(adapters, differences, strict=True) if own == name]
        spread = f" (standard deviation over seeds {statistics.stdev(values):.4f})" if len(values) > 1 else ""
        console.print(f"{name}: {statistics.mean(values):+.4f} nats per character{spread}", highlight=False)


def main() -> None:
    try:
        run(parse())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"compare_methods: {error}")


if __name__ == "__main__":
    main()
