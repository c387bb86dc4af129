"""Find the structure that two bases share: match the residual stream by the embeddings, then the parts of each layer.

The rows of o_proj and down_proj belong to dimensions of the stream. A sample of rows holds a few numbers for every head
feature and every neuron, enough to match them in any order. Inner products of two rows do not depend on that order, and
show which layers correspond.

Layers with other blocks than attention and a dense MLP, such as recurrent ones, are matched whole; only their experts
are matched one by one.
"""

from collections.abc import Iterator

import numpy as np

from jcrosslora.architectures.blocks import EMBEDDING, Mlp, SelfAttention, module_name
from jcrosslora.checkpoint import BaseModel, shared_ids
from jcrosslora.checkpoint.config import Dims
from jcrosslora.relation.bases import Bases, Both, cosine_similarity, module_rows, some_of
from jcrosslora.relation.channels import find_channel_scales
from jcrosslora.relation.matching import MIN_MEAN_COSINE, match_columns, match_experts, match_heads, same_form
from jcrosslora.relation.structure import LayerMap, Structure
from jcrosslora.utils.picking import evenly_spaced

# Sampled rows of the embedding, of o_proj and down_proj, and of the modules that confirm a match.
_TOKENS, _STREAM_ROWS, _CHECKED_ROWS = 512, 128, 16
# Least cosine of matched key and value heads, relative to that of their query heads: the mean of two heads has 0.7.
_KV_SHARE = 0.85
# Correlation of row products from which two layers are compared feature by feature; layers of the same number always
# are. Layers that lost half of their neurons keep 0.7, different layers of one model have 0.1.
_MIN_CORRELATION = 0.3


def find_structure(source: BaseModel, target: BaseModel) -> tuple[Structure | None, str]:
    """Find the source part that each target part corresponds to.

    Reads the same rows on every run: 512 of each embedding, and of each layer 128 of o_proj and of down_proj and a few
    of the other modules. Returns the structure, in which at least one layer has a counterpart, and ""; or None and the
    reason. Raises CheckpointError if a sampled weight cannot be read, or holds NaN or infinity.
    """
    bases = Bases(source, target)
    others = [base.name for base in bases if _has_other_parts(base)]
    if others and not _same_parts(bases):
        parts = "layers of other parts than attention and a dense MLP"
        limit = "which are compared only with those of a base with modules of the same shapes"
        return None, f"{others[0]} has {parts}, {limit}"
    stream, by_embedding, tokens = _match_stream(bases)
    if stream is None:
        widths = f"{source.dims.hidden} and {target.dims.hidden} wide"
        return None, f"the bases are {widths}, and the columns of their embeddings have nothing in common"
    scales = find_channel_scales(source, target)
    if others:
        if not np.array_equal(stream, np.arange(target.dims.hidden)):
            return (
                None,
                "their residual streams are in different orders, in which layers of such parts are not compared",
            )
        layers = tuple(_whole_layers(bases) if scales is None else _layers_in_order(bases))
        if all(layer is None for layer in layers):
            return None, "no layer of one resembles a layer of the other with the same parts"
        return Structure(bases, stream, by_embedding, tokens, layers, scales), ""
    if scales is not None:
        layers = tuple(LayerMap(number, in_place={}, **_in_order(target.dims)) for number in range(target.dims.layers))
        return Structure(bases, stream, by_embedding, tokens, layers, scales), ""
    correlations, layers = _match_layers(bases, stream)
    bases.release()
    if all(layer is None for layer in layers):
        most = f"correlation of rows at most {correlations.max():.2f}; a copy has 1, unrelated layers about 0"
        if by_embedding:
            return None, f"their embeddings agree, but no layer of one with a layer of the other ({most})"
        return None, f"neither their embeddings nor any of their layers agree ({most})"
    structure = Structure(bases, stream, by_embedding, tokens, layers)
    if not correlations.any() and not structure.in_place:
        return None, "the sampled weights are zeros"
    return structure, ""


def _has_other_parts(base: BaseModel) -> bool:
    """Whether a base has layers of other parts than attention and a dense MLP."""
    stack = set(base.architecture.stack)
    return len(stack) > 1 or any(type(one.mixer) is not SelfAttention or type(one.mlp) is not Mlp for one in stack)


def _same_parts(bases: Bases) -> bool:
    """Whether two bases have modules of the same roles and shapes and experts of the same form, in any layers."""
    source, target = ({module.role: module.shape for module in base.modules.values()} for base in bases)
    return source == target and same_form(bases)


def _match_stream(bases: Bases) -> tuple[np.ndarray | None, bool, Both]:
    """Return the dimensions of the stream, whether the embeddings determined them, and the tokens that did."""
    for tokens in _tokens(bases):
        src, tgt = bases.rows(EMBEDDING, tokens)
        used = src.any(axis=1) & tgt.any(axis=1)
        found = match_columns(src[used], tgt[used]) if used.any() else None
        if found is not None:
            return found, True, tokens
    width_src, width_tgt = (base.dims.hidden for base in bases)
    return np.arange(width_tgt) if width_src == width_tgt else None, False, (np.arange(0), np.arange(0))


def _tokens(bases: Bases) -> Iterator[Both]:
    """Sample tokens that may be the same: by id in tables of equal length, then by text, then by id in all tables."""
    sizes = [base.dims.vocab for base in bases]
    by_id = evenly_spaced(min(sizes), _TOKENS)
    if sizes[0] == sizes[1]:
        yield by_id, by_id
    shared, _ = shared_ids(*bases)
    if shared is not None:
        yield some_of(shared[0], _TOKENS), some_of(shared[1], _TOKENS)
    if sizes[0] != sizes[1]:
        yield by_id, by_id


def _match_layers(bases: Bases, stream: np.ndarray) -> tuple[np.ndarray, tuple[LayerMap | None, ...]]:
    """Return (L_tgt, L_src) correlations of all pairs of layers, and the map of every target layer."""
    dims = some_of(np.flatnonzero(stream >= 0), _STREAM_ROWS)
    correlations = _row_products(bases.target, dims) @ _row_products(bases.source, stream[dims]).T
    # Among equal layers, such as repeated ones, the one with the target's own number comes first.
    layers = []
    for layer, row in enumerate(correlations + 1e-4 * np.eye(*correlations.shape)):
        best = int(row.argmax())
        candidates = [best] if row[best] >= _MIN_CORRELATION else []
        candidates += [layer] if layer < bases.source.dims.layers and layer not in candidates else []
        found = (
            _match_layer(bases, (other, layer), stream, dims, row[other] >= _MIN_CORRELATION) for other in candidates
        )
        layers.append(next((item for item in found if item is not None), None))
    return correlations, tuple(layers)


def _row_products(base: BaseModel, dims: np.ndarray) -> np.ndarray:
    """Return float32 (L, P): per layer the centred cosines of pairs of sampled rows of o_proj and down_proj, norm 1."""
    layers = []
    for layer in range(base.dims.layers):
        parts = []
        for role in ("o_proj", "down_proj"):
            rows = module_rows(base, module_name(layer, role), dims)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
            products = (units @ units.T)[np.triu_indices(len(dims), 1)]
            products -= products.mean() if products.size else 0
            parts.append(products / max(float(np.linalg.norm(products)), np.finfo(np.float32).tiny))
        layers.append(np.concatenate(parts) / np.sqrt(2))
        base.release()
    return np.stack(layers)


def _match_layer(
    bases: Bases, layers: tuple[int, int], stream: np.ndarray, dims: np.ndarray, search: bool
) -> LayerMap | None:
    """Match attention and MLP of a pair of layers; each is kept only if the modules that read the stream agree too."""

    def rows(role: str, src: np.ndarray, tgt: np.ndarray) -> Both:
        names = (module_name(layer, role) for layer in layers)
        rows_src, rows_tgt = map(module_rows, bases, names, (src, tgt))
        return rows_src, rows_tgt

    def columns(role: str) -> np.ndarray | None:
        return match_columns(*rows(role, stream[dims], dims), search=search)

    def similarity(role: str, index: np.ndarray) -> float:
        some = some_of(np.flatnonzero(index >= 0), _CHECKED_ROWS)
        if not len(some):
            return 0.0
        src, tgt = rows(role, index[some], some)
        return abs(cosine_similarity(src[:, stream[stream >= 0]], tgt[:, stream >= 0]))

    found = {}
    source, target = (base.dims for base in bases)
    neurons = columns("down_proj")
    shared = bases.source.architecture.role_shapes.keys() & bases.target.architecture.role_shapes.keys()
    readers = [role for role in ("up_proj", "gate_proj") if role in shared]
    if neurons is not None and min(similarity(role, neurons) for role in readers) >= MIN_MEAN_COSINE:
        found["neurons"] = neurons
    attended = columns("o_proj") if source.head_dim == target.head_dim else None
    if attended is not None:
        heads = match_heads(attended, source, target)
        queries = similarity("q_proj", heads["queries"])
        # A key-value head that averages several of the source resembles each of them, but less than the query heads do.
        if min(similarity("k_proj", heads["keys"]), similarity("v_proj", heads["values"])) < _KV_SHARE * queries:
            heads |= {name: np.full_like(heads[name], -1) for name in ("keys", "values")}
        if queries >= MIN_MEAN_COSINE:
            found |= heads
    nothing = {name: np.full(size, -1) for name, size in _sizes(target).items()}
    return LayerMap(layers[0], in_place={}, **(nothing | found)) if found else None


def _in_order(dims: Dims) -> dict[str, np.ndarray]:
    """Return the index arrays of a layer whose parts are those of the source at the same index."""
    return {name: np.arange(size) for name, size in _sizes(dims).items()}


def _sizes(dims: Dims) -> dict[str, int]:
    """Return the length of each index array of a `LayerMap` of a layer with attention and a dense MLP."""
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return {"queries": queries, "keys": keys, "values": keys, "attended": queries, "neurons": dims.intermediate}


def _whole_layers(bases: Bases) -> Iterator[LayerMap | None]:
    """Yield the map of every layer, None for a layer that resembles none of the source with the same parts.

    The layer of the same number is preferred.
    """
    source, target = bases
    samples: dict[int, dict[str, np.ndarray]] = {}
    for layer in range(target.dims.layers):
        rows = dict(_sampled_rows(target, layer))
        names = target.architecture.stack[layer].names
        candidates = [other for other, own in enumerate(source.architecture.stack) if own.names == names]
        candidates.sort(key=lambda other, layer=layer: other != layer)
        best, most = None, MIN_MEAN_COSINE
        for other in candidates:
            if other not in samples:
                samples[other] = dict(_sampled_rows(source, other))
                source.release()
            cosine = float(np.mean([cosine_similarity(samples[other][role], rows[role]) for role in rows]))
            if cosine >= most:
                best, most = other, cosine
                if other == layer:
                    break
        yield None if best is None else _whole_layer(bases, (best, layer))
        target.release()


def _layers_in_order(bases: Bases) -> Iterator[LayerMap]:
    return (_whole_layer(bases, (number, number), alike=True) for number in range(bases.target.dims.layers))


def _whole_layer(bases: Bases, layers: tuple[int, int], *, alike: bool = False) -> LayerMap:
    target, layer = bases.target, layers[1]
    shapes = {module.role: module.shape for module in target.modules.values() if module.layer == layer}
    attends, dense = "o_proj" in shapes, "down_proj" in shapes
    sizes = _sizes(target.dims).items()
    index = {name: np.arange(size * (dense if name == "neurons" else attends)) for name, size in sizes}
    experts = match_experts(bases, layers, alike=alike) if layer in target.layers_with("router") else None
    return LayerMap(layers[0], experts=experts, in_place=shapes, **index)


def _sampled_rows(base: BaseModel, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the role of each module of a layer, and a few of its rows."""
    for name, module in base.modules.items():
        if module.layer == layer:
            yield module.role, module_rows(base, name, evenly_spaced(module.shape[0], _CHECKED_ROWS))
