"""Compare the decoder with transformers on tiny random models of every family, in float32."""

import jax
import numpy as np
import pytest
from decoder_pairs import (
    LENGTH,
    SHORT,
    TOLERANCE,
    VARIANTS,
    pair_fixture,
    random_tokens,
    run,
    torch_logits,
)
from full_set import full_except
from tiny_models import torch

from jcrosslora.decoder import CAPTURES, INPUT_SITES, forward, logits, target_log_probs

pair = pair_fixture(full_except(VARIANTS, ["llama-biases", "gemma2", "phi3-longrope"]))


@jax.jit
def run_captured(ours, tokens):
    output = forward(ours, tokens, capture=CAPTURES)
    return logits(ours, output.hidden), output.captured


def hooked(model, tokens):
    """Return logits, (input, output) of every linear module by name, and the stream before and after each layer."""
    seen, stream, handles = {}, [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            note = lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})  # noqa: E731
            handles.append(module.register_forward_hook(note))
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda _, inputs, output: stream.append((inputs[0], output))))
    scores = torch_logits(model, tokens)
    for handle in handles:
        handle.remove()
    return scores, seen, torch.stack([stream[0][0], *(after for _, after in stream)]).numpy()


def test_logits_captures_and_residual_stream_match_torch(pair):
    model, base, ours = pair
    tokens = random_tokens(2, LENGTH)
    scores, seen, stream = hooked(model, tokens)
    found, captured = run_captured(ours, tokens)
    np.testing.assert_allclose(found, scores, **TOLERANCE)
    np.testing.assert_allclose(captured["residual"], stream, **TOLERANCE)
    for name, module in base.modules.items():
        rows = slice(*module.rows) if module.rows else slice(None)
        read, made = seen[module.tensor.removesuffix(".weight")]
        mine = captured["inputs"][INPUT_SITES[module.role]][module.layer]
        np.testing.assert_allclose(mine, read.numpy(), err_msg=name, **TOLERANCE)
        mine = captured["outputs"][module.role][module.layer]
        np.testing.assert_allclose(mine, made[..., rows].numpy(), err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("pair", ["phi3-longrope"], indirect=True)
def test_longrope_uses_short_factors_up_to_the_original_length(pair):
    model, _, ours = pair
    tokens = random_tokens(2, SHORT)
    np.testing.assert_allclose(run(ours, tokens), torch_logits(model, tokens), **TOLERANCE)


@pytest.mark.parametrize("pair", ["llama-biases", "gemma2"], indirect=True)
def test_target_log_probs_match_the_logits(pair):
    model, _, ours = pair
    tokens, targets = random_tokens(2, SHORT), random_tokens(2, SHORT + 1)[:, 1:]

    @jax.jit
    def found(ours):
        return target_log_probs(ours, forward(ours, tokens).hidden, targets, chunk=7)

    scores = torch.log_softmax(torch.from_numpy(torch_logits(model, tokens)), dim=-1)
    wanted = scores.gather(-1, torch.from_numpy(targets).long()[..., None])[..., 0].numpy()
    np.testing.assert_allclose(found(ours), wanted, **TOLERANCE)
