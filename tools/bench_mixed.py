"""Batches of prompts that use different adapters, beside the prompts of one adapter after the other.

    python tools/bench_mixed.py BASE [--adapters 1 8 48] [--prompts 48] [--tokens 16] [--repeats 3]

Adapters are made up: rank 16 on all modules, B near zero. "together" writes `--tokens` tokens behind all prompts in one
batch, each prompt with its own adapter; "one after another" gives each adapter's prompts a batch of its own, as one
would without such batches. Medians of interleaved runs; ratios mean nothing on a busy machine.
"""

import argparse
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from interleaved import median_seconds

import jcrosslora as jcl
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, fast_dtype, load_model, unstack_adapter
from jcrosslora.distill.fit import first_state
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.errors import JCrossLoRAError

_QUESTION = "Question number {number}: which of the two is the larger one, and what would make it smaller?\nAnswer:"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 48], help="how many there are")
    parser.add_argument("--prompts", type=int, default=48, help="prompts, which take turns with the adapters")
    parser.add_argument("--tokens", type=int, default=16, help="tokens behind each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    found = parser.parse_args()
    if min(*found.adapters, found.prompts, found.tokens, found.repeats) < 1 or max(found.adapters) > found.prompts:
        sys.exit("bench_mixed: all numbers have to be 1 or more, and there has to be a prompt for each adapter")
    return found


def made(base: BaseModel, model: Model, seed: int) -> jcl.Adapter:
    """Make up an adapter, too small to end a text."""
    first = first_state(model, DistillSettings(), seed).factors
    rng, roles = np.random.default_rng(seed), {}
    for role, one in first.roles.items():
        b = 1e-4 * rng.standard_normal(one.b.shape).astype(np.float32)
        roles[role] = StackedFactors(one.a, jnp.asarray(b))
    return unstack_adapter(StackedAdapter(roles), base)


def programs(
    base: BaseModel, loaded: dict[str, Any], count: int, arguments: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Return what is timed with so many adapters."""
    adapters = [made(base, loaded["model"], seed) for seed in range(count)]
    prompts = [_QUESTION.format(number=number) for number in range(arguments.prompts)]
    owners = np.arange(arguments.prompts) % count
    composed = jcl.compose(base, adapters, "select", **loaded)
    alone = [jcl.compose(base, [adapter], "select", **loaded) for adapter in adapters]
    parts = [[prompt for prompt, owner in zip(prompts, owners, strict=True) if owner == own] for own in range(count)]
    write = partial(composed.write, max_new_tokens=arguments.tokens)

    def one_after_another() -> None:
        for one, part in zip(alone, parts, strict=True):
            one.write(part, max_new_tokens=arguments.tokens)

    return {
        "together": partial(write, prompts, weights=np.eye(count, dtype=np.float32)[owners]),
        "one after another": one_after_another,
    }


def main() -> None:
    arguments = parse()
    try:
        base = open_base(arguments.base)
        loaded = {"model": load_model(base, fast_dtype()), "tokenizer": load_tokenizer(base)}
        for count in arguments.adapters:
            found = median_seconds(programs(base, loaded, count, arguments), arguments.repeats)
            together, apart = found["together"], found["one after another"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            figures = f"{together:6.2f} s together, {apart:6.2f} s one after another, {apart / together:.2f} x"
            print(f"{count:3} adapters: {figures}; peak {peak:.1f} GB", flush=True)
    except JCrossLoRAError as error:
        sys.exit(f"bench_mixed: {error}")


if __name__ == "__main__":
    main()
