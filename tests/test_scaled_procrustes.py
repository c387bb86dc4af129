"""Planted symmetries that scaled Procrustes has to find: signs, order and sizes of dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora import Evidence
from jcrosslora.linalg import dimension_sizes
from jcrosslora.linalg.low_rank import FLOOR
from jcrosslora.maps import Activations, Side
from jcrosslora.methods import ScaledProcrustes, Theseus

WIDTHS = 14, 9  # out and in features of the source
ROWS = 300
RANK = 3


def rng(seed):
    return np.random.default_rng(seed)


def correlated(width, seed, massive):
    """Rows whose dimensions are correlated and of many sizes, one of them a thousand times larger if `massive`."""
    rows = rng(seed).normal(size=(ROWS, width)) @ (np.eye(width) + 0.3 * rng(seed + 1).normal(size=(width, width)))
    sizes = np.geomspace(0.2, 10, width)[rng(seed + 2).permutation(width)]
    sizes[1] = 5000 if massive else sizes[1]
    return rows * sizes


def symmetry(width, wider, seed):
    """(width + wider, width): a signed permutation with sizes; the rows that are left over are zero."""
    places = rng(seed).permutation(width + wider)[:width]
    whole = np.zeros((width + wider, width))
    whole[places, np.arange(width)] = rng(seed + 1).choice([-1, 1], width) * np.geomspace(0.1, 20, width)
    return whole


def planted(wider, seed, massive=False):
    """Evidence of a source and its image, and the two true maps."""
    y, x = (correlated(width, 10 * seed + place, massive) for place, width in enumerate(WIDTHS))
    out, into = (symmetry(width, wider, 10 * seed + 5 + place) for place, width in enumerate(WIDTHS))
    pairs = (x, x @ into.T), (y, y @ out.T)
    as_float = [[jnp.asarray(rows, jnp.float32) for rows in pair] for pair in pairs]
    squares = [tuple(jnp.sum(rows**2, axis=0) for rows in pair) for pair in as_float]
    crossed = [jnp.asarray(one.T @ two, jnp.float32) for one, two in pairs]
    sides = [Side(jnp.zeros(shape), jnp.ones(shape[1]), None) for shape in (WIDTHS, (out.shape[0], into.shape[0]))]
    seen = Activations(*crossed, *squares)
    return Evidence(*sides, None, seen, jax.random.key(0), reads=True, rank=5), out, into, x, y


def effect(maps, b, a, x):
    """What the moved update b a does to rows x of the target."""
    ((p_out, p_in),) = maps.terms
    moved_b, moved_a = (np.asarray(part, np.float64) for part in (p_out(jnp.asarray(b)), p_in(jnp.asarray(a.T)).T))
    return x @ moved_a.T @ moved_b.T


def errors(method, wider, seed, massive):
    """Relative error of the moved update's effect in each output dimension that is not dead."""
    evidence, out, into, x, y = planted(wider, seed, massive)
    b, a = (rng(seed + k).normal(size=shape).astype(np.float32) for k, shape in ((7, (14, RANK)), (8, (RANK, 9))))
    # An update that reads and writes every dimension as much as it is large: all of them take part.
    b, a = b * np.linalg.norm(y, axis=0)[:, None].astype(np.float32), a / np.linalg.norm(x, axis=0).astype(np.float32)
    found = jax.jit(method.maps)(evidence)
    wanted, got = x @ a.T @ b.T @ out.T, effect(found, b, a, x @ into.T)
    sizes = np.linalg.norm(wanted, axis=0)
    alive = sizes > 0
    assert not np.abs(got[:, ~alive]).max(initial=0) > 1e-4 * sizes.max()
    return np.linalg.norm(got - wanted, axis=0)[alive] / sizes[alive], found


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("wider", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_moved_update_acts_alike(seed, wider, massive):
    found, maps = errors(ScaledProcrustes(), wider, seed, massive)
    assert found.max() < 1e-3
    assert float(maps.activation_cosine) == pytest.approx(1, abs=1e-3)


def test_orthogonal_maps_alone_cannot_do_it():
    found, _ = errors(Theseus(), 0, 0, True)
    assert np.median(found) > 0.3


def test_nothing_seen_is_finite():
    evidence, *_ = planted(0, 0)
    empty = jax.tree.map(jnp.zeros_like, evidence)
    maps = jax.jit(ScaledProcrustes().maps)(empty.replace(key=evidence.key))
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(maps.terms))
    assert float(maps.activation_cosine) == 0


def test_dimensions_that_are_nearly_dead_have_the_size_of_the_floor():
    squares = jnp.asarray([0.0, 1e-12, 4.0, 9.0, 1e8, 4.0, 4.0])
    np.testing.assert_allclose(dimension_sizes(squares), [2 * FLOOR, 2 * FLOOR, 2, 3, 1e4, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(dimension_sizes(jnp.asarray([0.0, 0, 0, 6**2])), [0.015, 0.015, 0.015, 6], rtol=1e-6)
    np.testing.assert_allclose(dimension_sizes(jnp.zeros(3)), 1)
