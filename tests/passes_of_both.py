"""Logits of the same tokens, here and in torch."""

import numpy as np
from tiny_models import torch

from jcrosslora.decoder import forward, load_params, logits, settings_of, stack_adapter


def run(base, tokens, adapter=None, mask=None):
    settings, params = settings_of(base), load_params(base)
    stacked = None if adapter is None else stack_adapter(adapter, base)
    return np.asarray(logits(settings, params, forward(settings, params, tokens, mask=mask, adapter=stacked).hidden))


def theirs(model, tokens, **given):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long(), use_cache=False, **given).logits.numpy()
