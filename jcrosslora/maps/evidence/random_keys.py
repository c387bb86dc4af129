"""A PRNG key for each pair of modules."""

import dataclasses
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.evaluate.probes.writing import check_seed
from jcrosslora.maps.evidence.records import Evidence
from jcrosslora.maps.evidence.request import EvidenceRequest, ModuleStack
from jcrosslora.utils.cost import Cost


class RandomKeyProvider:
    """Derives each key from the seed and the name of the target module alone, not from the other modules."""

    is_costly = True
    reads_tokenizers = False

    def check(self, request: EvidenceRequest) -> None:
        """Refuse a seed that JAX would truncate to its lower 32 bits."""
        check_seed(request.seed)

    def cost(self, request: EvidenceRequest, texts: int) -> Cost:
        """Count nothing."""
        del request, texts
        return Cost()

    def cache_key(self, request: EvidenceRequest) -> Any:
        """Return the seed."""
        return request.seed

    def collect(self, request: EvidenceRequest) -> Any:
        """Make the keys of all modules."""
        numbers = np.array([zlib.crc32(pair.target.encode()) for pair in request.modules], np.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(request.seed)))(numbers)
        data = np.asarray(jax.random.key_data(keys))
        by_target = {pair.target: row for pair, row in zip(request.modules, data, strict=True)}

        def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
            rows = stack.filled([by_target[pair.target] for pair in stack.pairs])
            return dataclasses.replace(evidence, key=jax.random.wrap_key_data(jnp.asarray(np.stack(rows))))

        return add
