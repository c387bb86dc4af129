"""LoRA-RITE: the product takes the same way from every pair of factors, also from B = 0 and near a lost rank."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from full_set import full_except
from probe_bases import QUESTIONS, write_base
from test_training_run import same, stop_behind

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import StackedAdapter, StackedFactors
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import score
from jcrosslora.training import TrainingSettings, train_lora
from jcrosslora.training.batches import first_state
from jcrosslora.training.lora_rite import lora_rite
from jcrosslora.training.run import train

SIDES = {"q_proj": (20, 30), "down_proj": (24, 9)}  # O, I
LAYERS = 2
rite = cache(lora_rite)  # one of each kind, of which a step is compiled once
SETTINGS = TrainingSettings(steps=6, batch=3, rate=2e-2, rank=3, alpha=6.0, dtype="float32", seed=1)


def factors(rank=4, *, seed=0, zero=False) -> StackedAdapter:
    rng = np.random.default_rng(seed)
    roles = {}
    for role, (rows, columns) in SIDES.items():
        a, b = rng.normal(size=(LAYERS, rank, columns)) / columns**0.5, 0.1 * rng.normal(size=(LAYERS, rows, rank))
        roles[role] = StackedFactors(jnp.asarray(a, jnp.float32), jnp.asarray(b * (not zero), jnp.float32))
    return StackedAdapter(roles)


def products(adapter: StackedAdapter) -> dict[str, np.ndarray]:
    return {role: np.asarray(one.b, np.float64) @ np.asarray(one.a, np.float64) for role, one in adapter.roles.items()}


def targets(rank: int, seed: int = 7) -> dict[str, jax.Array]:
    """Matrices of this rank."""
    return {role: jnp.asarray(one, jnp.float32) for role, one in products(factors(rank, seed=seed)).items()}


def loss(wanted, adapter) -> jax.Array:
    found = {role: jnp.matmul(one.b, one.a, precision="highest") for role, one in adapter.roles.items()}
    return sum(jnp.sum((found[role] - wanted[role]) ** 2) for role in found) / 2


def steps(optimizer, adapter, wanted, count: int) -> list[StackedAdapter]:
    """The adapter before the first step and after each one."""
    found, state = [adapter], optimizer.init(adapter)
    for _ in range(count):
        adapter, state = step(optimizer, wanted, adapter, state)
        found.append(adapter)
    return found


@partial(jax.jit, static_argnums=0)
def step(optimizer, wanted, adapter, state):
    gradient = jax.grad(partial(loss, wanted))(adapter)
    with jax.numpy_dtype_promotion("standard"):
        changes, state = optimizer.update(gradient, state, adapter)
    return optax.apply_updates(adapter, changes), state


def between(one: StackedAdapter, other: StackedAdapter) -> float:
    """The Frobenius norm of the difference of the products."""
    first, second = products(one), products(other)
    return float(np.sqrt(sum(np.sum((first[role] - second[role]) ** 2) for role in first)))


def other_factors(adapter: StackedAdapter, seed=3) -> StackedAdapter:
    """B R and R^-1 A with singular values of R from 0.2 to 5, another R for each module."""
    rng, roles = np.random.default_rng(seed), {}
    for role, one in adapter.roles.items():
        rank = one.a.shape[1]
        left, right = (np.linalg.qr(rng.normal(size=(LAYERS, rank, rank)))[0] for _ in range(2))
        turn = left * np.geomspace(0.2, 5, rank) @ right
        a, b = np.linalg.inv(turn) @ np.asarray(one.a, np.float64), np.asarray(one.b, np.float64) @ turn
        roles[role] = StackedFactors(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    return StackedAdapter(roles)


def way_apart(optimizer, start: StackedAdapter) -> float:
    """The largest distance of the products of two pairs of factors after a step, as a share of the way made so far."""
    ways = [steps(optimizer, one, targets(6), 12) for one in (start, other_factors(start))]
    return max(between(one, other) / between(one, start) for one, other in list(zip(*ways, strict=True))[1:])


@pytest.mark.parametrize("rank", full_except([1, 4], [4]))
@pytest.mark.parametrize("seed", full_except([0, 1], [0]))
def test_the_product_takes_the_same_way_from_other_factors(rank, seed):
    assert way_apart(rite(1e-2, weight_decay=0.1), factors(rank, seed=seed)) < 1e-4


def test_from_b_of_zero_too_the_way_is_the_same():
    assert way_apart(rite(1e-2), factors(zero=True)) < 1e-4


def test_with_adamw_the_way_depends_on_the_factors():
    assert way_apart(optax.adamw(1e-2), factors()) > 0.5


def reference(start: StackedAdapter, wanted, count: int, rate: float) -> list[dict[str, np.ndarray]]:
    """Algorithm 1 of the paper in float64 by QR, matrix by matrix, A after B; the products after each step.

    Gradients are clipped together, so all matrices take a step before the next one begins.
    """
    b1, b2, eps, clip = 0.9, 0.999, 1e-6, 1.0
    pairs = {
        (role, layer): [np.asarray(one.b[layer], np.float64), np.asarray(one.a[layer], np.float64).T]
        for role, one in start.roles.items()
        for layer in range(LAYERS)
    }
    moments: dict = {}
    found = []
    for t in range(1, count + 1):
        d1, d2 = (one * (1 - one ** (t - 1)) / (1 - one**t) for one in (b1, b2))
        unmagnified = {}
        for (role, layer), (b, at) in pairs.items():
            slope = b @ at.T - np.asarray(wanted[role][layer], np.float64)
            for side, (other, gradient) in enumerate(((at, slope @ at), (b, slope.T @ b))):
                u, r = np.linalg.qr(other)
                unmagnified[role, layer, side] = u, r, gradient @ np.linalg.inv(r)
        norm = np.sqrt(sum(np.sum(g**2) for _, _, g in unmagnified.values()))
        for key, (u, _, g) in unmagnified.items():
            g = g * min(1, clip / norm)
            rows, rank = g.shape
            m, v, rho, before = moments.get(key, (np.zeros((rows, rank)), np.zeros((rank, rank)), 0.0, u))
            p = u.T @ before
            turned = p @ v @ p.T
            rho = d2 * (rho + max(0, np.max(np.linalg.eigvalsh(v) - np.linalg.eigvalsh(turned))))
            v = d2 * turned + (1 - d2) * g.T @ g / rows
            values, vectors = np.linalg.eigh(v)
            s = g @ vectors / (np.sqrt(values + rho) + eps) @ vectors.T
            moments[key] = d1 * m @ p.T + (1 - d1) * s, v, rho, u
        for (role, layer), pair in pairs.items():
            m, *_ = moments[role, layer, 0]
            pair[0] = pair[0] - rate * m @ np.linalg.inv(unmagnified[role, layer, 0][1]).T
            (m, _, _, before), (u, r) = moments[role, layer, 1], np.linalg.qr(pair[0])
            pair[1] = pair[1] - rate * m @ (u.T @ before).T @ np.linalg.inv(r).T
        found.append(
            {role: np.stack([pairs[role, one][0] @ pairs[role, one][1].T for one in range(LAYERS)]) for role in SIDES}
        )
    return found


def test_steps_are_those_of_the_algorithm_in_float64():
    start, wanted, rate = factors(), targets(6), 3e-3
    ours = [products(one) for one in steps(rite(rate), start, wanted, 6)]
    for before, after, expected in zip(ours[:1] * 6, ours[1:], reference(start, wanted, 6, rate), strict=True):
        for role in SIDES:
            way = np.linalg.norm(expected[role] - before[role])
            assert np.linalg.norm(after[role] - expected[role]) < 1e-3 * way


@pytest.mark.parametrize("rank", full_except([1, 4, 12], [4]))  # 12 is more than one of the sides
def test_the_loss_falls_to_that_of_the_best_product(rank):
    wanted = targets(3)
    found = steps(lora_rite(optax.cosine_decay_schedule(3e-2, 150)), factors(rank, zero=True), wanted, 150)[-1]
    best = sum(np.sum(np.linalg.svd(one, compute_uv=False)[:, rank:] ** 2) for one in wanted.values()) / 2
    start = float(loss(wanted, factors(rank, zero=True)))
    assert best - 1e-5 * start < float(loss(wanted, found)) < best + 1e-3 * start


def test_from_b_of_zero_the_first_step_moves_b_alone():
    start = factors(zero=True)
    _, first, second = steps(rite(1e-2), start, targets(6), 2)
    for role, one in start.roles.items():
        assert (np.abs(np.asarray(first.roles[role].b)).max(axis=(1, 2)) > 1e-3).all()
        np.testing.assert_array_equal(first.roles[role].a, one.a)
        assert np.abs(np.asarray(second.roles[role].a - one.a)).max() > 1e-3


def test_a_gradient_of_zero_moves_nothing():
    start = factors()
    optimizer = rite(1e-2)
    state, update = optimizer.init(start), jax.jit(optimizer.update)
    for _ in range(2):
        changes, state = update(jax.tree.map(jnp.zeros_like, start), state, start)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(changes))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_ranks_and_layers_padded_with_zeros_stay_zero():
    def padded(one: StackedFactors) -> StackedFactors:
        return StackedFactors(one.a.at[0, 2:].set(0).at[1].set(0), one.b.at[0, :, 2:].set(0).at[1].set(0))

    start = StackedAdapter({role: padded(one) for role, one in factors().roles.items()})
    found = steps(rite(1e-2), start, targets(6), 5)[-1]
    for role, one in found.roles.items():
        assert np.isfinite(one.a).all()
        assert np.isfinite(one.b).all()
        assert not np.asarray(one.a)[0, 2:].any()
        assert not np.asarray(one.b)[0, :, 2:].any()
        assert not np.asarray(one.a)[1].any()
        assert np.abs(np.asarray(one.a - start.roles[role].a)[0, :2]).max() > 1e-3


@pytest.mark.parametrize("small", [1e-2, 1e-4, 1e-7])
def test_the_step_of_a_product_that_nearly_loses_a_rank_is_bounded(small):
    shrunk = {role: StackedFactors(one.a, one.b.at[..., -1].multiply(small)) for role, one in factors().roles.items()}
    start, rate = StackedAdapter(shrunk), 1e-2
    first = products(steps(rite(rate), start, targets(6), 1)[1])
    for role, before in products(start).items():
        bound = rate * sum((side * 4) ** 0.5 for side in SIDES[role])  # of rate (|M_B| + |M_A|), each |M|^2 = M K
        assert 0 < np.linalg.norm(first[role] - before, axis=(1, 2)).max() < 1.001 * bound


@pytest.mark.slow
def test_the_gradient_is_clipped_over_all_modules_and_scales_cancel():
    """A larger loss gives the same way as long as its gradient is clipped at every step."""
    start, wanted = factors(), targets(6)

    def way(scale: float, clip: float) -> StackedAdapter:
        optimizer = lora_rite(1e-2, clip=clip)
        state, adapter = optimizer.init(start), start
        for size in (1.0, 30.0):  # the second gradient would outweigh the first one
            gradient = jax.grad(lambda adapter, size: jnp.float32(scale * size) * loss(wanted, adapter))(adapter, size)
            changes, state = optimizer.update(gradient, state, adapter)
            adapter = optax.apply_updates(adapter, changes)
        return adapter

    assert between(way(1.0, 0.1), way(100.0, 0.1)) < 1e-4 * between(way(1.0, 0.1), start)
    assert between(way(1.0, 0.1), way(1.0, 1e9)) > 1e-2 * between(way(1.0, 0.1), start)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_base(write_base(tmp_path_factory.mktemp("base"), 60, bos=True, layers=2))


@pytest.mark.full
def test_training_by_it_lowers_the_loss_and_continues_to_the_same_numbers(base, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, optimizer="lora-rite")
    undisturbed = train_lora(base, QUESTIONS, settings)
    found = score(base, QUESTIONS, [undisturbed])
    right = np.arange(len(QUESTIONS)), found.answers
    by_token = -found.log_probs[:, *right].sum(axis=1) / found.tokens[right].sum()
    assert by_token[1] < 0.9 * by_token[0]
    with monkeypatch.context() as patch:
        stop_behind(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_lora(base, QUESTIONS, settings, checkpoints=tmp_path, every=2)
    made = stop_behind(monkeypatch, 99)
    assert same(train_lora(base, QUESTIONS, settings, checkpoints=tmp_path, every=2), undisturbed)
    assert made == [4, 5]
    with pytest.raises(UsageError, match="optimizer was 'lora-rite' there and is 'adamw' here"):
        train_lora(base, QUESTIONS, SETTINGS, checkpoints=tmp_path)


def test_other_arrays_than_factors_are_refused(base):
    settings, arrays = dataclasses.replace(SETTINGS, optimizer="lora-rite"), {"bias": jnp.zeros(3)}
    with pytest.raises(UsageError, match="lora-rite: expected the factors of a LoRA, got dict; use adamw"):
        first_state(arrays, settings)
    with pytest.raises(UsageError, match="use adamw"):
        train(base, QUESTIONS, settings, arrays, lambda arrays, batch: (jnp.zeros(()), arrays))
