"""Find the structure that two bases share: the residual stream by the embeddings, then the parts of each layer.

Rows of o_proj and down_proj are dimensions of the stream. A sample of them holds a few numbers of every head feature
and of every neuron, by which these are matched in any order. Products of two such rows do not depend on the order at
all, and show which layers correspond.

Layers with other parts than attention and a dense MLP, as heads with a state, are matched whole; only their experts are
searched.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from jcrosslora.architectures.blocks import ROLE_PATHS, Mlp, SelfAttention
from jcrosslora.architectures.names import EMBEDDING
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.vocabulary import shared_ids
from jcrosslora.relation.matching import MIN_MEAN_COSINE, match_columns, match_experts, match_heads, same_form
from jcrosslora.relation.structure import LayerMap, Structure
from jcrosslora.relation.weight_similarity import check_finite, cosine_similarity, evenly_spaced, module_rows

# Sampled rows of the embedding, of o_proj and down_proj, and of the modules that confirm a match.
_TOKENS, _STREAM_ROWS, _CHECKED_ROWS = 512, 128, 16
# Least cosine of matched key and value heads, relative to that of their query heads: the mean of two heads has 0.7.
_KV_SHARE = 0.85
# Correlation of row products from which two layers are compared feature by feature; layers of the same number always
# are. Layers that lost half of their neurons keep 0.7, different layers of one model have 0.1.
_MIN_CORRELATION = 0.3

Tokens = tuple[np.ndarray, np.ndarray]


def find_structure(source: BaseModel, target: BaseModel) -> tuple[Structure | None, str]:
    """Find the source part that each target part corresponds to.

    Reads the same rows on every run: 512 of each embedding, and of each layer 128 of o_proj and of down_proj and a few
    of the other modules.

    Returns:
        The structure, in which at least one layer has a counterpart, and ""; or None and the reason.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    others = [base.name for base in (source, target) if _has_other_parts(base)]
    if others and not _same_parts(source, target):
        other = "layers of other parts than attention and a dense MLP"
        return (
            None,
            f"{others[0]} has {other}, which are compared only with those of a base with modules of the same shapes",
        )
    stream, by_embedding, tokens = _match_stream(source, target)
    if stream is None:
        widths = f"{source.dims.hidden} and {target.dims.hidden} wide"
        return None, f"the bases are {widths}, and the columns of their embeddings have nothing in common"
    if others:
        return _whole_layers(source, target, Structure(stream, by_embedding, tokens, ()))
    correlations, layers = _match_layers(source, target, stream)
    for base in (source, target):
        base.release()
    if all(layer is None for layer in layers):
        most = f"correlation of rows at most {correlations.max():.2f}; a copy has 1, unrelated layers about 0"
        if by_embedding:
            return None, f"their embeddings agree, but no layer of one with a layer of the other ({most})"
        return None, f"neither their embeddings nor any of their layers agree ({most})"
    structure = Structure(stream, by_embedding, tokens, layers)
    if not correlations.any() and not structure.in_place(source):
        return None, "the sampled weights are zeros"
    return structure, ""


def _whole_layers(source: BaseModel, target: BaseModel, stream: Structure) -> tuple[Structure | None, str]:
    """Add the layers of bases with the same parts to what is known of the stream."""
    if not np.array_equal(stream.stream, np.arange(target.dims.hidden)):
        return None, "their residual streams are in different orders, in which layers of such parts are not compared"
    layers = _matched_layers(source, target)
    if all(layer is None for layer in layers):
        return None, "no layer of one resembles a layer of the other with the same parts"
    return replace(stream, layers=layers), ""


def _match_stream(source: BaseModel, target: BaseModel) -> tuple[np.ndarray | None, bool, Tokens]:
    """Return the dimensions of the stream, whether the embeddings determined them, and the tokens that did."""
    for tokens in _tokens(source, target):
        pair = zip((source, target), tokens, strict=True)
        src, tgt = (check_finite(base, "the embedding", base.rows(EMBEDDING, ids)) for base, ids in pair)
        used = src.any(axis=1) & tgt.any(axis=1)
        found = match_columns(src[used], tgt[used]) if used.any() else None
        if found is not None:
            return found, True, tokens
    in_order = np.arange(target.dims.hidden) if source.dims.hidden == target.dims.hidden else None
    return in_order, False, (np.arange(0), np.arange(0))


def _tokens(source: BaseModel, target: BaseModel) -> Iterator[Tokens]:
    """Sample tokens that may be the same: by id in tables of equal length, then by text, then by id in all tables."""
    sizes = source.dims.vocab, target.dims.vocab
    by_id = evenly_spaced(min(sizes), _TOKENS)
    if sizes[0] == sizes[1]:
        yield by_id, by_id
    shared, _ = shared_ids(source, target)
    if shared is not None:
        ids_src, ids_tgt = shared
        some = evenly_spaced(len(ids_src), _TOKENS)
        yield ids_src[some], ids_tgt[some]
    if sizes[0] != sizes[1]:
        yield by_id, by_id


def _match_layers(
    source: BaseModel, target: BaseModel, stream: np.ndarray
) -> tuple[np.ndarray, tuple[LayerMap | None, ...]]:
    """Return (L_tgt, L_src) correlations of all pairs of layers, and the map of every target layer."""
    dims = np.flatnonzero(stream >= 0)
    dims = dims[evenly_spaced(len(dims), _STREAM_ROWS)]
    correlations = _row_products(target, dims) @ _row_products(source, stream[dims]).T
    # Among equal layers, such as repeated ones, the one with the target's own number comes first.
    layers = []
    for layer, row in enumerate(correlations + 1e-4 * np.eye(*correlations.shape)):
        best = int(row.argmax())
        candidates = [best] if row[best] >= _MIN_CORRELATION else []
        candidates += [layer] if layer < source.dims.layers and layer not in candidates else []
        found = (
            _match_layer(source, target, (other, layer), stream, dims, row[other] >= _MIN_CORRELATION)
            for other in candidates
        )
        layers.append(next((item for item in found if item is not None), None))
    return correlations, tuple(layers)


def _match_layer(
    source: BaseModel,
    target: BaseModel,
    layers: tuple[int, int],
    stream: np.ndarray,
    dims: np.ndarray,
    search: bool,
) -> LayerMap | None:
    """Match attention and MLP of a pair of layers; each is kept only if the modules that read the stream agree too."""
    nothing = {
        "queries": np.full(target.dims.heads * target.dims.head_dim, -1),
        "keys": np.full(target.dims.kv_heads * target.dims.head_dim, -1),
        "values": np.full(target.dims.kv_heads * target.dims.head_dim, -1),
        "attended": np.full(target.dims.heads * target.dims.head_dim, -1),
        "neurons": np.full(target.dims.intermediate, -1),
    }
    names = [{role: f"model.layers.{layer}.{path}" for role, path in ROLE_PATHS.items()} for layer in layers]

    def columns(role: str) -> np.ndarray | None:
        src = module_rows(source, names[0][role], stream[dims])
        return match_columns(src, module_rows(target, names[1][role], dims), search=search)

    def similarity(role: str, rows: np.ndarray) -> float:
        some = np.flatnonzero(rows >= 0)
        if not len(some):
            return 0.0
        some = some[evenly_spaced(len(some), _CHECKED_ROWS)]
        src = module_rows(source, names[0][role], rows[some])[:, np.maximum(stream, 0)]
        tgt = module_rows(target, names[1][role], some)
        return abs(cosine_similarity(src[:, stream >= 0], tgt[:, stream >= 0]))

    found = {}
    neurons = columns("down_proj")
    readers = [
        role
        for role in ("up_proj", "gate_proj")
        if role in source.architecture.role_shapes and role in target.architecture.role_shapes
    ]
    if neurons is not None and min(similarity(role, neurons) for role in readers) >= MIN_MEAN_COSINE:
        found["neurons"] = neurons
    attended = columns("o_proj") if source.dims.head_dim == target.dims.head_dim else None
    if attended is not None:
        heads = match_heads(attended, source.dims, target.dims)
        queries = similarity("q_proj", heads["queries"])
        # A key-value head that averages several of the source resembles each of them, but less than the query heads do.
        if min(similarity("k_proj", heads["keys"]), similarity("v_proj", heads["values"])) < _KV_SHARE * queries:
            heads |= {name: nothing[name] for name in ("keys", "values")}
        if queries >= MIN_MEAN_COSINE:
            found |= heads
    return LayerMap(layers[0], in_place={}, **(nothing | found)) if found else None


def _row_products(base: BaseModel, dims: np.ndarray) -> np.ndarray:
    """Return float32 (L, P): per layer the centred cosines of pairs of sampled rows of o_proj and down_proj, norm 1."""
    layers = []
    for layer in range(base.dims.layers):
        parts = []
        for role in ("o_proj", "down_proj"):
            rows = module_rows(base, f"model.layers.{layer}.{ROLE_PATHS[role]}", dims)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
            products = (units @ units.T)[np.triu_indices(len(dims), 1)]
            products -= products.mean() if products.size else 0
            parts.append(products / max(float(np.linalg.norm(products)), np.finfo(np.float32).tiny))
        layers.append(np.concatenate(parts) / np.sqrt(2))
        base.release()
    return np.stack(layers)


def _has_other_parts(base: BaseModel) -> bool:
    """Whether a base has layers of other parts than attention and a dense MLP."""
    stack = set(base.architecture.stack)
    return len(stack) > 1 or any(type(one.mixer) is not SelfAttention or type(one.mlp) is not Mlp for one in stack)


def _same_parts(source: BaseModel, target: BaseModel) -> bool:
    """Whether two bases have modules of the same roles and shapes and experts of the same form, in any layers."""
    shapes = [{module.role: module.shape for module in base.modules.values()} for base in (source, target)]
    return shapes[0] == shapes[1] and same_form(source, target)


def _matched_layers(source: BaseModel, target: BaseModel) -> tuple[LayerMap | None, ...]:
    """Return the map of every layer, None for a layer that resembles none of the source with the same parts.

    The layer of the same number is preferred.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    samples: dict[int, dict[str, np.ndarray]] = {}
    found: list[LayerMap | None] = []
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
        found.append(None if best is None else _whole_layer(source, target, best, layer))
        target.release()
    return tuple(found)


def _whole_layer(source: BaseModel, target: BaseModel, layer_src: int, layer_tgt: int) -> LayerMap:
    dims = target.dims
    shapes = {module.role: module.shape for module in target.modules.values() if module.layer == layer_tgt}
    attends, dense = "o_proj" in shapes, "down_proj" in shapes
    queries = np.arange(dims.heads * dims.head_dim if attends else 0)
    keys = np.arange(dims.kv_heads * dims.head_dim if attends else 0)
    neurons = np.arange(dims.intermediate if dense else 0)
    has_experts = layer_tgt in target.layers_with("router")
    experts = match_experts(source, target, layer_src, layer_tgt) if has_experts else None
    return LayerMap(layer_src, queries, keys, keys, queries, neurons, experts, shapes)


def _sampled_rows(base: BaseModel, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the role of each module of a layer, and a few of its rows."""
    for name, module in base.modules.items():
        if module.layer == layer:
            yield module.role, module_rows(base, name, evenly_spaced(module.shape[0], _CHECKED_ROWS))
