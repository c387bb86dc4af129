"""Gradients of one number, a weighted sum of logits, by the factors of an adapter: in torch and here."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import torch

from jcrosslora.decoder import forward, load_params, logits, settings_of


def gradients_of_both(model, base, stacked, tokens):
    """Return ours as an adapter's tree, and those of a model of peft by the names of its parameters."""
    settings, params = settings_of(base), load_params(base)
    weight = np.random.default_rng(1).normal(size=(*tokens.shape, settings.vocab)).astype(np.float32)
    (model(input_ids=torch.from_numpy(tokens).long()).logits * torch.from_numpy(weight)).sum().backward()

    @jax.jit
    @jax.grad
    def gradient(stacked):
        return jnp.sum(logits(settings, params, forward(settings, params, tokens, adapter=stacked).hidden) * weight)

    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradient(stacked), wanted
