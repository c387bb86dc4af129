"""A map of the residual stream by the embeddings of shared tokens, and attention heads matched through it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import ATTENTION, ROLE_PATHS
from jcrosslora.errors import MethodError
from jcrosslora.maps.evidence.head_matching import AttentionWeights, best_match, circuit_cosines, mean_over_groups
from jcrosslora.maps.evidence.records import Evidence, HeadMatch, Vocabulary
from jcrosslora.maps.evidence.request import EvidenceRequest, ModuleStack, pairs_as_json
from jcrosslora.relation.pairing import Pair

_KEYED = frozenset({"k_proj", "v_proj"})
# The moments are sums in float32: directions of the embeddings weaker than their rounding are noise.
_ROUNDING = 10 * float(np.finfo(np.float32).eps)


class EmbeddingMapProvider:
    """Adds the shared vocabulary with a map of the residual stream, and the matched heads of attention modules."""

    is_costly = True
    reads_tokenizers = True

    def check(self, request: EvidenceRequest) -> None:
        """Refuse bases without enough shared tokens.

        Raises:
            MethodError: the vocabularies share too few tokens, or one cannot be read.
        """
        count, reason = request.pair.shared_tokens
        if not count:
            msg = f"method {request.method} needs tokens that both bases have: {reason}; use another method"
            raise MethodError(msg)

    def cost(self, request: EvidenceRequest, texts: int) -> None:
        """Leave the reading of embeddings, the matching of heads and the inversion of weights uncounted."""

    def cache_key(self, request: EvidenceRequest) -> Any:
        """Return all modules: the heads of a layer are matched together."""
        return pairs_as_json(request.modules)

    def collect(self, request: EvidenceRequest) -> Any:
        """Solve for the map, and match the heads of every pair of layers."""
        pair = request.pair
        found = pair.vocabulary[0]
        assert found is not None
        stream = embedding_map(found)
        vocabulary = dataclasses.replace(found, stream=stream)
        heads = match_heads(pair.source, pair.target, request.modules, stream)

        def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
            evidence = dataclasses.replace(evidence, vocabulary=vocabulary)
            if stack.pairs[0].target not in heads:
                return evidence
            matches = stack.filled([heads[item.target] for item in stack.pairs])
            return dataclasses.replace(evidence, heads=jax.tree.map(lambda *leaves: jnp.stack(leaves), *matches))

        return add


def embedding_map(vocabulary: Vocabulary) -> jax.Array:
    """Solve E_src W = E_tgt for the least-squares solution W (H_src, H_tgt) of smallest norm, from the moments.

    The solve runs in float64 on the host, once per pair of bases.
    """
    mean_src, mean_tgt = np.asarray(vocabulary.mean_src, np.float64), np.asarray(vocabulary.mean_tgt, np.float64)
    gram = np.asarray(vocabulary.gram_src, np.float64) + np.outer(mean_src, mean_src)
    cross = np.asarray(vocabulary.cross, np.float64) + np.outer(mean_src, mean_tgt)
    return jnp.asarray(np.linalg.pinv(gram, rcond=_ROUNDING, hermitian=True) @ cross, jnp.float32)


def match_heads(source: BaseModel, target: BaseModel, pairs: Iterable[Pair], stream: jax.Array) -> dict[str, HeadMatch]:
    """Match the attention heads of every pair of attention modules; the result is by the target's name.

    The match uses all four attention modules of a layer, whichever of them are paired, and reads a layer at a time. A
    role is skipped that is also in layers without all four, such as o_proj where layers read the keys of others.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        pairs: the pairs of modules; those of the MLP are skipped.
        stream: (H_src, H_tgt), maps rows of the source's residual stream to the target's.

    Raises:
        CheckpointError: a weight that cannot be read.
    """
    by_layers: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
    found, pairs = {}, [pair for pair in pairs if pair.role in ATTENTION]
    sides = [(source, pair.source, pair.role) for pair in pairs] + [(target, pair.target, pair.role) for pair in pairs]
    skipped = {role for base, name, role in sides if not base.modules.keys() >= {*_names(base.modules[name].layer)}}
    for pair in pairs:
        if pair.role not in skipped:
            layers = source.modules[pair.source].layer, target.modules[pair.target].layer
            if layers not in by_layers:
                by_layers[layers] = _match(_attention(source, layers[0]), _attention(target, layers[1]), stream)
            match, cosine = by_layers[layers]
            if pair.role in _KEYED:
                match = mean_over_groups(match, target.dims.kv_heads, source.dims.kv_heads)
            found[pair.target] = HeadMatch(jnp.asarray(match, jnp.float32), jnp.asarray(cosine, jnp.float32))
    return found


def head_counts(source: BaseModel, target: BaseModel, role: str) -> tuple[int, int] | None:
    """Return the numbers of heads of the target and of the source in modules of a role; None for the MLP."""
    if role not in ATTENTION:
        return None
    if role in _KEYED:
        return target.dims.kv_heads, source.dims.kv_heads
    return target.dims.heads, source.dims.heads


def _match(src: AttentionWeights, tgt: AttentionWeights, stream: jax.Array) -> tuple[np.ndarray, float]:
    cosines = np.asarray(circuit_cosines(src, tgt, stream))
    match = best_match(cosines)
    return match, float(cosines[match.T].mean())


def _attention(base: BaseModel, layer: int) -> AttentionWeights:
    names = _names(layer)
    q, k, v, o = (jnp.asarray(base.weight(name)).astype(jnp.float32) for name in names)
    base.release()
    if base.modules[names[0]].role == "qg_proj":  # rows of queries and of gates in turn
        q = q.reshape(base.dims.heads, 2, base.dims.head_dim, -1)[:, 0].reshape(-1, q.shape[1])
    return AttentionWeights(q, k, v, o, base.dims.heads, base.dims.kv_heads)


def _names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{ROLE_PATHS[role]}" for role in ATTENTION]
