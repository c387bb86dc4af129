"""Gradients of one number, a weighted sum of logits, by the factors of an adapter: in torch and here."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import torch

from jcrosslora.decoder import forward, load_model, logits


def gradients_of_both(model, base, stacked, tokens):
    """Return ours as an adapter's tree, and those of a model of peft by the names of its parameters."""
    ours = load_model(base)
    weight = np.random.default_rng(1).normal(size=(*tokens.shape, ours.settings.vocab)).astype(np.float32)
    (model(input_ids=torch.from_numpy(tokens).long()).logits * torch.from_numpy(weight)).sum().backward()

    @jax.jit
    @jax.grad
    def gradient(stacked):
        return jnp.sum(logits(ours, forward(ours.with_adapter(stacked), tokens).hidden) * weight)

    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradient(stacked), wanted
