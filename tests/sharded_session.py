"""The program of tests/test_sharding.py: bases divided over four devices of a CPU beside the same bases on one.

It prints one line of JSON for each part that the arguments name.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hybrid_models import DELTA, EXPERTS
from probe_bases import CORPUS, write_move
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.architectures.architecture import Architecture
from jcrosslora.checkpoint import check_config, expected_shapes, read_dims
from jcrosslora.decoder import Sampling, extend, load_model, prefill, stack_adapter
from jcrosslora.decoder.loading import divided_axis, held_numbers, mesh_of, stack_shapes
from jcrosslora.distill import DistillSettings, fit
from jcrosslora.distill.sources.decoder import RestrictedModel
from jcrosslora.distill.teacher import TaughtBatch

jax.config.update("jax_numpy_dtype_promotion", "strict")
COMMON = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "rms_norm_eps": 1e-6, "rope_theta": 100.0},
    **{"max_position_embeddings": 64, "tie_word_embeddings": True},
}
# Rows of the embedding and of gate and up, and columns of down, are no multiples of 4; the other side is.
UNEVEN = {"vocab_size": 90, "intermediate_size": 66, "num_hidden_layers": 2}
CASES = {
    "llama": ({"model_type": "llama"} | UNEVEN, "bfloat16"),
    "experts": ({"model_type": "qwen3_moe", "norm_topk_prob": True, "num_hidden_layers": 2} | EXPERTS, "float32"),
    "hybrid": (
        {"model_type": "qwen3_next", "shared_expert_intermediate_size": 20}
        | DELTA
        | EXPERTS
        | {"num_hidden_layers": 3, "head_dim": 8},
        "bfloat16",
    ),
}


class Steps(logging.Handler):
    """Counts how often the step of a fit is compiled."""

    compiled = 0

    def emit(self, record):
        self.compiled += "Compiling jit(gradient_step)" in record.getMessage()


STEPS = Steps()


def base_of(config):
    rng, config = np.random.default_rng(0), COMMON | config
    checked = check_config(config, "test")
    shapes = expected_shapes(Architecture(checked.family, checked.values, read_dims(checked, "test")))
    weights = {
        name: rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else 0.3 * rng.normal(size=shape)
        for name, shape in shapes.items()
    }
    return jcl.open_base({name: x.astype(np.float32) for name, x in weights.items()}, config=config)


def arrays(base, model):
    """The large arrays of a model, by the names of `stack_shapes`."""
    params = model.params
    found = {"embedding": params.embedding, "head": params.head} | params.weights | params.tensors
    return {name: found[name] for name in stack_shapes(base)}


def difference(one, other):
    """The largest difference of two trees over the largest number of the first."""
    pairs = list(zip(*([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)), strict=True))
    return float(max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs))


def written(base, model):
    """Logits behind prompts, and what is written greedily with an adapter."""
    model = model.with_adapter(stack_adapter(random_adapter(base, rank=2, scale=0.05), base))
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 90, (3, 9)).astype(np.int32))
    state = prefill(model, tokens, jnp.ones(tokens.shape, bool), room=16)
    scores = np.array(state.scores)  # the state is used up
    tokens = extend(model, state, Sampling(jnp.float32(0), jax.random.key(0)), count=16)[1]
    return scores, np.asarray(tokens)


def fitted(base, model):
    """The factors behind a few steps of a fit."""
    rng, own, target = np.random.default_rng(2), DistillSettings(fit_rank=4), RestrictedModel(model)
    tokens = jnp.asarray(rng.integers(3, 90, (2, 8)).astype(np.int32))
    teacher = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(6, base.dims.vocab)).astype(np.float32)))
    at, weight = jnp.asarray(np.arange(1, 13, 2).astype(np.int32)), jnp.ones(6)
    batch, state = TaughtBatch(tokens, jnp.ones(tokens.shape, bool), at, weight, teacher), fit.first_state(model, own)
    for _ in range(4):
        state = fit.gradient_step(target, state, batch, jnp.float32(1e-2), remat=False)
    return state.factors


def decoder(name):
    config, dtype = CASES[name]
    base, mesh = base_of(config), mesh_of(4)
    one, four = load_model(base, dtype), load_model(base, dtype, mesh=mesh)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), one, four))
    shares = {}
    for role, array in arrays(base, four).items():
        axis, sizes = divided_axis(role, array.shape, 4), {shard.data.size for shard in array.addressable_shards}
        assert sizes == {array.size // (1 if axis is None else 4)}
        shares[role] = axis
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(four))
    (scores, tokens), (scores_four, tokens_four) = written(base, one), written(base, four)
    factors = fitted(base, one)
    with jax.log_compiles():
        STEPS.compiled = 0
        factors_four = fitted(base, four)
    return {
        "shares": shares,
        "held": [held, held_numbers(base, 4), held_numbers(base)],
        "logits": difference(scores, scores_four),
        "same text": bool((tokens == tokens_four).all()),
        "different tokens": len(np.unique(tokens)),
        "factors": difference(factors, factors_four),
        "compiled": STEPS.compiled,
    }


def transfer():
    adapter, source, target = write_move(Path(tempfile.mkdtemp()))
    method = jcl.methods.Distill(completions=20, fit_rank=2, passes=1, answer_tokens=4, compared_tokens=300)
    found, effects = [], []
    for divide in ("never", "always"):
        options = {"prompts": CORPUS, "cache": False, "divide": divide}
        with jcl.show_progress(divide == "always"):
            found.append(jcl.transfer(adapter, source, target, method, **options))
        effect = found[-1].report.effect
        assert effect is not None
        effects.append([effect.source.kl, effect.target.kl])
    products = [{name: one.b @ one.a for name, one in each.adapter.modules.items()} for each in found]
    return {
        "updates": difference(*products),
        "texts": found[0].texts == found[1].texts,
        "devices": [each.report.fit.devices for each in found],
        "effect": difference(*effects),
    }


if __name__ == "__main__":
    logging.getLogger("jax").addHandler(STEPS)
    for part in sys.argv[1:]:
        print(json.dumps({part: transfer() if part == "transfer" else decoder(part)}), flush=True)
