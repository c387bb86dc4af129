"""Passes of a base in float32, in bfloat16, and in bfloat16 kept as bits: medians of interleaved runs on this machine.

    python tools/bench_decoder.py BASE [--tokens 64] [--rows 8] [--texts 48] [--repeats 5]

The rivals of the bits, which is how `load_model` keeps bfloat16 on a CPU, are the other two. Timed are

- forward: the hidden states of `--rows` texts of `--tokens` tokens;
- train: the loss of a batch of that size, all of its tokens being answers, and its gradient for a LoRA on all modules;
- write: 16 tokens to each of `--texts` texts of 16.

Each is compiled before it is timed. "error" is that of the hidden states against float32, relative (rms).
Ratios of wall time mean nothing on a busy machine.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import median_seconds

from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.decoder import Generator, forward, load_model
from jcrosslora.errors import JCrossLoRAError
from jcrosslora.training import Batch, TrainingSettings, first_factors, loss_and_gradient

KINDS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "bits of bfloat16": ("bfloat16", True)}
WRITTEN = 16


def passes(base: BaseModel, kind: str, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, for weights of a kind."""
    dtype, packed = KINDS[kind]
    model = load_model(base, dtype, packed=packed)
    rng = np.random.default_rng(0)
    shape = arguments.rows, arguments.tokens
    tokens = jnp.asarray(rng.integers(0, base.dims.vocab, shape), jnp.int32)
    count = tokens.size
    answers = jnp.arange(count, dtype=jnp.int32), tokens.reshape(-1), jnp.ones(count)
    batch = Batch(tokens, jnp.ones(shape, bool), *answers, jnp.arange(arguments.rows, dtype=jnp.int32))
    prompts = list(rng.integers(0, base.dims.vocab, (arguments.texts, WRITTEN)))
    usual = TrainingSettings()
    factors, (rank, alpha) = first_factors(base, usual), usual.size
    run = jax.jit(lambda tokens: forward(model, tokens).hidden)
    generator = Generator.of(base, model=model)
    return {
        "forward": lambda: run(tokens),
        "train": lambda: loss_and_gradient(model, factors, batch, alpha / rank),
        "write": lambda: generator.continue_tokens(prompts, WRITTEN, 1.0, jax.random.key(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.rows, arguments.texts, arguments.repeats) < 1:
        sys.exit("bench_decoder: --tokens, --rows, --texts and --repeats have to be 1 or more")
    try:
        base = open_base(arguments.base)
        contenders = {kind: passes(base, kind, arguments) for kind in KINDS}
    except JCrossLoRAError as error:
        sys.exit(f"bench_decoder: {error}")
    hidden = {kind: np.asarray(each["forward"](), np.float64) for kind, each in contenders.items()}
    exact = hidden["float32"]
    size = np.sqrt(np.mean(exact**2))
    for kind, found in hidden.items():
        print(f"{kind:17} error {np.sqrt(np.mean((found - exact) ** 2)) / size:.1e}")
    print(f"{base.name} on {jax.default_backend()}, jax {jax.__version__}; seconds, and float32's over them")
    for name in ("forward", "train", "write"):
        taken = median_seconds({kind: each[name] for kind, each in contenders.items()}, arguments.repeats)
        for kind, seconds in taken.items():
            print(f"{name:8} {kind:17} {seconds:7.3f} s {taken['float32'] / seconds:5.2f} x")


if __name__ == "__main__":
    main()
