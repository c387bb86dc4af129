"""Time a model with experts beside a dense one with as many active parameters, on random weights.

Both are made in memory, with the sizes of a small model: attention alike, and a dense MLP as wide as the experts of one
token together. Run it with one thread for figures that can be compared:

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 1 python tools/bench_experts.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import median_seconds

from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.decoder import forward, load_model
from jcrosslora.training import Batch, TrainingSettings, first_factors, loss_and_gradient

HIDDEN, LAYERS, VOCAB = 512, 6, 512


def base_of(config: dict[str, Any]) -> BaseModel:
    """Make a base of a configuration with random weights."""
    rng, hidden = np.random.default_rng(0), HIDDEN
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    } | config
    from jcrosslora.architectures.architecture import Architecture
    from jcrosslora.checkpoint.config import check_config, read_dims
    from jcrosslora.checkpoint.layout import expected_shapes

    checked = check_config(config, "bench")
    shapes = expected_shapes(Architecture(checked.family, checked.values, read_dims(checked, "bench")))
    return open_base(
        {name: (0.02 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()},
        config=config,
    )


def passes(base: BaseModel, rows: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    model = load_model(base)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (rows, tokens)), jnp.int32)
    answers = jnp.arange(ids.size, dtype=jnp.int32), ids.reshape(-1), jnp.ones(ids.size)
    batch = Batch(ids, jnp.ones(ids.shape, bool), *answers, jnp.arange(rows, dtype=jnp.int32))
    usual = TrainingSettings(modules=("q_proj", "o_proj"))
    factors = first_factors(base, usual)
    run = jax.jit(lambda ids: forward(model, ids).hidden)
    return {
        f"forward, {rows} x {tokens} tokens": lambda: run(ids),
        f"train, {rows} x {tokens} tokens": lambda: loss_and_gradient(model, factors, batch, 1.0),
        f"forward, {rows} tokens": lambda: run(ids[:, :1]),
    }


def main() -> None:
    """Print seconds of both models, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--used", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    sparse = base_of(
        {
            "model_type": "qwen3_moe",
            "intermediate_size": arguments.width,
            "moe_intermediate_size": arguments.width,
            "num_experts": arguments.experts,
            "num_experts_per_tok": arguments.used,
            "norm_topk_prob": True,
        }
    )
    dense = base_of({"model_type": "qwen3", "intermediate_size": arguments.width * arguments.used})
    timed = {
        kind: passes(base, arguments.rows, arguments.tokens)
        for kind, base in {"dense": dense, "experts": sparse}.items()
    }
    print(f"{arguments.experts} experts of width {arguments.width}, {arguments.used} a token; {jax.default_backend()}")
    for name in timed["dense"]:
        taken = median_seconds({kind: each[name] for kind, each in timed.items()}, arguments.repeats)
        ratio = taken["experts"] / taken["dense"]
        print(f"{name:30} dense {taken['dense']:7.3f} s, experts {taken['experts']:7.3f} s, ratio {ratio:5.2f}")


if __name__ == "__main__":
    main()
