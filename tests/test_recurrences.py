"""The recurrences and convolutions of hybrid models against transformers' own functions in torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import torch

from jcrosslora.architectures.blocks.recurrent import Tokens, causal_convolution, decaying_recurrence

delta = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
mamba = pytest.importorskip("transformers.models.granitemoehybrid.modeling_granitemoehybrid")

CLOSE = {"atol": 2e-6, "rtol": 1e-5}
T, N, P, CHUNK = 23, 6, 5, 8  # tokens, which no chunk divides; features of a key and of a value


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def head():
    """Queries, keys, values, decays, a state and betas of one head; the keys have length 1."""
    keys = numbers(1, T, N)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return (
        *(numbers(0, T, N), keys, numbers(2, T, P)),
        *(-np.abs(numbers(3, T)), numbers(4, N, P), 1 / (1 + np.exp(-numbers(5, T)))),
    )


@partial(jax.jit, static_argnames="chunk")
def run(queries, keys, values, decay, state, beta, chunk=CHUNK):
    return decaying_recurrence(Tokens(queries, keys, values, decay, beta), state, chunk)


def rows(*arrays):
    """Arrays of one head in torch, with axes for the batch and the head."""
    return [torch.from_numpy(x)[None, :, None] for x in arrays]


def test_the_delta_rule_is_that_of_qwen(head):
    queries, keys, values, decay, state, beta = head
    wanted, last = delta.torch_recurrent_gated_delta_rule(
        *rows(queries, keys, values),
        g=rows(decay)[0],
        beta=rows(beta)[0],
        initial_state=torch.from_numpy(state)[None, None],
        output_final_state=True,
    )
    out, found = run(queries * np.float32(N**-0.5), keys, values, decay, state, beta)
    np.testing.assert_allclose(out, wanted[0, :, 0], **CLOSE)
    np.testing.assert_allclose(found, last[0, 0], **CLOSE)


def test_without_beta_it_is_the_state_space_model_of_mamba(head):
    queries, keys, values, _, state, _ = head
    x, step = values, np.abs(numbers(6, T))
    wanted, last = mamba.mamba2_chunk_scan(
        *rows(x, step),
        A=torch.tensor([-0.5]),
        B=rows(keys)[0],
        C=rows(queries)[0],
        chunk_size=7,
        initial_states=torch.from_numpy(state.T.copy())[None, None],
        return_final_states=True,
    )
    out, found = run(queries, keys, x * step[:, None], -0.5 * step, state, None)
    np.testing.assert_allclose(out, wanted[0, :, 0], **CLOSE)
    np.testing.assert_allclose(found, last[0, 0].T, **CLOSE)


@pytest.mark.parametrize("ruled", [True, False])
def test_pieces_of_a_text_continue_from_the_state(head, ruled):
    *parts, state, beta = head
    beta = beta if ruled else None
    whole, last = run(*parts, state, beta)
    for piece in (slice(0, 1), slice(1, 12), slice(12, T)):
        cut = [x[piece] for x in parts]
        out, state = run(*cut, state, None if beta is None else beta[piece])
        np.testing.assert_allclose(out, whole[piece], **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_decays_that_underflow_have_finite_gradients(head):
    queries, keys, values, decay, state, beta = head

    @jax.jit
    @jax.grad
    def gradient(arrays):
        out, last = decaying_recurrence(Tokens(arrays[0], arrays[1], values, arrays[2], beta), state, CHUNK)
        return jnp.sum(out * out) + jnp.sum(last)

    found = gradient((queries, keys, decay * 200))
    assert all(np.isfinite(x).all() for x in found)
    assert np.abs(found[0]).max() > 0.1


def test_the_gradient_is_that_of_torch(head):
    queries, keys, values, decay, state, beta = (torch.from_numpy(x) for x in head)
    for x in (queries, keys, decay):
        x.requires_grad_()
    out, _ = delta.torch_recurrent_gated_delta_rule(
        *(x[None, :, None] for x in (queries, keys, values)),
        g=decay[None, :, None],
        beta=beta[None, :, None],
        initial_state=state[None, None],
    )
    (out**2).sum().backward()

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradient(queries, keys, decay):
        scaled = queries * np.float32(N**-0.5)
        tokens = Tokens(scaled, keys, head[2], decay, head[5])
        return jnp.sum(decaying_recurrence(tokens, head[4], CHUNK)[0] ** 2)

    for found, wanted in zip(gradient(head[0], head[1], head[3]), (queries, keys, decay), strict=True):
        np.testing.assert_allclose(found, wanted.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_that_of_torch(bias):
    x, weight, state = numbers(0, T, P), numbers(1, P, 4), np.zeros((3, P), np.float32)
    bias = numbers(2, P) if bias else None
    given = None if bias is None else torch.from_numpy(bias)
    wanted = delta.causal_conv1d_fn(torch.from_numpy(x).T[None], torch.from_numpy(weight), given)[0].T
    out, last = jax.jit(causal_convolution)(x, weight, bias, state, np.ones(T, bool))
    np.testing.assert_allclose(out, wanted, **CLOSE)
    np.testing.assert_array_equal(last, x[-3:])


@pytest.mark.parametrize("piece", [1, 2, 5])
def test_a_convolution_of_pieces_skips_padding_on_either_side(piece):
    x, weight, state = numbers(0, T, P), numbers(1, P, 4), np.zeros((3, P), np.float32)
    convolve = jax.jit(partial(causal_convolution, bias=None))
    whole, _ = convolve(x, weight, state=state, valid=np.ones(T, bool))
    for start in range(0, T, piece):
        part = x[start : start + piece]
        left, right = start % 3, (start // 2) % 3
        padded = np.concatenate([np.full((left, P), 7, np.float32), part, np.full((right, P), 9, np.float32)])
        valid = np.zeros(len(padded), bool)
        valid[left : left + len(part)] = True
        out, state = convolve(padded, weight, state=state, valid=valid)
        np.testing.assert_allclose(out[left : left + len(part)], whole[start : start + piece], **CLOSE)
    np.testing.assert_array_equal(state, x[-3:])


def test_padding_alone_leaves_the_state_of_a_convolution():
    state = numbers(0, 3, P)
    _, last = causal_convolution(numbers(1, 4, P), numbers(2, P, 4), None, state, np.zeros(4, bool))
    np.testing.assert_array_equal(last, state)
