"""Test adapters, captures, log-probabilities and sampling of the decoder without torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_set import full_except
from safetensors.numpy import load_file, save_file
from tiny_bases import delta, random_adapter, write_llama

from jcrosslora.adapter import Adapter, LoRAFactors, load_adapter, save_adapter
from jcrosslora.architectures import DENSE_ROLES
from jcrosslora.architectures.ops import linear, rows_at
from jcrosslora.checkpoint import ROLE_PATHS, describe_base, open_base
from jcrosslora.decoder import (
    INPUT_SITES,
    Sampling,
    StackedFactors,
    extend,
    fast_dtype,
    forward,
    init_cache,
    load_model,
    logits,
    prefill,
    stack_adapter,
    stack_adapters,
    step,
    target_log_probs,
    unstack_adapter,
)
from jcrosslora.decoder.model import update
from jcrosslora.decoder.sampling import draw, likeliest
from jcrosslora.errors import AdapterError, UsageError

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = open_base(write_llama(tmp_path_factory.mktemp("llama")))
    return base, load_model(base)


capturing = jax.jit(forward, static_argnames="capture")


@jax.jit
def hidden(ours, tokens, adapter=None):
    return forward(ours.with_adapter(adapter), tokens).hidden


def test_vmap_over_adapters_matches_each_adapter_alone(model):
    base, ours = model
    first = random_adapter(base, rank=2, seed=1, scale=0.05)
    second = random_adapter(base, rank=5, seed=2, scale=0.05, roles=("q_proj", "down_proj"))
    both = jax.vmap(lambda adapter: hidden(ours, TOKENS, adapter))(stack_adapters([first, second], base))
    for found, adapter in zip(both, (first, second), strict=True):
        np.testing.assert_allclose(found, hidden(ours, TOKENS, stack_adapter(adapter, base)), **CLOSE)
    assert not np.allclose(both[0], both[1], atol=1e-2)


def test_stacking_and_unstacking_keep_every_update(model):
    base, _ = model
    whole = random_adapter(base, rank=3, scale=0.5)
    kept = {name: factors for name, factors in whole.modules.items() if "layers.1." in name and "k_proj" not in name}
    kept["model.layers.2.self_attn.q_proj"] = LoRAFactors(np.ones((1, 48), np.float32), np.ones((48, 1), np.float32))
    stacked = stack_adapter(Adapter(modules=kept), base)
    assert set(stacked.roles) == set(DENSE_ROLES) - {"k_proj"}
    back = unstack_adapter(stacked, base).modules
    assert set(back) == set(kept)
    for name, factors in kept.items():
        np.testing.assert_allclose(delta(back[name]), delta(factors), rtol=1e-5, atol=1e-6)


def test_updates_of_fused_modules_are_split(model, tmp_path):
    # The same weights as phi3 holds them, and the adapter as peft would have trained it there.
    folder = write_llama(tmp_path / "phi3")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "phi3", "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Phi3ForCausalLM"]}))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        for path, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            names = [f"model.layers.{layer}.{path.split('.')[0]}.{part}_proj.weight" for part in parts]
            tensors[f"model.layers.{layer}.{path}_proj.weight"] = np.concatenate([tensors.pop(name) for name in names])
    save_file(tensors, folder / "model.safetensors")
    base, adapter = open_base(folder), random_adapter(model[0], scale=0.5)
    save_adapter(adapter, tmp_path / "adapter", base=describe_base(base, digest=""))
    fused = load_adapter(tmp_path / "adapter", base)
    assert "model.layers.0.self_attn.qkv_proj" in fused.modules
    wanted = stack_adapter(adapter, model[0])
    alone, beside = stack_adapter(fused, base), stack_adapters([Adapter(modules={}), fused], base)
    for role in DENSE_ROLES:
        exact = wanted.roles[role].b @ wanted.roles[role].a
        np.testing.assert_allclose(alone.roles[role].b @ alone.roles[role].a, exact, atol=1e-5)
        np.testing.assert_allclose(beside.roles[role].b[1] @ beside.roles[role].a[1], exact, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("model.layers.9.self_attn.q_proj", (2, 48), "model.layers.9"),
        ("model.layers.0.self_attn.q_proj", (2, 47), "[48, 48]"),
    ],
)
def test_adapter_that_does_not_fit_the_base_is_refused(model, name, shape, named):
    factors = LoRAFactors(np.zeros(shape, np.float32), np.zeros((48, 2), np.float32))
    with pytest.raises(AdapterError) as caught:
        stack_adapter(Adapter(modules={name: factors}), model[0])
    assert named in str(caught.value)
    with pytest.raises(AdapterError):
        stack_adapters([], model[0])


@pytest.mark.parametrize("remat", full_except([False, True], [True]))
def test_gradient_of_a_loss_matches_finite_differences(model, remat):
    base, ours = model
    adapter = stack_adapter(random_adapter(base, rank=2, scale=0.02), base)
    direction = stack_adapter(random_adapter(base, rank=2, seed=3, scale=1.0), base)

    @jax.jit
    def loss(adapter):
        states = forward(ours.with_adapter(adapter), TOKENS, remat=remat).hidden
        return -jnp.mean(target_log_probs(ours, states[:, :-1], TOKENS[:, 1:], chunk=5))

    def along(size):
        return float(loss(jax.tree.map(lambda at, towards: at + size * towards, adapter, direction)))

    gradient = float(sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.jit(jax.grad(loss))(adapter), direction))))
    assert gradient == pytest.approx((along(1e-4) - along(-1e-4)) / 2e-4, rel=0.02)
    assert abs(gradient) > 1e-2


@pytest.mark.full
def test_log_probs_do_not_depend_on_the_chunk_size(model):
    _, ours = model
    states = hidden(ours, TOKENS)
    wanted = jax.nn.log_softmax(logits(ours, states), axis=-1)
    wanted = jnp.take_along_axis(wanted, TOKENS[..., None], axis=-1)[..., 0]
    for chunk in (1, 7, 24, 1000):
        found = target_log_probs(ours, states, TOKENS, chunk=chunk)
        np.testing.assert_allclose(found, wanted, **CLOSE)


def test_reduce_gets_each_layer_and_keeps_only_its_result(model):
    _, ours = model
    sites = tuple(dict.fromkeys(INPUT_SITES[role] for role in DENSE_ROLES))

    def moments(seen):
        rows = {site: seen.inputs[site].reshape(-1, seen.inputs[site].shape[-1]) for site in sites}
        return seen.layer, {site: jnp.matmul(x.T, x, precision="highest") for site, x in rows.items()}

    run = jax.jit(lambda: forward(ours, TOKENS, capture=frozenset({"inputs"}), reduce=moments))
    output = run()
    layers, found = output.reduced
    np.testing.assert_array_equal(layers, np.arange(ours.settings.layers))
    for site in sites:
        rows = np.asarray(output.captured["inputs"][site], np.float64).reshape(layers.size, -1, found[site].shape[1])
        np.testing.assert_allclose(found[site], rows.swapaxes(1, 2) @ rows, rtol=1e-4, atol=1e-3)


def test_captured_outputs_match_modules_applied_to_captured_inputs(model):
    base, ours = model
    adapter = random_adapter(base, rank=2, scale=0.05)
    kept = frozenset({"inputs", "outputs"})
    output = capturing(ours.with_adapter(stack_adapter(adapter, base)), TOKENS, capture=kept)
    for role in DENSE_ROLES:
        name = f"model.layers.1.{ROLE_PATHS[role]}"
        weight = np.asarray(base.weight(name), np.float64) + delta(adapter.modules[name])
        read = np.asarray(output.captured["inputs"][INPUT_SITES[role]][1], np.float64)
        np.testing.assert_allclose(output.captured["outputs"][role][1], read @ weight.T, atol=1e-4, rtol=1e-4)


def test_unknown_capture_is_refused_and_one_sequence_is_a_batch_of_one(model):
    _, ours = model
    with pytest.raises(UsageError, match="gradients"):
        forward(ours, TOKENS, capture=frozenset({"gradients"}))
    alone = capturing(ours, TOKENS[0], capture=frozenset({"residual"}))
    assert alone.captured["residual"].shape == (ours.settings.layers + 1, 1, 12, 48)
    np.testing.assert_allclose(alone.hidden[0], hidden(ours, TOKENS)[0], **CLOSE)


def greedy(ours, prompt, length, adapter):
    """Decode token by token, with a pass over the whole sequence each time; later tokens have no influence."""
    text = np.zeros((1, len(prompt) + length), np.int32)
    text[0, : len(prompt)] = prompt
    for place in range(len(prompt), text.shape[1]):
        state = hidden(ours, text, adapter)[0, place - 1]
        text[0, place] = jnp.argmax(logits(ours, state))
    return text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_sampling_at_temperature_0_matches_greedy_decoding_of_unpadded_prompts(model, side):
    base, ours = model
    # A strong adapter, because a tied random model only repeats its last token.
    adapter = stack_adapter(random_adapter(base, rank=4, scale=1.0), base)
    prompts = [TOKENS[0, :5], TOKENS[1, :2]]
    padded, mask = np.zeros((2, 5), np.int32), np.zeros((2, 5), bool)
    for row, prompt in enumerate(prompts):
        place = slice(5 - len(prompt), 5) if side == "left" else slice(len(prompt))
        padded[row, place], mask[row, place] = prompt, True
    state = prefill(ours.with_adapter(adapter), padded, mask, room=12)
    _, tokens, valid = extend(ours.with_adapter(adapter), state, Sampling(jnp.float32(0), jax.random.key(0)), count=12)
    assert valid.all()
    assert all(len(set(row)) > 4 for row in tokens.tolist())
    for row, prompt in enumerate(prompts):
        assert tokens[row].tolist() == greedy(ours, prompt, 12, adapter)


def test_sampling_stops_after_a_stop_token_and_repeats_with_its_key(model):
    _, ours = model
    prompts, mask = TOKENS[:, :3], np.ones((2, 3), bool)

    def run(key, stop_tokens=()):
        state = prefill(ours, prompts, mask, room=40)
        key = jax.random.key(key)
        return extend(ours, state, Sampling(jnp.float32(2), key), count=40, stop_tokens=stop_tokens)[1:]

    (free, _), (again, _) = run(1), run(1)
    np.testing.assert_array_equal(free, again)
    assert (free != run(2)[0]).any()
    stop = int(free[0, 4])
    tokens, valid = run(1, (stop, 95))
    for row in range(2):
        wanted = free[row].tolist()
        ends = [place for place, token in enumerate(wanted) if token in (stop, 95)]
        count = ends[0] + 1 if ends else 40
        assert valid[row].tolist() == [True] * count + [False] * (40 - count)
        assert tokens[row].tolist() == wanted[:count] + [0] * (40 - count)


@pytest.mark.parametrize("packed", [False, True])
def test_step_keeps_the_dtypes_of_the_cache_in_bfloat16(model, packed):
    half = load_model(model[0], jnp.bfloat16, packed=packed)
    assert half.params.stream_dtype == (jnp.float32 if packed else jnp.bfloat16)
    cache = init_cache(half.settings, 2, 4, half.params.stream_dtype)
    scores, grown = jax.eval_shape(step, half, cache, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    assert scores.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, grown) == jax.tree.map(lambda leaf: leaf.dtype, cache)


def test_an_update_of_a_rounded_input_has_rounded_products():
    """Of a bfloat16 input all products are of bfloat16 numbers, and near those of float32, with their gradients."""
    rng = np.random.default_rng(4)
    x, gradient = (jnp.asarray(rng.normal(size=(2, 5, width)), jnp.float32) for width in (64, 48))
    factors = StackedFactors(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 64), (48, 8))))

    def found(x):
        value, back = jax.vjp(update, x, factors)
        return value, *jax.tree.leaves(back(gradient))

    rounded = x.astype(jnp.bfloat16)
    for near, exact in zip(found(rounded), found(rounded.astype(jnp.float32)), strict=True):
        error = jnp.linalg.norm(near.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        assert 1e-4 < error < 1e-2


def test_gradient_of_factors_matches_jax(model):
    """Compare with JAX's own rule for the same product, with and without vmap."""
    rng = np.random.default_rng(3)
    x, gradient = (jnp.asarray(rng.normal(size=(2, 5, width)), jnp.float32) for width in (7, 6))
    a, b = jnp.asarray(rng.normal(size=(4, 3, 7)), jnp.float32), jnp.asarray(rng.normal(size=(4, 6, 3)), jnp.float32)

    def ours(x, a, b):
        return jnp.vdot(gradient, update(x, StackedFactors(a, b)))

    def plain(x, a, b):
        return jnp.vdot(gradient, jnp.einsum("bti,ki,ok->bto", x, a, b, precision="highest"))

    alone = (jax.grad(loss, argnums=(0, 1, 2))(x, a[0], b[0]) for loss in (ours, plain))
    sides = (jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(None, 0, 0))(x, a, b) for loss in (ours, plain))
    for found, wanted in (tuple(alone), tuple(sides)):
        for near, exact in zip(found, wanted, strict=True):
            np.testing.assert_allclose(near, exact, rtol=1e-5, atol=1e-5)


def test_linear_in_bfloat16_has_the_derivatives_of_the_rounded_factors():
    rng = np.random.default_rng(4)
    x, weight, gradient = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 7), (6, 7), (2, 5, 6)))
    half = jnp.asarray(weight, jnp.bfloat16)
    by_x, by_weight = jax.grad(lambda x, w: jnp.vdot(gradient, linear(x, w)), argnums=(0, 1))(jnp.asarray(x), half)
    rounded = [np.asarray(jnp.asarray(one, jnp.bfloat16), np.float64) for one in (x, weight, gradient)]
    np.testing.assert_allclose(linear(jnp.asarray(x), half), rounded[0] @ rounded[1].T, **CLOSE)
    np.testing.assert_allclose(by_x, rounded[2] @ rounded[1], **CLOSE)
    assert by_weight.dtype == jnp.bfloat16
    wanted = np.einsum("bto,bti->oi", rounded[2], rounded[0])
    np.testing.assert_allclose(np.asarray(by_weight, np.float64), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "flags", "wanted"),
    [
        ("cpu", "flags : fpu avx512f amx_bf16 amx_tile", jnp.bfloat16),
        ("cpu", "flags : fpu avx512f avx512_bf16", jnp.bfloat16),
        ("cpu", "flags : fpu avx2 avx512f avx512_vnni", jnp.float32),
        ("cpu", None, jnp.float32),
        ("gpu", "flags : fpu avx2", jnp.bfloat16),
        ("tpu", None, jnp.bfloat16),
    ],
)
def test_fast_dtype_is_float32_on_a_cpu_without_bfloat16_products(monkeypatch, backend, flags, wanted):
    def read(path, **_):
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(Path, "read_text", read)
    assert fast_dtype.__wrapped__() == wanted


def test_unsupported_dtype_is_refused(model):
    with pytest.raises(UsageError, match="float16"):
        load_model(model[0], jnp.float16)


@pytest.mark.parametrize("vocab", [7, 512, 513, 3000])
def test_the_likeliest_token_is_the_first_of_the_largest(vocab):
    scores = np.random.default_rng(vocab).integers(-9, 9, (2, 5, vocab)).astype(np.float32)  # with many ties
    assert np.array_equal(likeliest(scores), scores.argmax(axis=-1))


@pytest.mark.parametrize("vocab", full_except([5, 512, 1300], [512]))
def test_draws_follow_the_softmax_distribution(vocab):
    scores = 3 * np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    scores[:2] = -np.inf
    wanted = np.asarray(jax.nn.softmax(scores / 1.5), np.float64)
    rows = jnp.broadcast_to(jnp.asarray(scores), (20_000, vocab))
    counts = np.bincount(draw(jax.random.key(0), rows, jnp.float32(1.5)), minlength=vocab)
    assert counts[:2].sum() == 0
    # Pearson's statistic has a mean of its degrees of freedom and a variance of twice that: four deviations.
    likely = wanted * 20_000 >= 5
    statistic = np.sum((counts[likely] - wanted[likely] * 20_000) ** 2 / (wanted[likely] * 20_000))
    freedom = likely.sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
    assert np.all(draw(jax.random.key(0), rows[:3], jnp.float32(0.0)) == scores.argmax())


def test_rows_of_bfloat16_are_taken_in_a_loop_without_a_copy_of_the_matrix():
    matrix = jax.random.normal(jax.random.key(0), (4096, 64), jnp.bfloat16)

    def walk(matrix, places):
        def on(_, carry):
            places, total = carry
            rows = rows_at(matrix, places).astype(jnp.float32)
            return (places * 31 + 7) % len(matrix), total + rows

        return jax.lax.fori_loop(0, 5, on, (places, jnp.zeros((3, 64))))[1]

    start = np.array([0, 5, 4095], np.int32)
    program = jax.jit(walk).lower(matrix, start).compile()
    assert program.memory_analysis().temp_size_in_bytes < matrix.nbytes / 4
    places, wanted = start, np.zeros((3, 64), np.float32)
    for _ in range(5):
        wanted, places = wanted + np.asarray(matrix, np.float32)[places], (places * 31 + 7) % len(matrix)
    np.testing.assert_allclose(program(matrix, start), wanted, **CLOSE)


def test_rows_of_a_matrix_have_its_gradient():
    matrix, places = jnp.ones((5, 2)), jnp.array([3, 0, 3])
    found = jax.grad(lambda matrix: jnp.sum(rows_at(matrix, places) * jnp.arange(6.0).reshape(3, 2)))(matrix)
    np.testing.assert_array_equal(found, [[2, 3], [0, 0], [0, 0], [4, 6], [0, 0]])
