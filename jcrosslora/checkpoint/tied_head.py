"""Tell whether the output head is the embedding where the weights contradict the configuration."""

from collections.abc import Mapping

import numpy as np

from jcrosslora.checkpoint.families import EMBEDDING, HEAD, Family
from jcrosslora.checkpoint.store import TensorStore

_ROWS = 4096  # compared at a time
NOTE = (
    "the configuration ties the output head to the embedding (tie_word_embeddings), but the weights hold another head, "
    "which is used: set tie_word_embeddings to false in config.json, so that every engine uses it"
)


def has_own_head(family: Family, config: Mapping[str, object], store: TensorStore) -> bool:
    """Whether the weights hold another head than the embedding, although the configuration ties the two.

    transformers 5 runs such a model with the stored head (`PreTrainedModel.tie_weights`).
    """
    return family.is_tied(config) and {EMBEDDING, HEAD} <= set(store.names()) and not _equal(store)


def _equal(store: TensorStore) -> bool:
    shape = store.shape(EMBEDDING)
    if len(shape) != 2 or store.shape(HEAD) != shape:
        return False
    for start in range(0, shape[0], _ROWS):
        ids = np.arange(start, min(start + _ROWS, shape[0]))
        if not np.array_equal(store.rows(EMBEDDING, ids), store.rows(HEAD, ids), equal_nan=True):
            return False
        store.release()
    return True
