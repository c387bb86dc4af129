"""Train a LoRA adapter on the answers of a task file and write it as a PEFT folder.

    python experiments/train_lora.py --base BASE --task TRAIN.jsonl --out ADAPTER [--first 1200] [--checkpoints DIR]

The task file has {"question", "choices", "answer"} on each line, or {"prompt", "answer"} where the answer is text that
is written, not chosen. Only the answer's tokens count in the loss. With --checkpoints the same command goes on where an
earlier one was stopped, and ends with the same numbers.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jcrosslora as jcl
from jcrosslora.adapter import save_adapter
from jcrosslora.training import TrainSettings, read_examples, train_lora
from jcrosslora.utils.files import ensure_free


def parse() -> argparse.Namespace:
    usual = TrainSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder of safetensors, a GGUF file or a hub id")
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=None, help="only the first so many examples")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--rate", type=float, default=usual.rate)
    parser.add_argument("--rank", type=int, default=usual.rank)
    parser.add_argument("--alpha", type=float, default=usual.alpha)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--modules", nargs="+", default=usual.modules)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=usual.dtype)
    parser.add_argument("--remat", action="store_true", help="less memory, more time")
    parser.add_argument("--checkpoints", type=Path, default=None, help="folder of the states to go on from")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    ensure_free(arguments.out, overwrite=False)
    base = jcl.open_base(arguments.base)
    settings = TrainSettings(
        steps=arguments.steps,
        batch=arguments.batch,
        rate=arguments.rate,
        rank=arguments.rank,
        alpha=arguments.alpha,
        modules=tuple(arguments.modules),
        seed=arguments.seed,
        dtype=arguments.dtype,
        remat=arguments.remat,
    )
    if arguments.first is not None and arguments.first < 1:
        msg = f"first {arguments.first} is out of range; it must be at least 1"
        raise jcl.UsageError(msg)
    examples = read_examples(arguments.task)[: arguments.first]
    made = {**dataclasses.asdict(settings), "task": arguments.task.name, "first": len(examples)}
    checkpoints, progress = arguments.checkpoints, sys.stderr.isatty()
    adapter = train_lora(base, examples, settings, checkpoints=checkpoints, progress=progress)
    save_adapter(
        adapter,
        arguments.out,
        base_revision=base.revision,
        fused=base.fused,
        all_modules=list(base.modules),
        metadata={"jcrosslora.training": json.dumps(made)},
    )
    print(f"written: {arguments.out}")


def main() -> None:
    try:
        run(parse())
    except jcl.JCrossLoRAError as error:
        sys.exit(f"train_lora: {error}")
    except KeyboardInterrupt:
        sys.exit("train_lora: interrupted; with --checkpoints the same command goes on from the last one")


if __name__ == "__main__":
    main()
