"""What float32 sums of products can tell where a few dimensions are a thousand times larger, against float64 sums.

Sizes are those of SmolLM2-135M and Gemma-3-270M and of 288 probe texts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora.linalg import procrustes
from jcrosslora.maps.activations import add_rows, zero_moments

BATCHES, POSITIONS, SRC, TGT = 72, 384, 576, 640
MASSIVE, SIZE = [7, 100, 333], 1000
LATENT = 64  # dimensions that both sides share; the rest is noise of their own
SMALL = np.ix_(np.delete(np.arange(SRC), MASSIVE), np.delete(np.arange(TGT), MASSIVE))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(BATCHES * POSITIONS, LATENT)).astype(np.float32)

    def side(width: int) -> np.ndarray:
        x = latent @ rng.normal(size=(LATENT, width)).astype(np.float32) / 8
        x += rng.normal(size=x.shape).astype(np.float32)
        x[:, MASSIVE] = SIZE * (x[:, MASSIVE] + 1)  # as in real models: large, and always of the same sign
        return x

    return side(SRC), side(TGT)


@pytest.fixture(scope="module")
def exact(rows):
    x, y = (side.astype(np.float64) for side in rows)
    return x.T @ y


def summed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The moments of all rows as the probes bring them, batch by batch."""
    totals, layer = None, jnp.zeros(1, jnp.int32)
    for start in range(0, len(x), POSITIONS):
        src, tgt = (({}, {"o_proj": jnp.asarray(side[None, start : start + POSITIONS])}) for side in (x, y))
        totals = add_rows(zero_moments(src, tgt) if totals is None else totals, src, tgt, layer)
    assert totals is not None
    return np.asarray(totals.outputs["o_proj"][0], np.float64)


def sizes(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=0))


def of_size(error: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(error[SMALL]) / np.linalg.norm(wanted[SMALL]))


@pytest.mark.full
def test_each_entry_is_exact_to_rounding_beside_any_other_dimensions(rows, exact):
    error = summed(*rows) - exact
    relative = np.abs(error) / np.outer(sizes(rows[0]), sizes(rows[1]))
    assert relative.max() < 5e-7  # measured: 8e-8
    # The entries of the small dimensions among each other, and the 64 directions that carry what both sides share.
    assert of_size(error, exact) < 1e-6  # measured: 1.3e-7
    shared = np.linalg.svd(exact[SMALL], compute_uv=False)[LATENT - 1]
    assert np.linalg.norm(error[SMALL], 2) < 1e-6 * shared  # measured: 1.5e-7


def test_dividing_dimensions_before_the_products_gains_nothing(rows, exact):
    divisors = [np.sqrt(np.mean(side[: 2 * POSITIONS] ** 2, axis=0)) for side in rows]
    scaled = summed(rows[0] / divisors[0], rows[1] / divisors[1]) * np.outer(*divisors)
    plain = of_size(summed(*rows) - exact, exact)
    assert plain < 2 * of_size(scaled - exact, exact)
    # The check of this check: what is said to be small here is far from the errors of half the digits.
    halved = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    assert of_size(halved - exact, exact) > 1000 * plain


def test_decomposition_needs_divided_sums(exact, rows):
    divided = exact / np.outer(sizes(rows[0]), sizes(rows[1]))
    (kept, error), (kept_divided, error_divided) = (decomposed(moments) for moments in (exact, divided))
    assert kept < 2 * len(MASSIVE)  # measured: 4; the rest is below the rounding of the SVD
    assert error > 1e-3  # measured: 0.03
    assert kept_divided == SRC
    assert error_divided < 1e-5  # measured: 1e-6


def decomposed(moments: np.ndarray) -> tuple[int, float]:
    """Directions that Procrustes keeps, and the largest relative error of a singular value."""
    cross = jnp.asarray(moments, jnp.float32)
    found = np.asarray(jnp.linalg.svd(cross, compute_uv=False))
    wanted = np.linalg.svd(moments, compute_uv=False)
    kept = np.linalg.matrix_rank(np.asarray(jax.jit(lambda cross: procrustes(cross)[0].left)(cross)))
    return int(kept), float(np.max(np.abs(found / wanted - 1)))


@pytest.mark.full
def test_large_spread_direction_hides_small_ones(rows):
    turned, turns = [], []
    rng = np.random.default_rng(1)
    for side in rows:
        turn = np.linalg.qr(rng.normal(size=(side.shape[1], side.shape[1])))[0]
        turns.append(turn)
        turned.append(side @ turn.astype(np.float32))
    wanted = turned[0].astype(np.float64).T @ turned[1].astype(np.float64)
    error, wanted = (turns[0] @ moments @ turns[1].T for moments in (summed(*turned) - wanted, wanted))
    lost = of_size(error, wanted)
    # Once SIZE for each of the two sides: what is lost grows with its square.
    assert 1e-3 < lost < 2e-2  # measured: 5e-3
