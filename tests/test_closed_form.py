"""The closed-form steps of a fit: their parts against brute force, and a whole fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_bases import CORPUS, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.decoder import forward, load_params, logits, settings_of, stack_adapter
from jcrosslora.decoder.forward import head_of
from jcrosslora.errors import UsageError
from jcrosslora.fit.distill.run import distill
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.statistics import Statistics, add_batch, zero_statistics
from jcrosslora.fit.distill.step import DAMPING, FLOOR_IN, FLOOR_OUT, solve, step_factors
from jcrosslora.fit.distill.teacher import TaughtBatch, weighted_kl


def damped(moment, floor):
    """The damped moment itself, float64."""
    sizes = np.diagonal(moment)
    scale = np.sqrt(sizes + floor * np.median(sizes))
    standard = moment / scale[:, None] / scale
    return (standard + DAMPING * np.trace(standard) / len(standard) * np.eye(len(standard))) * scale[:, None] * scale


def problem(seed, rows=6, columns=9):
    rng = np.random.default_rng(seed)
    x, s = rng.normal(size=(40, columns)) * rng.uniform(0.1, 30, columns), rng.normal(size=(40, rows))
    return rng.normal(size=(rows, columns)), x.T @ x, s.T @ s


def quadratic(update, gradient, a, g):
    """The model of the loss."""
    return np.sum(gradient * update) + np.sum((damped(g, FLOOR_OUT) @ update @ damped(a, FLOOR_IN)) * update) / 2


def step(gradient, a, g, rank):
    b, a_factor, _ = step_factors(*(jnp.asarray(x, jnp.float32) for x in (gradient, a, g)), rank)
    return np.asarray(b, np.float64) @ np.asarray(a_factor, np.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_step_of_full_rank_solves_the_damped_equations(seed):
    gradient, a, g = problem(seed)
    exact = -np.linalg.solve(damped(g, FLOOR_OUT), gradient) @ np.linalg.inv(damped(a, FLOOR_IN))
    np.testing.assert_allclose(step(gradient, a, g, 6), exact, atol=2e-4 * np.abs(exact).max())


def test_no_other_update_of_the_rank_has_a_lower_quadratic_model():
    gradient, a, g = problem(1)
    best = quadratic(step(gradient, a, g, 2), gradient, a, g)
    full = step(gradient, a, g, 6)
    u, s, vt = np.linalg.svd(full)
    assert best < quadratic((u[:, :2] * s[:2]) @ vt[:2], gradient, a, g) - 1e-6
    rng = np.random.default_rng(0)
    b, a_factor = np.linalg.qr(rng.normal(size=(6, 2)))[0], rng.normal(size=(2, 9))
    for _ in range(200):  # alternating exact minimisation: b, then a
        middle = a_factor @ damped(a, FLOOR_IN) @ a_factor.T
        b = -np.linalg.solve(damped(g, FLOOR_OUT), gradient @ a_factor.T) @ np.linalg.inv(middle)
        inner = b.T @ damped(g, FLOOR_OUT) @ b
        a_factor = -np.linalg.inv(inner) @ b.T @ gradient @ np.linalg.inv(damped(a, FLOOR_IN))
    assert best <= quadratic(b @ a_factor, gradient, a, g) + 1e-4 * abs(best)


def test_a_massive_dimension_leaves_the_steps_of_others_alone():
    gradient, a, g = problem(3)
    scale = np.ones(9)
    scale[0] = 1e3
    massive = step(gradient * scale, a * scale[:, None] * scale, g, 6) * scale
    plain = step(gradient, a, g, 6)
    np.testing.assert_allclose(massive[:, 1:], plain[:, 1:], atol=0.05 * np.abs(plain).max())


def test_statistics_are_the_gradient_and_the_square_moments(tmp_path):
    # In the last layer what q and o do at the first position, which is left out, changes nothing behind it.
    base = jcl.open_base(write_base(tmp_path / "base", 30, layers=1))
    params, model = load_params(base), settings_of(base)
    adapter = stack_adapter(random_adapter(base, scale=0.3), base)
    rng = np.random.default_rng(0)
    tokens, mask = jnp.asarray(rng.integers(0, 90, (2, 7)), jnp.int32), jnp.ones((2, 7), bool).at[1, 5:].set(False)
    at, weight = jnp.asarray([2, 3, 6, 9, 11, 0]), jnp.asarray([1.0, 0.5, 1, 2, 1, 0])
    vocab = params.embedding.shape[0]
    teacher = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(6, vocab)), jnp.float32))
    read = TaughtBatch(tokens, mask, at, weight, teacher)

    def loss(weights):
        changed = dataclasses.replace(params, weights={**params.weights, **weights})
        hidden = forward(model, changed, tokens, mask=mask, adapter=adapter).hidden
        scores = logits(model, params, hidden.reshape(14, -1)[at])
        return weighted_kl(teacher, jax.nn.log_softmax(scores), weight)[0]

    roles = ("q_proj", "o_proj")
    found = add_batch(model, zero_statistics(params, roles), params, adapter, read, jax.random.key(0))
    exact, gradients = jax.value_and_grad(loss)({role: params.weights[role] for role in roles})
    np.testing.assert_allclose(found.loss, exact, rtol=1e-5)
    for role in roles:
        np.testing.assert_allclose(
            found.gradients[role], gradients[role], atol=1e-5 * float(jnp.abs(gradients[role]).max())
        )
        assert np.linalg.eigvalsh(np.asarray(found.outputs[role][0], np.float64)).min() > -1e-5
    seen = forward(model, params, tokens, mask=mask, adapter=adapter, capture=frozenset({"inputs"})).captured["inputs"]
    for site in ("attn_in", "attn_out_in"):
        rows = np.asarray(seen[site][0])[np.asarray(mask)]
        np.testing.assert_allclose(found.inputs[site][0], rows.T @ rows, rtol=1e-3, atol=1e-4)


def test_a_step_uses_the_mean_over_sets_of_batches():
    gradients, a, g = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(problem(0), problem(1), strict=True))
    one = Statistics({"attn_out_in": a}, {"o_proj": g}, {"o_proj": gradients}, jnp.float32(2))
    steps, behind = solve(jax.tree.map(lambda x: 2 * x, one), 3, 2)
    for layer in range(2):
        wanted = step(gradients[layer], a[layer], g[layer], 3)
        found = steps["o_proj"].b[layer] @ steps["o_proj"].a[layer]
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        _, _, rest = step_factors(gradients[layer], a[layer], g[layer], 3)
        np.testing.assert_allclose(behind.gradients["o_proj"][layer], 2 * rest, atol=1e-4 * np.abs(gradients).max())
    np.testing.assert_array_equal(behind.inputs["attn_out_in"], 2 * a)
    np.testing.assert_array_equal(behind.outputs["o_proj"], 2 * g)


@given(st.integers(0, 100), st.integers(1, 6))
@settings(deadline=None, max_examples=15)
def test_the_remaining_gradient_is_that_of_the_quadratic_model_behind_the_step(seed, rank):
    gradient, a, g = problem(seed)
    b, factor, rest = map(np.asarray, step_factors(*(jnp.asarray(x, jnp.float32) for x in (gradient, a, g)), rank))
    wanted = gradient + damped(g, FLOOR_OUT) @ (b @ factor) @ damped(a, FLOOR_IN)
    # Sizes of dimensions differ by 30 and more: each entry is judged by those of its own.
    sizes = np.sqrt(np.outer(np.diagonal(g), np.diagonal(a)))
    assert np.abs((rest - wanted) / sizes).max() < 1e-4 * np.abs(gradient / sizes).max()
    assert abs(np.vdot(rest, b @ factor)) < 1e-4 * abs(np.vdot(gradient, b @ factor))  # nothing is left along the step


def test_the_drawn_gradients_have_the_fisher_matrix_as_their_mean(tmp_path):
    base = jcl.open_base(write_base(tmp_path / "base", 0, layers=1))
    params, model = load_params(base), settings_of(base)
    # Flat predictions: of peaked ones nearly all of the matrix comes from tokens that are hardly ever drawn.
    params = dataclasses.replace(params, head=head_of(params) * 0.05)
    none = jax.tree.map(jnp.zeros_like, stack_adapter(random_adapter(base), base))
    tokens = jnp.asarray([[5, 9, 70]], jnp.int32)
    at, weight = jnp.asarray([2]), jnp.asarray([1.0])
    teacher = jax.nn.log_softmax(jnp.zeros((1, params.embedding.shape[0])))
    read = TaughtBatch(tokens, jnp.ones((1, 3), bool), at, weight, teacher)
    total = zero_statistics(params, ("o_proj",))
    draws = 3000
    for number in range(draws):
        total = add_batch(model, total, params, none, read, jax.random.key(number))
    # o_proj's output at the last position alone reaches the prediction: the exact matrix is J'(diag p - p p')J.

    def scores(perturbation):
        biased = dataclasses.replace(params, biases={"o_proj": perturbation[None, None, None]})
        return logits(model, params, forward(model, biased, tokens).hidden[0, 2])

    zero = jnp.zeros(params.weights["o_proj"].shape[1])
    # A perturbation at all positions of the last layer acts at the last position alone.
    jacobian, p = np.asarray(jax.jacobian(scores)(zero)), np.asarray(jax.nn.softmax(scores(zero)))
    exact = jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    error = np.linalg.norm(total.outputs["o_proj"][0] / draws - exact) / np.linalg.norm(exact)
    assert error < 0.15


def test_closed_form_steps_bring_predictions_towards_the_teacher(tmp_path):
    source = jcl.open_base(write_base(tmp_path / "source", 30, bos=True, layers=2))
    target = jcl.open_base(write_base(tmp_path / "target", 90, layers=2, hidden=32, head_dim=8, seed=1))
    asked = DistillSettings(fit="closed-form", step_rank=4, completions=48, answer_tokens=6, compared_tokens=400)
    found = distill(source, target, random_adapter(source, scale=0.3), prompts=CORPUS, settings=asked)
    divergences = [look.divergence for look in found.looks]
    assert len(divergences) == 1 + 3
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.97 * divergences[0]
    assert {name.rpartition(".")[2] for name in found.adapter.modules} == {"v_proj", "o_proj"}
    assert {factors.rank for factors in found.adapter.modules.values()} <= set(range(1, 13))


def test_the_kind_of_fit_follows_prompts_and_lengths():
    def kinds(**asked):
        return [DistillSettings(**asked).in_closed_form(given=given) for given in (False, True)]

    assert kinds() == [True, False]
    assert kinds(completions=301) == kinds(budget="5min") == kinds(fit="gradient") == [False, False]
    assert kinds(fit="closed-form") == [True, True]
    with pytest.raises(UsageError, match=r"closed-form only for 300 completions or fewer"):
        DistillSettings(fit="closed-form", budget="5min").check()


def test_a_closed_form_step_for_each_hundred_completions_but_at_least_three():
    assert [DistillSettings(completions=count).step_count for count in (16, 300)] == [3, 3]
    assert DistillSettings(completions=300, steps=2).step_count == 2
