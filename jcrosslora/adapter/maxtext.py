"""Convert the LoRA arrays of MaxText to tunix's names and to Hugging Face's order of features.

MaxText applies qwix to its own models. It stacks the layers of one kind along axis 1 (`scan_layers`), a (I, L, K) and
b (K, L, O), or numbers them. Its models differ from Hugging Face's in two ways that affect a LoRA:

- queries of some families are not divided by sqrt(D) in attention: 1 / sqrt(D) is part of the weights;
- Llama 3.1 rotates neighbouring features of a head, Hugging Face those that are D / 2 apart.

Source: MaxText 0.2.5, layers/attentions.py, layers/embeddings.py, utils/lora_utils.py, and the tables of
checkpoint_conversion/utils/param_mapping.py; its export of an adapter leaves out both.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError

# Family -> whether the weights of its queries hold 1 / sqrt(D).
_SCALED = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), True),
    **dict.fromkeys(("qwen2", "qwen3", "gemma3_text"), False),
}
_PAIRS = "gemma2"  # each MaxText layer is two layers, one with a sliding window and one without
_BLOCKS, _PERIOD = "gemma3_text", 6  # whose scanned layers are numbered within the period of its windows
_PARAMETERS = {
    **{f"self_attention.{role}": f"attn.{role[0]}_proj.w" for role in ("query", "key", "value")},
    "self_attention.out": "attn.o_proj.w",
    **{"mlp.wi_0": "mlp.gate_proj.kernel", "mlp.wi_1": "mlp.up_proj.kernel", "mlp.wo": "mlp.down_proj.kernel"},
}
_DECODER = re.compile(r"(?:(?:params|base)\.)*decoder\.(.+)")
_LAYER = re.compile(
    r"(?:layers|layers[._](?P<layer>\d+)|layers\.layers_(?P<block>\d+)|layers_remainder\.layers_(?P<rest>\d+))"
    r"\.(?P<part>self_attention|mlp)(?:_(?P<pair>local|global))?\.(?P<role>\w+)\.kernel"
)


def is_maxtext(names: Iterable[str]) -> bool:
    """Return whether the names of arrays, keys joined by dots, are from a MaxText model."""
    return any(map(_DECODER.match, names))


def as_tunix(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], base: BaseModel | None, stated: Mapping[str, Any], where: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split stacked layers, and undo MaxText's scaling of queries and its feature order of queries and keys.

    Args:
        pairs: a and b of each parameter, by its keys, joined by dots.
        base: the model that it was trained on.
        stated: may hold the `rope_type` of the training; else the base's is used.
        where: names the source of the arrays in messages.

    Returns:
        a (I, K) and b (K, O) of each matrix, by tunix's name of the parameter. b of scaled queries is float32.

    Raises:
        AdapterError: no base, an unsupported base or RoPE type, an unknown parameter, or shapes that do not fit the
            base.
    """
    if base is None:
        msg = f"{where}: LoRA of MaxText is read by the heads, layers and positions of its base: give the base that it "
        raise AdapterError(msg + "was trained on (--base, base=...)")
    if base.family.name not in _SCALED:
        msg = f"{where}: LoRA of MaxText is read for {', '.join(_SCALED)}, and the base is of {base.family.name}: "
        raise AdapterError(msg + "merge it with MaxText's to_huggingface.py, and run 'jcrosslora extract'")
    if base.family.name == _PAIRS and base.config.get("query_pre_attn_scalar", 256) != base.dims.head_dim:
        msg = f"{where}: the two converters of MaxText scale the queries of this size of Gemma 2 differently, and the "
        raise AdapterError(msg + "arrays do not tell which was used: merge it, and run 'jcrosslora extract'")
    neighbours = _rotates_neighbours(base, stated, where)
    found = {}
    for name, (a, b) in pairs.items():
        match = _LAYER.fullmatch(_DECODER.sub(r"\1", name))
        layers = _layers(match, base) if match else ()
        if match is None or not layers or (parameter := _PARAMETERS.get(f"{match['part']}.{match['role']}")) is None:
            msg = f"{where}: the LoRA of {name} is not known for {base.family.name}; what is read are "
            raise AdapterError(msg + f"{', '.join(_PARAMETERS)} of layers: train on these alone")
        stacked = match["layer"] is None and match["rest"] is None
        if stacked and not (a.ndim > 2 and b.ndim > 2 and a.shape[1] == b.shape[1] == len(layers)):
            msg = f"{where}: the LoRA of {name} has the shapes {list(a.shape)} and {list(b.shape)}; "
            msg += f"expected {len(layers)} layers of the base along axis 1: give its base, and train with "
            raise AdapterError(msg + "param_scan_axis=1")
        for at, layer in enumerate(layers):
            one = (a[:, at], b[:, at]) if stacked else (a, b)
            found[f"layers.{layer}.{parameter}"] = _matrix(
                f"{layer}.{parameter}", *one, base, where, neighbours=neighbours
            )
    return found


def _layers(match: re.Match[str], base: BaseModel) -> Sequence[int]:
    """Return the layers of the base that a parameter holds; empty if MaxText has no such parameter for its family."""
    count, family = base.dims.layers, base.family.name
    whole = count - count % _PERIOD
    if (family == _PAIRS) != (match["pair"] is not None) or (family != _BLOCKS and (match["block"] or match["rest"])):
        return ()
    if match["block"] is not None:
        return range(int(match["block"]), whole, _PERIOD)
    if match["rest"] is not None:
        return range(whole + int(match["rest"]), count)[:1]
    step, first = (2, ("local", "global").index(match["pair"])) if match["pair"] else (1, 0)
    every = range(first, count, step)
    if match["layer"] is not None:
        return every[int(match["layer"]) :][:1]
    return () if family == _BLOCKS else every


def _matrix(
    name: str, a: np.ndarray, b: np.ndarray, base: BaseModel, where: str, *, neighbours: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return a (I, K) and b (K, O) of a matrix; `name` is its layer and tunix's name of the parameter."""
    layer, part, role, _ = name.split(".")
    part = "self_attn" if part == "attn" else part
    rows, columns = base.modules[f"model.layers.{layer}.{part}.{role}"].shape
    rank = a.shape[-1]
    if a.size != columns * rank or b.size != rank * rows:
        msg = f"{where}: the LoRA of {name} has the shapes {list(a.shape)} and {list(b.shape)}, and that of the base "
        raise AdapterError(msg + f"({columns}, {rank}) and ({rank}, {rows}): give the base that it was trained on")
    a, b = a.reshape(columns, rank), b.reshape(rank, rows)
    if role in ("q_proj", "k_proj") and neighbours:
        b = b.reshape(rank, -1, base.dims.head_dim // 2, 2).swapaxes(-1, -2).reshape(rank, rows)
    if role == "q_proj" and _SCALED[base.family.name]:
        b = b.astype(np.float32) * np.float32(base.dims.head_dim**0.5)
    return a, b


def _rotates_neighbours(base: BaseModel, stated: Mapping[str, Any], where: str) -> bool:
    """Return whether MaxText rotates neighbouring features, as it does only for Llama with Llama 3.1's RoPE."""
    rope = base.config.get("rope_parameters") or base.config.get("rope_scaling") or {}
    kind = stated.get("rope_type", rope.get("rope_type", rope.get("type", "default")))
    if kind not in ("default", "linear", "llama3", "llama3.1"):
        msg = f"{where}: with positions of type {kind!r} MaxText orders the features of heads by rope_interleave, "
        raise AdapterError(msg + "which the arrays do not tell: merge it, and run 'jcrosslora extract'")
    return base.family.name == "llama" and kind.startswith("llama3")
