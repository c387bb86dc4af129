"""Compare the chunked divergence with float64 on the whole vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_bases import write_llama

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import divergence, load_model, logits, target_log_probs

SHAPE = (3, 11)


@pytest.fixture(scope="module", params=[None, 6.0])
def model(request, tmp_path_factory):
    """A model with and without a soft cap of the logits."""
    base = open_base(write_llama(tmp_path_factory.mktemp("base"), vocab=500, layers=1))
    found = load_model(base)
    return dataclasses.replace(found, settings=dataclasses.replace(found.settings, final_soft_cap=request.param))


def states(seed: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).normal(size=(*SHAPE, 48))).astype(np.float32)


def exact_log_probs(model, hidden) -> np.ndarray:
    scores, cap = np.asarray(hidden, np.float64), model.settings.final_soft_cap
    scores = scores @ np.asarray(model.params.embedding, np.float64).T
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    top = scores.max(axis=-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))


def exact_kl(model, a, b) -> np.ndarray:
    log_a, log_b = exact_log_probs(model, a), exact_log_probs(model, b)
    return np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)


@pytest.mark.parametrize("chunk", [1, 7, 33, 64])
def test_divergence_matches_float64_for_any_chunk_size(model, chunk):
    a, b = states(0), states(1)
    targets = np.random.default_rng(2).integers(0, 500, SHAPE).astype(np.int32)
    found = divergence(model, a, b, targets, chunk=chunk)
    np.testing.assert_allclose(found.kl, exact_kl(model, a, b), rtol=1e-4, atol=1e-5)
    for hidden, log_probs in ((a, found.log_probs_a), (b, found.log_probs_b)):
        wanted = np.take_along_axis(exact_log_probs(model, hidden), targets[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(log_probs, wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(log_probs, target_log_probs(model, jnp.asarray(hidden), targets), atol=1e-4)


def test_equal_states_have_divergence_0(model):
    assert not np.any(divergence(model, states(0), states(0), jnp.zeros(SHAPE, jnp.int32)).kl)


def test_divergence_of_nearly_equal_states_is_exact(model):
    """The rounding error of the normalisers, 1e-6, is as large as these divergences."""
    a = states(0)
    b = a + 1e-4 * states(1)
    wanted = exact_kl(model, a, b)
    assert wanted.mean() < 3e-6
    found = divergence(model, a, b, jnp.zeros(SHAPE, jnp.int32)).kl
    np.testing.assert_allclose(found, wanted, rtol=0.05, atol=1e-8)
    assert np.all(np.asarray(found) > -1e-9)


def test_gradient_matches_the_plain_formula(model):
    a, b = jnp.asarray(states(0, 0.2)), jnp.asarray(states(1, 0.2))

    def plain(b):
        log_a, log_b = (jax.nn.log_softmax(logits(model, x)) for x in (a, b))
        return jnp.mean(jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1))

    targets = jnp.zeros(SHAPE, jnp.int32)
    found = jax.grad(lambda b: jnp.mean(divergence(model, a, b, targets, chunk=5).kl))(b)
    wanted = jax.grad(plain)(b)
    assert float(jnp.abs(wanted).max()) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
