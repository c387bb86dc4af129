"""Logits of the same tokens, here and in torch."""

import numpy as np
from tiny_models import torch

from jcrosslora.decoder import forward, load_model, logits, stack_adapter


def run(base, tokens, adapter=None, mask=None):
    ours = load_model(base)
    stacked = None if adapter is None else stack_adapter(adapter, base)
    return np.asarray(logits(ours, forward(ours.with_adapter(stacked), tokens, mask=mask).hidden))


def theirs(model, tokens, **given):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long(), use_cache=False, **given).logits.numpy()
