"""The evidence providers by kind, and those of a few lines: the shared vocabulary, selected rows, random keys.

An alignment asks for kinds and knows no method.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.evaluate.probes import check_seed
from jcrosslora.maps.activations import activations_cost, activations_key, collect_activations
from jcrosslora.maps.evidence import Evidence, EvidenceKind, Selection
from jcrosslora.maps.heads import check_shared_tokens, collect_embedding_map
from jcrosslora.maps.singular_vectors import collect_singular_vectors, singular_vectors_cost
from jcrosslora.maps.task import AddEvidence, AlignmentTask, ModuleStack, pairs_as_json
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class Provider:
    """How one kind of evidence is collected.

    Attributes:
        collect: collects what all modules share, and returns a function that adds the evidence of a stack of modules.
        reads_tokenizers: whether the evidence depends on the tokenizers as well as on the weights.
        check: refuses a task that cannot be done, before anything is computed.
        cost: counts what takes time with a number of probe texts, including the maps that are made from the evidence;
            None if it is not known.
        cache_key: what the evidence depends on in addition to bases, rank and modules, as a JSON value; None if maps
            made from it are computed as fast as they are read from a cache.
    """

    collect: Callable[[AlignmentTask], AddEvidence]
    reads_tokenizers: bool = False
    check: Callable[[AlignmentTask], None] = lambda _: None
    cost: Callable[[AlignmentTask, int], Cost | None] = lambda *_: Cost()
    cache_key: Callable[[AlignmentTask], Any] | None = None


def providers_of(kinds: Iterable[EvidenceKind]) -> list[Provider]:
    """Return the providers of some kinds, in a fixed order. Kinds that a fit collects itself have no provider."""
    wanted = set(kinds)
    return [provider for kind, provider in PROVIDERS.items() if kind in wanted]


def evidence_cost(task: AlignmentTask, texts: int) -> Cost | None:
    """Count the evidence of a task with a number of probe texts; None if a kind of it is not counted."""
    costs = [provider.cost(task, texts) for provider in providers_of(task.kinds)]
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if len(known) == len(costs) else None


def _collect_vocabulary(task: AlignmentTask) -> AddEvidence:
    """Collect the moments of the shared vocabulary once for the pair; None if the bases share none.

    Methods that use the vocabulary for the signs of singular vectors work without it.
    """
    vocabulary = task.pair.vocabulary[0] if task.pair.shared_tokens[0] else None
    return lambda evidence, _: dataclasses.replace(evidence, vocabulary=vocabulary)


def _collect_keys(task: AlignmentTask) -> AddEvidence:
    """Derive each PRNG key from the seed and the name of the target module alone, not from the other modules."""
    numbers = np.array([zlib.crc32(pair.target.encode()) for pair in task.modules], np.uint32)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(task.seed)))(numbers)
    data = np.asarray(jax.random.key_data(keys))
    by_target = {pair.target: row for pair, row in zip(task.modules, data, strict=True)}

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        rows = stack.filled([by_target[pair.target] for pair in stack.pairs])
        return dataclasses.replace(evidence, key=jax.random.wrap_key_data(jnp.asarray(np.stack(rows))))

    return add


def _collect_selection(task: AlignmentTask) -> AddEvidence:
    """Read which rows and columns of the source each target module consists of from the structure of the pair."""
    structure, target = task.pair.structure[0], task.pair.target
    assert structure is not None  # checked when the alignment was planned

    def stacked(stack: ModuleStack, rows: list[np.ndarray | None]) -> jax.Array:
        found = [row for row in rows if row is not None]
        assert len(found) == len(stack.pairs)  # all are in layers that have a counterpart
        return jnp.asarray(np.stack(stack.filled(found)).astype(np.int32))

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        modules = [target.modules[pair.target] for pair in stack.pairs]
        outputs = stacked(stack, [structure.outputs(module.layer, module.role) for module in modules])
        inputs = stacked(stack, [structure.inputs(module.layer, module.role) for module in modules])
        return dataclasses.replace(evidence, selection=Selection(outputs, inputs))

    return add


PROVIDERS: dict[EvidenceKind, Provider] = {
    EvidenceKind.SINGULAR_VECTORS: Provider(
        collect_singular_vectors, cost=singular_vectors_cost, cache_key=lambda task: task.single_vectors
    ),
    EvidenceKind.SHARED_VOCABULARY: Provider(_collect_vocabulary, reads_tokenizers=True),
    EvidenceKind.EMBEDDING_MAP: Provider(
        collect_embedding_map,
        reads_tokenizers=True,
        check=check_shared_tokens,
        cost=lambda *_: None,  # reading embeddings, matching heads and inverting weights are not counted
        cache_key=lambda task: pairs_as_json(task.modules),  # the heads of a layer are matched together
    ),
    EvidenceKind.ACTIVATIONS: Provider(
        collect_activations, reads_tokenizers=True, cost=activations_cost, cache_key=activations_key
    ),
    EvidenceKind.SELECTION: Provider(_collect_selection),
    EvidenceKind.RANDOM_KEY: Provider(
        _collect_keys,
        check=lambda task: check_seed(task.seed),  # JAX would truncate a larger one to its lower 32 bits
        cache_key=lambda task: task.seed,
    ),
}
