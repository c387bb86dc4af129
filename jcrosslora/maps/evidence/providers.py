"""The evidence providers by kind, and those of a few lines: the shared vocabulary, selected rows, random keys.

An alignment asks for kinds and knows no method.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.evaluate.probes.writing import check_seed
from jcrosslora.maps.evidence.activations import activations_cost, activations_key, collect_activations
from jcrosslora.maps.evidence.heads import check_shared_tokens, collect_embedding_map
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind, Selection
from jcrosslora.maps.evidence.request import AddEvidence, EvidenceRequest, ModuleStack, Provider, pairs_as_json
from jcrosslora.maps.evidence.singular_vectors import collect_singular_vectors, singular_vectors_cost
from jcrosslora.relation import Structure
from jcrosslora.relation.pairing import Depth
from jcrosslora.utils.cost import Cost

_DEFAULT_DEPTH = "proportional"


def evidence_cost(request: EvidenceRequest, texts: int) -> Cost | None:
    """Count the evidence of a request, with so many probe texts; None where a kind of it is not counted."""
    costs = [provider.cost(request, texts) for provider in providers_of(request.kinds)]
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if len(known) == len(costs) else None


def providers_of(kinds: Iterable[EvidenceKind]) -> list[Provider]:
    """Return the providers of some kinds, in a fixed order. Kinds that a fit collects itself have no provider."""
    wanted = set(kinds)
    return [provider for kind, provider in PROVIDERS.items() if kind in wanted]


def _collect_vocabulary(request: EvidenceRequest) -> AddEvidence:
    """Collect the moments of the shared vocabulary once for the pair; None where the bases share none.

    Methods that use the vocabulary for the signs of singular vectors work without it.
    """
    vocabulary = request.pair.vocabulary[0] if request.pair.shared_tokens[0] else None
    return lambda evidence, _: dataclasses.replace(evidence, vocabulary=vocabulary)


def _collect_keys(request: EvidenceRequest) -> AddEvidence:
    """Derive each PRNG key from the seed and the name of the target module alone, not from the other modules."""
    numbers = np.array([zlib.crc32(pair.target.encode()) for pair in request.modules], np.uint32)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(request.seed)))(numbers)
    data = np.asarray(jax.random.key_data(keys))
    by_target = {pair.target: row for pair, row in zip(request.modules, data, strict=True)}

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        rows = stack.filled([by_target[pair.target] for pair in stack.pairs])
        return dataclasses.replace(evidence, key=jax.random.wrap_key_data(jnp.asarray(np.stack(rows))))

    return add


def _collect_selection(request: EvidenceRequest) -> AddEvidence:
    """Read which rows and columns of the source each target module consists of from the structure of the pair.

    `selected_layers` refuses bases without shared structure when layers are paired.
    """
    structure, target = request.pair.structure[0], request.pair.target
    assert structure is not None
    return lambda evidence, stack: dataclasses.replace(evidence, selection=_select_rows(structure, target, stack))


def selected_layers(found: tuple[Structure | None, str], depth: Depth) -> tuple[int | None, ...]:
    """Return the source layer of every target layer from the structure that two bases share.

    `found` is the result of `find_structure`. The depth map is the default, or the one that the structure gives.

    Raises:
        MethodError: neither base consists of parts of the other.
        UsageError: another depth map was requested.
    """
    structure, reason = found
    if structure is None:
        msg = f"method select needs a base that is made of the other's parts: {reason}; use another method"
        raise MethodError(msg)
    layers = tuple(None if layer is None else layer.layer for layer in structure.layers)
    if depth != _DEFAULT_DEPTH and (isinstance(depth, str) or tuple(depth) != layers):
        shown = ",".join("-" if layer is None else str(layer) for layer in layers)
        msg = f"method select finds the layers by their weights, here {shown}; leave the depth map out"
        raise UsageError(msg)
    return layers


def _select_rows(structure: Structure, target: BaseModel, stack: ModuleStack) -> Selection:
    """Return the rows and columns of the modules of a stack, all in layers that have a counterpart."""
    modules = [target.modules[pair.target] for pair in stack.pairs]
    outputs = [structure.outputs(module.layer, module.role) for module in modules]
    inputs = [structure.inputs(module.layer, module.role) for module in modules]

    def stacked(rows: list[np.ndarray | None]) -> np.ndarray:
        found = [row for row in rows if row is not None]
        assert len(found) == len(modules)
        return np.stack(stack.filled(found)).astype(np.int32)

    return Selection(jnp.asarray(stacked(outputs)), jnp.asarray(stacked(inputs)))


PROVIDERS: dict[EvidenceKind, Provider] = {
    EvidenceKind.SINGULAR_VECTORS: Provider(
        collect_singular_vectors,
        is_costly=True,
        cost=singular_vectors_cost,
        cache_key=lambda request: request.single_vectors,
    ),
    EvidenceKind.SHARED_VOCABULARY: Provider(_collect_vocabulary, reads_tokenizers=True),
    EvidenceKind.EMBEDDING_MAP: Provider(
        collect_embedding_map,
        is_costly=True,
        reads_tokenizers=True,
        check=check_shared_tokens,
        cost=lambda *_: None,  # reading embeddings, matching heads and inverting weights are not counted
        cache_key=lambda request: pairs_as_json(request.modules),  # the heads of a layer are matched together
    ),
    EvidenceKind.ACTIVATIONS: Provider(
        collect_activations, is_costly=True, reads_tokenizers=True, cost=activations_cost, cache_key=activations_key
    ),
    EvidenceKind.SELECTION: Provider(_collect_selection),
    EvidenceKind.RANDOM_KEY: Provider(
        _collect_keys,
        is_costly=True,
        check=lambda request: check_seed(request.seed),  # JAX would truncate a larger one to its lower 32 bits
        cache_key=lambda request: request.seed,
    ),
}
