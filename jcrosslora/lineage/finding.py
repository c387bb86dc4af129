"""Find the structure that two bases share: the stream by the embeddings, then layer by layer what writes to it.

Rows of o and down are dimensions of the stream, so a sample of them holds a few numbers of every head feature and every
neuron, by which these are matched whatever their order. Products of two such rows do not depend on the order at all,
and tell which layers go together.
"""

from collections.abc import Iterator

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import ROLE_PATHS
from jcrosslora.checkpoint.shared_tokens import shared_ids
from jcrosslora.lineage.attention import head_rows
from jcrosslora.lineage.columns import KIN, match_columns
from jcrosslora.lineage.sampling import even, finite, module_rows
from jcrosslora.lineage.structure import LayerMap, Structure

_TOKENS, _WRITTEN, _CHECKED = 512, 128, 16  # sampled rows: of the embedding, of o and down, of what is checked

# How like its counterpart a key head has to be, beside the query heads that it serves: the mean of two has 0.7.
_AS_LIKE = 0.85
# Two layers are compared feature by feature where the products of their rows have this correlation, or where they are
# the same by number. Layers that have lost half of their neurons keep 0.7, different layers of one model have 0.1.
_ALIKE = 0.3


def find_structure(source: BaseModel, target: BaseModel) -> tuple[Structure | None, str]:
    """Find what of the source each part of the target is.

    The rows that are read are the same on every run: 512 of each embedding, and of each layer 128 of o and of down and
    a few of the others.

    Returns:
        The structure, in which at least one layer has a counterpart; or None with the reason.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    stream, by_embedding, tokens = _match_stream(source, target)
    if stream is None:
        widths = f"{source.dims.hidden} and {target.dims.hidden} wide"
        return None, f"the bases are {widths}, and the columns of their embeddings have nothing in common"
    likeness, layers = _match_layers(source, target, stream)
    for base in (source, target):
        base.release()
    if all(layer is None for layer in layers):
        most = f"{likeness.max():.2f}, where a copy has 1 and strangers about 0"
        embeddings = "their embeddings agree" if by_embedding else "neither their embeddings agree"
        also = "but no" if by_embedding else "nor any"
        return None, f"{embeddings}, {also} layer of one with a layer of the other (likeness of rows at most {most})"
    structure = Structure(stream, by_embedding, tokens, layers)
    if not likeness.any() and not structure.in_place(source):
        return None, "the weights that were sampled are zeros"
    return structure, ""


Tokens = tuple[np.ndarray, np.ndarray]


def _match_stream(source: BaseModel, target: BaseModel) -> tuple[np.ndarray | None, bool, Tokens]:
    """The dimensions of the stream, whether the embeddings told them, and the tokens by which they did."""
    for tokens in _tokens(source, target):
        pair = zip((source, target), tokens, strict=True)
        src, tgt = (finite(base, "the embedding", base.rows(base.embedding_name, ids)) for base, ids in pair)
        used = src.any(axis=1) & tgt.any(axis=1)
        found = match_columns(src[used], tgt[used]) if used.any() else None
        if found is not None:
            return found, True, tokens
    in_order = np.arange(target.dims.hidden) if source.dims.hidden == target.dims.hidden else None
    return in_order, False, (np.arange(0), np.arange(0))


def _tokens(source: BaseModel, target: BaseModel) -> Iterator[Tokens]:
    """Samples of tokens that may be the same: by number where the tables are equally long, by their text, by number."""
    sizes = source.dims.vocab, target.dims.vocab
    by_number = even(min(sizes), _TOKENS)
    if sizes[0] == sizes[1]:
        yield by_number, by_number
    shared, _ = shared_ids(source, target)
    if shared is not None:
        ids_src, ids_tgt = shared
        some = even(len(ids_src), _TOKENS)
        yield ids_src[some], ids_tgt[some]
    if sizes[0] != sizes[1]:
        yield by_number, by_number


def _match_layers(
    source: BaseModel, target: BaseModel, stream: np.ndarray
) -> tuple[np.ndarray, tuple[LayerMap | None, ...]]:
    """How alike all pairs of layers are, (L_tgt, L_src), and what every layer of the target is made of."""
    dims = np.flatnonzero(stream >= 0)
    dims = dims[even(len(dims), _WRITTEN)]
    likeness = _fingerprints(target, dims) @ _fingerprints(source, stream[dims]).T
    # Of layers that are one and the same, such as repeated ones, that with the target's own number comes first.
    layers = []
    for layer, row in enumerate(likeness + 1e-4 * np.eye(*likeness.shape)):
        best = int(row.argmax())
        candidates = [best] if row[best] >= _ALIKE else []
        candidates += [layer] if layer < source.dims.layers and layer not in candidates else []
        found = (_match_layer(source, target, (of, layer), stream, dims, row[of] >= _ALIKE) for of in candidates)
        layers.append(next((item for item in found if item is not None), None))
    return likeness, tuple(layers)


def _match_layer(
    source: BaseModel,
    target: BaseModel,
    layers: tuple[int, int],
    stream: np.ndarray,
    dims: np.ndarray,
    search: bool,
) -> LayerMap | None:
    """Attention and MLP of a pair of layers, each only if what reads the stream agrees as well."""
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

    def likeness(role: str, rows: np.ndarray) -> float:
        some = np.flatnonzero(rows >= 0)
        if not len(some):
            return 0.0
        some = some[even(len(some), _CHECKED)]
        src = module_rows(source, names[0][role], rows[some])[:, np.maximum(stream, 0)]
        tgt = module_rows(target, names[1][role], some)
        return abs(cosine(src[:, stream >= 0], tgt[:, stream >= 0]))

    found = {}
    neurons = columns("down_proj")
    if neurons is not None and min(likeness("up_proj", neurons), likeness("gate_proj", neurons)) >= KIN:
        found["neurons"] = neurons
    attended = columns("o_proj") if source.dims.head_dim == target.dims.head_dim else None
    if attended is not None:
        heads = head_rows(attended, source.dims, target.dims)
        queries = likeness("q_proj", heads["queries"])
        # Key heads may be none of the source's, when several were made one: that is like each of them, but less so.
        if min(likeness("k_proj", heads["keys"]), likeness("v_proj", heads["values"])) < _AS_LIKE * queries:
            heads |= {name: nothing[name] for name in ("keys", "values")}
        if queries >= KIN:
            found |= heads
    return LayerMap(layers[0], **(nothing | found)) if found else None


def _fingerprints(base: BaseModel, dims: np.ndarray) -> np.ndarray:
    """float32 (L, P): for each layer the cosines of pairs of sampled rows of o, and of down; of norm 1."""
    prints = []
    for layer in range(base.dims.layers):
        parts = []
        for role in ("o_proj", "down_proj"):
            rows = module_rows(base, f"model.layers.{layer}.{ROLE_PATHS[role]}", dims)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
            products = (units @ units.T)[np.triu_indices(len(dims), 1)]
            products -= products.mean() if products.size else 0
            parts.append(products / max(float(np.linalg.norm(products)), np.finfo(np.float32).tiny))
        prints.append(np.concatenate(parts) / np.sqrt(2))
        base.release()
    return np.stack(prints)


def cosine(src: np.ndarray, tgt: np.ndarray) -> float:
    """Of two matrices as vectors; 1 for two of zeros, 0 if only one is."""
    norms = float(np.linalg.norm(src.astype(np.float64))), float(np.linalg.norm(tgt.astype(np.float64)))
    if not (norms[0] and norms[1]):
        return float(norms[0] == norms[1])
    return float(np.sum(src.astype(np.float64) * tgt)) / (norms[0] * norms[1])
