"""Compare the decoder with transformers on two real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_models import real_model
from tiny_models import torch
from torch_model import torch_model

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import forward, load_model, logits

pytestmark = [pytest.mark.full, pytest.mark.real]
NAMES = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf")


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)])
def test_logits_match_transformers(name):
    base = open_base(real_model(name))
    tokens = np.random.default_rng(0).integers(0, base.dims.vocab, (1, 20)).astype(np.int32)
    with torch.no_grad():
        wanted = torch_model(base)(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    model = load_model(base)
    found = jax.jit(lambda model: logits(model, forward(model, tokens).hidden))(model)
    error = float(jnp.max(jnp.abs(found - wanted)))
    print(f"{name}: largest error {error:.2e}, spread of the logits {wanted.std():.3f}")
    assert error < 1e-3 * wanted.std()
