"""The memory that a fit takes on top of the weights of both bases."""

import math

import numpy as np

from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.decoder import DecoderSettings, settings_of
from jcrosslora.decoder.sharding import stack_shapes
from jcrosslora.distill.batches import row_shape
from jcrosslora.distill.completions import MOST_TOKENS
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.utils.cost import TEXT

# Bytes of activations that the layers may keep for the backward pass; to recompute them takes another forward pass.
_MOST_KEPT = 4 * 2**30
MOST_REMEMBERED = 2 * 2**30  # bytes of a round's predictions that are kept for its further passes
_NUMBER = np.dtype(np.float32).itemsize


def needs_remat(settings: DecoderSettings, shape: tuple[int, ...]) -> bool:
    """Check whether the activations kept for the backward pass of (B, T) tokens take more than 4 GB."""
    return _activations(settings, shape) > _MOST_KEPT


def most_beside(target: BaseModel, settings: DistillSettings) -> int:
    """Return the bytes that a fit may take on top of the weights of both bases, with prompts of a usual length.

    They are the predictions that it remembers, the activations that it keeps, and the factors of all modules that it
    fits, four times: in training, the best ones, and two moments.

    Raises:
        CheckpointError: the decoder does not support the target.
    """
    shapes = [shape for name, shape in stack_shapes(target).items() if name in (settings.roles or ROLES)]
    factors = sum(layers * min(settings.fit_rank, *sides) * sum(sides) for layers, *sides in shapes)
    rows, width = row_shape(TEXT + (settings.answer_tokens or MOST_TOKENS))
    columns = min(settings.compared_tokens, target.dims.vocab)
    remembered = min(MOST_REMEMBERED, _NUMBER * settings.rounds[0] * width * columns)
    return remembered + min(_MOST_KEPT, _activations(settings_of(target), (rows, width))) + 4 * _NUMBER * factors


def _activations(settings: DecoderSettings, shape: tuple[int, ...]) -> int:
    """Return the bytes of activations that are kept for the backward pass of (B, T) tokens.

    A position takes about twice the MLP's width and three times those of the stream and of attention, in float32, and
    for each expert that it goes through what that returns and twice its width, by XLA's memory analysis of bases of
    0.1B to 8B parameters.
    """
    blocks = [block for layer in dict.fromkeys(settings.stack) for block in layer.blocks]
    mixed = max(settings.heads * settings.head_dim, *(block.mixed_size for block in blocks))
    wide = 2 if settings.layers_with("wide_up_proj") else 1
    width = 2 * wide * settings.intermediate + 3 * (settings.hidden + mixed)
    if experts := next((layer.experts for layer in settings.stack if layer.experts is not None), None):
        width += experts.routing.used * (2 * experts.width + settings.hidden)
    return _NUMBER * settings.layers * math.prod(shape) * width
