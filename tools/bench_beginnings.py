"""What it saves to read once what prompts have in common: medians of interleaved runs of `Generator.write`.

    python tools/bench_beginnings.py BASE [--lists 8] [--alike 6] [--words 240] [--own 20] [--answer 32] [--repeats 5]

There are `--lists` beginnings of `--words` words, each in front of `--alike` prompts with `--own` further words, and
`--answer` tokens are written behind each prompt. The rival is the same package when it reads every prompt whole, as it
does for bases that cannot share a beginning. Words are mostly tokens. Ratios of wall time mean nothing on a busy
machine; to time a single core, start it with `taskset -c 0`.
"""

import argparse
import sys
from typing import Any

import jax
import numpy as np
from interleaved import median_seconds

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import Generator
from jcrosslora.errors import JCrossLoRAError

_WORDS = ("river", "stone", "green", "light", "seven", "house", "paper", "under", "cloud", "every", "small", "north")


class WholePrompts(Generator):
    """A base that reads every prompt whole."""

    @property
    def shares_beginnings(self) -> bool:
        """False."""
        return False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    usual = {"lists": 8, "alike": 6, "words": 240, "own": 20, "answer": 32, "repeats": 5}
    for name, value in usual.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    found = parser.parse_args()
    if min(vars(found)[name] for name in usual) < 1:
        sys.exit("bench_beginnings: all numbers have to be 1 or more")
    return found


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """Draw the prompts."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(_WORDS, count))

    lists = [words(arguments.words) for _ in range(arguments.lists)]
    return [f"{one} {words(arguments.own)}" for one in lists for _ in range(arguments.alike)]


def main() -> None:
    arguments = parse()
    try:
        base = open_base(arguments.base)
        sharing = Generator.of(base)
    except JCrossLoRAError as error:
        sys.exit(f"bench_beginnings: {error}")
    if not sharing.shares_beginnings:
        sys.exit(f"bench_beginnings: {base.ref} reads every prompt whole, as a base of its family has to")
    whole = WholePrompts.of(base, model=sharing.model, tokenizer=sharing.tokenizer)
    prompts, key = prompts_of(arguments), jax.random.key(0)

    def write(generator: Generator) -> Any:
        return generator.write(prompts, arguments.answer, 1.0, key)

    found = median_seconds({"once": lambda: write(sharing), "whole": lambda: write(whole)}, arguments.repeats)
    print(f"{base.name} on {jax.default_backend()}, jax {jax.__version__}: {len(prompts)} prompts")
    print(f"beginnings read once {found['once']:.2f} s, whole prompts {found['whole']:.2f} s", end="")
    print(f", {found['whole'] / found['once']:.2f} x")


if __name__ == "__main__":
    main()
