"""Time and memory of the default fit for bases of 1B to 8B parameters: on paper, and measured where there is a GPU.

    python tools/fit_sizes.py [--shapes 1B 3B 8B] [--run] [--rate 989] [--bandwidth 3.35] [--memory 80]
        [--prompt 96] [--answer 32] [--prompts 300] [--small]

Both bases have one shape, that of Llama 3.2 1B and 3B or Llama 3.1 8B, with weights of zeros; `--small` has a shape for
trying the script on a CPU. The fit is the one with given prompts: `--prompts` completions of so many tokens, in batches
as `jcrosslora.fit.distill` makes them, each used `passes` times. The usual figures are those of an H100 SXM (dense
bfloat16 TFLOP/s, TB/s, GB).

Memory is that of both bases' weights in bfloat16, beside XLA's own analysis of the gradient step and of writing, which
is that of the backend that compiles: run it on the GPU for its figure. A forward pass takes two operations for each
weight and token, the gradient as many again, since no weight has one, and recomputation once more. A program takes the
longer of its operations at `SHARE` of the rate and its weights' bytes at `SHARE_READ` of the bandwidth. With `--run`
each program is run as well, and a further column has the median of five.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import DecoderSettings, Params, load_params, settings_of
from jcrosslora.decoder.generate import extend, prefill
from jcrosslora.fit.distill.batches import BATCH
from jcrosslora.fit.distill.fit import first_state, gradient_step, needs_remat
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.teacher import TaughtBatch
from jcrosslora.sources.reduced_base import shared_log_probs

SHARE, SHARE_READ = 0.4, 0.7  # of the device's rates that such programs usually reach
FREE = 0.92  # of the device's memory that JAX may use
COMPARED = 6500  # symbols that predictions are compared on
WRITTEN = 48  # texts that are written together
SHAPES = {  # layers, hidden, intermediate, heads, key/value heads, head size, vocabulary
    "1B": (16, 2048, 8192, 32, 8, 64, 128_256),
    "3B": (28, 3072, 8192, 24, 8, 128, 128_256),
    "8B": (32, 4096, 14_336, 32, 8, 128, 128_256),
    "small": (2, 64, 128, 4, 2, 16, 7000),
}


def empty_base(name: str) -> BaseModel:
    """A base of zeros in no memory: every array shows one number."""
    layers, hidden, inner, heads, kv_heads, size, vocab = SHAPES[name]
    config = {
        **{"model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads},
        **{"head_dim": size, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True},
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        modules = {
            **{"self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (kv_heads * size, hidden)},
            **{"self_attn.v_proj": (kv_heads * size, hidden), "self_attn.o_proj": (hidden, heads * size)},
            **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
            **{"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)},
        }
        shapes |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in modules.items()}
    weights = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
    return jcl.open_base(weights, config=config, name=name)


def make_programs(
    settings: DecoderSettings, params: Params, prompt: int, answer: int
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Make the programs of a fit, with their arguments, for weights or for shapes of weights.

    They are the writing of a batch of answers, a pass of a base over a batch, and a gradient step on one.
    """
    state = jax.eval_shape(lambda params: first_state(params, DistillSettings()), params)
    places = BATCH * (prompt + answer) // 2
    tokens, mask = np.zeros((BATCH, prompt + answer), np.int32), np.ones((BATCH, prompt + answer), bool)
    at, weight = np.arange(places, dtype=np.int32), np.ones(places, np.float32)
    read_by = [jnp.asarray(part) for part in (tokens, mask, at, weight)]
    taught = TaughtBatch(read_by[0], read_by[1], read_by[2], read_by[3], jnp.zeros((places, COMPARED)))
    reduced = reduced_params(params)
    remat = needs_remat(settings, tokens.shape)

    def write(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        begun = prefill(settings, params, None, tokens, mask, room=answer)
        return extend(settings, params, None, begun, jnp.float32(1), jax.random.key(0), count=answer)[1]

    def step(params: Params, state: Any, taught: TaughtBatch) -> Any:
        return gradient_step(settings, "adam", params, None, state, taught, jnp.float32(1e-3), ends=0, remat=remat)

    def read(params: Params, tokens: jax.Array, mask: jax.Array, at: jax.Array) -> jax.Array:
        return shared_log_probs(settings, params, None, tokens, mask, at)

    prompts = jnp.zeros((WRITTEN, prompt), jnp.int32), jnp.ones((WRITTEN, prompt), bool)
    return {
        "write": (jax.jit(write), (params, *prompts)),
        "read": (jax.jit(read), (reduced, taught.tokens, taught.mask, taught.at)),
        "step": (jax.jit(step), (reduced, state, taught)),
    }


def reduced_params(params: Params) -> Params:
    """Keep the rows of the vocabulary that a fit reads and predicts."""

    def cut(rows: Any) -> Any:
        shape = (min(COMPARED, rows.shape[0]), *rows.shape[1:])
        return jax.ShapeDtypeStruct(shape, rows.dtype) if isinstance(rows, jax.ShapeDtypeStruct) else rows[: shape[0]]

    return params.replace(embedding=cut(params.embedding))  # pyright: ignore[reportAttributeAccessIssue]


def bytes_of(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measured(program: Any, given: tuple[Any, ...]) -> float:
    """Median seconds of five runs behind a first one."""
    given = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if not hasattr(leaf, "devices") else leaf, given
    )
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(program(*given))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def phases(settings: DecoderSettings, params: Params, arguments: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """How often each program runs in a fit, and its seconds on paper."""
    rate, bandwidth = SHARE * arguments.rate * 1e12, SHARE_READ * arguments.bandwidth * 1e12
    inner = sum(int(np.prod(weight.shape)) for weight in params.weights.values())
    head = int(np.prod(params.embedding.shape))
    width, batches = arguments.prompt + arguments.answer, -(-arguments.prompts // BATCH)
    read = max(2 * (inner + COMPARED * settings.hidden / 2) * BATCH * width / rate, 2 * inner / bandwidth)
    token = max(2 * (inner + head) * WRITTEN / rate, 2 * (inner + head) / bandwidth)
    again = 2 + needs_remat(settings, (BATCH, width))
    return {
        "write": (
            -(-arguments.prompts // WRITTEN),
            2 * inner * WRITTEN * arguments.prompt / rate + arguments.answer * token,
        ),
        "read": (3 * batches, read),
        "step": (DistillSettings().passes * batches, again * read),
    }


def temporary_bytes(program: Any, given: tuple[Any, ...]) -> int:
    return program.lower(*given).compile().memory_analysis().temp_size_in_bytes


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1B", "3B", "8B"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", action="store_true", help="run the programs as well, with weights in memory")
    for name, usual, unit in (("rate", 989.0, "TFLOP/s"), ("bandwidth", 3.35, "TB/s"), ("memory", 80.0, "GB")):
        parser.add_argument(f"--{name}", type=float, default=usual, help=unit)
    for name, usual in (("prompt", 96), ("answer", 32), ("prompts", 300)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    arguments = parser.parse_args(given)
    console = Console(width=None if sys.stdout.isatty() else 120)
    memory = Table("shape", "weights of both", "gradient step", "writing", f"fits {arguments.memory:g} GB")
    timed = ["s each, measured"] if arguments.run else []
    times = Table("shape", "program", "times", "s each, on paper", *timed, "s in all")
    for name in ["small"] if arguments.small else arguments.shapes:
        base = empty_base(name)
        settings, load = settings_of(base), partial(load_params, base, jnp.bfloat16)
        params = load() if arguments.run else jax.eval_shape(load)
        programs = make_programs(settings, params, arguments.prompt, arguments.answer)
        sizes = [2 * bytes_of(params), *(temporary_bytes(*programs[part]) for part in ("step", "write"))]
        fits = sizes[0] + max(sizes[1:]) < FREE * 1e9 * arguments.memory
        memory.add_row(name, *(f"{size / 1e9:.1f} GB" for size in sizes), "yes" if fits else "no")
        for phase, (count, seconds) in phases(settings, params, arguments).items():
            found = [measured(*programs[phase])] if arguments.run else []
            each = [f"{value:.4f}" for value in (seconds, *found)]
            times.add_row(name, phase, str(count), *each, f"{count * (found or [seconds])[0]:.1f}")
    console.print(memory)
    console.print(times)


if __name__ == "__main__":
    main()
