"""The attention heads of two bases, matched layer by layer."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import ATTENTION, ROLE_PATHS
from jcrosslora.evidence.head_matching import AttentionWeights, best_match, circuit_cosines, shared_by_groups
from jcrosslora.evidence.records import HeadMatch
from jcrosslora.lineage.pairing import Pair

_KEYED = frozenset({"k_proj", "v_proj"})


def match_heads(source: BaseModel, target: BaseModel, pairs: Iterable[Pair], stream: jax.Array) -> dict[str, HeadMatch]:
    """For each pair of attention modules, by the target's name, which heads go together.

    All four attention modules of a layer decide, whichever of them are paired; they are read a layer at a time.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        pairs: the pairs wanted; those of the MLP are passed over.
        stream: (H_src, H_tgt), takes rows of the source's stream to the target's.

    Raises:
        CheckpointError: a weight that cannot be read.
    """
    by_layers: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
    found = {}
    for pair in pairs:
        if pair.role in ATTENTION:
            layers = source.modules[pair.source].layer, target.modules[pair.target].layer
            if layers not in by_layers:
                by_layers[layers] = _match(_attention(source, layers[0]), _attention(target, layers[1]), stream)
            match, cosine = by_layers[layers]
            if pair.role in _KEYED:
                match = shared_by_groups(match, target.dims.kv_heads, source.dims.kv_heads)
            found[pair.target] = HeadMatch(jnp.asarray(match, jnp.float32), jnp.asarray(cosine, jnp.float32))
    return found


def head_counts(source: BaseModel, target: BaseModel, role: str) -> tuple[int, int] | None:
    """Heads of the target and of the source in modules of a role; None for the MLP's."""
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
    names = [f"model.layers.{layer}.{ROLE_PATHS[role]}" for role in ATTENTION]
    q, k, v, o = (jnp.asarray(base.weight(name)).astype(jnp.float32) for name in names)
    base.release()
    return AttentionWeights(q, k, v, o, base.dims.heads, base.dims.kv_heads)
