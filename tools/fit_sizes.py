"""Time and memory of the default fit for bases of 1B to 70B parameters: on paper, and measured where there is a GPU.

    python tools/fit_sizes.py [--shapes 1B 3B 8B 70B] [--shards 1 4 8] [--device H100] [--run]
        [--prompt 96] [--answer 32] [--prompts 300] [--small] [--adapters 8]

Both bases have one shape, that of Llama 3.2 1B and 3B, or Llama 3.1 8B and 70B, with weights of zeros; `--small` has a
shape for trying the script on a CPU. The fit is the one with given prompts: `--prompts` completions of so many tokens,
in batches as `jcrosslora.distill` makes them, each used `passes` times. The devices are those of `roofline.py`.

Memory is that of a device: its part of both bases' weights in bfloat16, beside XLA's own analysis of the gradient step
and of writing, which is that of the backend that compiles: run it on the GPU for its figure. With `--shards` the
matrices are divided over so many devices as a fit divides them (`jcrosslora.decoder.loading`); on a CPU they are
forced ones, and nothing is allocated.

A forward pass takes two operations for each weight and token, the gradient as many again, since no weight has one, and
recomputation once more. A program takes the longer of its operations and of reading its weights, at the shares of the
device's rates in `roofline.py`. Several devices share both, and send two streams a layer to each other. With `--run`
each program is run as well, on one device, and a further column has the median of five. With `--adapters N` a last
table has the time of N fits whose batches are joined to one, over that of one fit.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table
from roofline import DEVICES, Device

import jcrosslora as jcl
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import Model, Sampling, extend, load_model, prefill, settings_of
from jcrosslora.decoder.loading import mesh_of, weight_sharding, whole
from jcrosslora.distill.batches import FIT_ROWS
from jcrosslora.distill.fit import first_state, gradient_step, needs_remat
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources.decoder import RestrictedModel, shared_log_probs
from jcrosslora.distill.teacher import TaughtBatch

COMPARED = 6500  # symbols that predictions are compared on
WRITTEN = 48  # texts that are written together
SHAPES = {  # layers, hidden, intermediate, heads, key/value heads, head size, vocabulary
    "1B": (16, 2048, 8192, 32, 8, 64, 128_256),
    "3B": (28, 3072, 8192, 24, 8, 128, 128_256),
    "8B": (32, 4096, 14_336, 32, 8, 128, 128_256),
    "70B": (80, 8192, 28_672, 64, 8, 128, 128_256),
    "small": (2, 64, 128, 4, 2, 16, 7000),
}


def empty_base(name: str, **changes: int) -> BaseModel:
    """A base of zeros in no memory: every array shows one number. Its layers and vocabulary may be others."""
    layers, hidden, inner, heads, kv_heads, size, vocab = SHAPES[name]
    layers, vocab = changes.get("layers", layers), changes.get("vocab", vocab)
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
    # In the dtype that is asked for, of which no copy is made.
    weights = {key: np.broadcast_to(ml_dtypes.bfloat16(0), shape) for key, shape in shapes.items()}
    return jcl.open_base(weights, config=config, name=name)


def shapes_of(name: str) -> Model:
    """A base with shapes for weights, by those of one layer and one token: what is traced stays in memory."""
    layers, hidden, *_, vocab = SHAPES[name]
    one = jax.eval_shape(partial(load_model, empty_base(name, layers=1, vocab=1), jnp.bfloat16)).params
    found: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype), one)
    embedding = jax.ShapeDtypeStruct((vocab, hidden), one.embedding.dtype)
    return Model(settings_of(empty_base(name)), found.replace(embedding=embedding, final_norm=one.final_norm))


def make_programs(model: Model, prompt: int, answer: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Make the programs of a fit, with their arguments, for weights or for shapes of weights.

    They are the writing of a batch of answers, a pass of a base over a batch, and a gradient step on one.
    """
    state = jax.eval_shape(lambda model: first_state(model, DistillSettings()), model)
    places = FIT_ROWS * (prompt + answer) // 2
    tokens, mask = np.zeros((FIT_ROWS, prompt + answer), np.int32), np.ones((FIT_ROWS, prompt + answer), bool)
    at, weight = np.arange(places, dtype=np.int32), np.ones(places, np.float32)
    read_by = [jnp.asarray(part) for part in (tokens, mask, at, weight)]
    taught = TaughtBatch(read_by[0], read_by[1], read_by[2], read_by[3], jnp.zeros((places, COMPARED)))
    restricted = restricted_model(model)
    remat = needs_remat(model.settings, tokens.shape)

    def write(model: Model, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        begun = prefill(model, tokens, mask, room=answer)
        return extend(model, begun, Sampling(jnp.float32(1), jax.random.key(0)), count=answer)[1]

    def step(target: RestrictedModel, state: Any, taught: TaughtBatch) -> Any:
        return gradient_step(target, state, taught, jnp.float32(1e-3), remat=remat)

    prompts = jnp.zeros((WRITTEN, prompt), jnp.int32), jnp.ones((WRITTEN, prompt), bool)
    return {
        "write": (jax.jit(write), (model, *prompts)),
        "read": (shared_log_probs, (restricted, taught.tokens, taught.mask, taught.at)),
        "step": (jax.jit(step), (restricted, state, taught)),
    }


def restricted_model(model: Model) -> RestrictedModel:
    """Keep the rows of the vocabulary that a fit reads and predicts."""

    def cut(rows: Any) -> Any:
        shape = (min(COMPARED, rows.shape[0]), *rows.shape[1:])
        if not isinstance(rows, jax.ShapeDtypeStruct):
            return rows[: shape[0]]
        # These few are whole on each device.
        sharding = None if rows.sharding is None else whole(rows.sharding.mesh)
        return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=sharding)

    params = dataclasses.replace(model.params, embedding=cut(model.params.embedding))
    return RestrictedModel(dataclasses.replace(model, params=params))


def divided(model: Model, devices: int) -> Model:
    """Divide shapes of weights over devices as `load_model` divides weights."""
    if devices == 1:
        return model
    params, mesh = model.params, mesh_of(devices)

    def lie(sharding: NamedSharding, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    found: Any = jax.tree.map(partial(lie, whole(mesh)), params)
    weights = {role: lie(weight_sharding(mesh, role, leaf.shape), leaf) for role, leaf in params.weights.items()}
    embedding = lie(weight_sharding(mesh, "embedding", params.embedding.shape), params.embedding)
    return Model(model.settings, found.replace(weights=weights, embedding=embedding))


def bytes_of(tree: Any) -> int:
    """Bytes on one device."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        return int(np.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


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


def phases(
    model: Model,
    arguments: argparse.Namespace,
    device: Device,
    devices: int = 1,
    adapters: int = 1,
) -> dict[str, tuple[int, float]]:
    """How often each program runs in so many fits whose batches are one, and its seconds on paper."""
    rows, texts = FIT_ROWS * adapters, WRITTEN * adapters
    inner = sum(int(np.prod(weight.shape)) for weight in model.params.weights.values())
    head, settings = int(np.prod(model.params.embedding.shape)), model.settings
    width, batches = arguments.prompt + arguments.answer, -(-arguments.prompts // FIT_ROWS)
    # Of the stream in bfloat16, by a ring: all but its own part, out and back.
    ring = 4 * settings.layers * 2 * settings.hidden * (devices - 1) / devices

    def seconds(operations: float, weights: float, positions: float) -> float:
        return device.seconds(operations, 2 * weights, ring * positions, devices)

    pass_ = 2 * (inner + COMPARED * settings.hidden / 2) * rows * width
    read = seconds(pass_, inner, rows * width)
    token = seconds(2 * (inner + head) * texts, inner + head, texts)
    prefilled = seconds(2 * inner * texts * arguments.prompt, inner, texts * arguments.prompt)
    again = 2 + needs_remat(settings, (FIT_ROWS, width))
    return {
        "write": (-(-arguments.prompts // WRITTEN), prefilled + arguments.answer * token),
        "read": (3 * batches, read),
        "step": (DistillSettings().course(prompted=True).passes * batches, again * read),
    }


def temporary_bytes(program: Any, given: tuple[Any, ...]) -> int:
    return program.lower(*given).compile().memory_analysis().temp_size_in_bytes


def memory_rows(
    shapes: Sequence[str], shards: Sequence[int], arguments: argparse.Namespace
) -> Iterator[tuple[str, int, tuple[int, int, int]]]:
    """For each shape and number of devices, the bytes on each: of both bases' weights, of a step, of writing."""
    for name in shapes:
        whole = shapes_of(name)
        for devices in shards:
            model = divided(whole, devices)
            programs = make_programs(model, arguments.prompt, arguments.answer)
            step, write = (temporary_bytes(*programs[part]) for part in ("step", "write"))
            yield name, devices, (2 * bytes_of(model), step, write)


def times_table(shapes: Sequence[str], arguments: argparse.Namespace, device: Device, *, run: bool) -> Table:
    """Make the table of each program's time on one device, on paper and, if they are run, measured."""
    timed = ["s each, measured"] if run else []
    times = Table("shape", "program", "times", "s each, on paper", *timed, "s in all")
    for name in shapes:
        base = empty_base(name)
        model = load_model(base, jnp.bfloat16) if run else shapes_of(name)
        programs = make_programs(model, arguments.prompt, arguments.answer) if run else {}
        for phase, (count, seconds) in phases(model, arguments, device).items():
            found = [measured(*programs[phase])] if run else []
            each = [f"{value:.4f}" for value in (seconds, *found)]
            times.add_row(name, phase, str(count), *each, f"{count * (found or [seconds])[0]:.1f}")
    return times


def whole_fit(name: str, devices: int, arguments: argparse.Namespace, device: Device, adapters: int = 1) -> float:
    """Seconds of all programs of a fit, or of several whose batches are one, on paper."""
    given = shapes_of(name), arguments, device, devices, adapters
    return sum(count * seconds for count, seconds in phases(*given).values())


def joined_table(shapes: Sequence[str], adapters: int, arguments: argparse.Namespace) -> Table:
    """Make the table of the time of fits whose batches are one, over that of one fit, on paper, by device."""
    found = Table(f"{adapters} fits at once", *DEVICES)
    for name in shapes:
        ratios = (
            whole_fit(name, 1, arguments, device, adapters) / whole_fit(name, 1, arguments, device)
            for device in DEVICES.values()
        )
        found.add_row(name, *(f"{ratio:.1f} x" for ratio in ratios))
    return found


def add_lengths(parser: argparse.ArgumentParser) -> None:
    for name, usual in (("prompt", 96), ("answer", 32), ("prompts", 300)):
        parser.add_argument(f"--{name}", type=int, default=usual)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1B", "3B", "8B", "70B"])
    parser.add_argument("--shards", nargs="+", type=int, default=[1], help="numbers of devices")
    parser.add_argument("--device", choices=list(DEVICES), default="H100")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", action="store_true", help="run the programs as well, with weights in memory")
    parser.add_argument("--adapters", type=int, default=1, help="fits at once")
    add_lengths(parser)
    arguments = parser.parse_args(given)
    shapes = ["small"] if arguments.small else arguments.shapes
    if max(arguments.shards) > 1:
        # Where devices are in use already, it is too late for more.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", max(arguments.shards))
    if max(arguments.shards) > jax.device_count():
        parser.error(f"--shards {max(arguments.shards)}: there are {jax.device_count()} devices")
    console = Console(width=None if sys.stdout.isatty() else 120)
    memory = Table(
        "shape", "devices", "weights of both", "gradient step", "writing", "s of a fit, on paper, if it fits"
    )
    for name, devices, sizes in memory_rows(shapes, arguments.shards, arguments):
        whole = sizes[0] + max(sizes[1:])
        fitting = [kind for kind, device in DEVICES.items() if device.holds(whole)]
        paper = ", ".join(f"{kind} {whole_fit(name, devices, arguments, DEVICES[kind]):.3g}" for kind in fitting)
        memory.add_row(name, str(devices), *(f"{size / 1e9:.1f} GB" for size in sizes), paper or "none")
    console.print(memory)
    console.print(times_table(shapes, arguments, DEVICES[arguments.device], run=arguments.run))
    if arguments.adapters > 1:
        console.print(joined_table(shapes, arguments.adapters, arguments))


if __name__ == "__main__":
    main()
