"""How tunix names and shapes the parameters of its models, by the modules and tensors of Hugging Face that they hold.

Matrices are x W, with the heads of attention as an axis, and the parameter of an einsum holds several. Norms and biases
are as in Hugging Face, and so is the order of heads and of rows. A parameter that qwix quantised is replaced by its
parts, see `parameters.py`.

Sources: tunix 0.1.7, the model and params files of its models; qwix 0.1.8, providers/lora.py and providers/ptq.py.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from jcrosslora.architectures import Family
from jcrosslora.architectures.blocks import EMBEDDING, HEAD
from jcrosslora.errors import CheckpointError

LORA_FACTOR = re.compile(r"(.+)_lora_([ab])")
_Q, _K, _V, _O = (f"self_attn.{role}_proj" for role in "qkvo")
# Parameter of a layer -> the modules of the layer whose matrices it holds, in order.
Layout = Mapping[str, tuple[str, ...]]
_MLP: Layout = {f"mlp.{role}_proj.kernel": (f"mlp.{role}_proj",) for role in ("gate", "up", "down")}
PROJECTIONS: Layout = {f"attn.{role}_proj.w": (f"self_attn.{role}_proj",) for role in "qkvo"} | _MLP
_EINSUMS: Layout = {"attn.q_einsum.w": (_Q,), "attn.kv_einsum.w": (_K, _V), "attn.attn_vec_einsum.w": (_O,)} | _MLP
_ONE_EINSUM: Layout = {"attn.qkv_einsum.w": (_Q, _K, _V), "attn.attn_vec_einsum.w": (_O,)} | _MLP
MATRICES: Layout = PROJECTIONS | _EINSUMS | _ONE_EINSUM
# Family -> the layout of its class in tunix, and the one where each query head has its own key head.
TUNIX: Mapping[str, tuple[Layout, Layout]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3"), (PROJECTIONS, PROJECTIONS)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), (_EINSUMS, _ONE_EINSUM)),
}
HEAD_MATRIX = "lm_head.w"
_EMBEDDER = "embedder.input_embedding"
_OUTSIDE = {_EMBEDDER: EMBEDDING, **dict.fromkeys(("final_norm.w", "final_norm.scale"))}  # None: `Family.final_norm`
# The axes of a matrix in the order (out..., in...), and how many of them are of the rows. All others have two, swapped.
_AXES: Mapping[str, tuple[tuple[int, ...], int]] = {
    **dict.fromkeys(("attn.q_proj.w", "attn.k_proj.w", "attn.v_proj.w"), ((1, 2, 0), 2)),  # (width, heads, features)
    **dict.fromkeys(("attn.o_proj.w", "attn.attn_vec_einsum.w"), ((2, 0, 1), 1)),  # (heads, features, width)
    **dict.fromkeys(("attn.q_einsum.w", "attn.kv_einsum.w", "attn.qkv_einsum.w"), ((0, 2, 1), 2)),  # (.., width, ..)
}
# Parameter of a layer -> place of the norm in `Family.norms`.
_NORMS: Mapping[str, str] = {
    **{"input_layernorm.w": "attn", "post_attention_layernorm.w": "mlp", "attn.q_norm.w": "q", "attn.k_norm.w": "k"},
    **{"pre_attention_norm.scale": "attn", "pre_ffw_norm.scale": "mlp", "post_ffw_norm.scale": "mlp_post"},
    **dict.fromkeys(("post_attn_norm.scale", "post_attention_norm.scale"), "attn_post"),
    **{"attn._query_norm.scale": "q", "attn._key_norm.scale": "k"},
}
_BIASES: Mapping[str, str] = {f"attn.{role}_bias": f"self_attn.{role}_proj.bias" for role in "qkv"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Source:
    """Where a tensor is.

    Attributes:
        place: of its matrix among those of the parameter, and how many these are.
        axes: of the matrix in the order (out..., in...); None for a tensor that is stored as Hugging Face has it.
        rows: how many of these are of the rows.
    """

    parameter: str
    place: tuple[int, int] = (0, 1)
    axes: tuple[int, ...] | None = None
    rows: int = 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the tensor in a parameter of this shape, None if the parameter cannot hold it."""
        count = self.place[1]
        if count > 1 and stored[:1] != (count,):
            return None
        shape = stored if count == 1 else stored[1:]
        if self.axes is None:
            return shape
        if len(shape) != len(self.axes):
            return None
        turned = [shape[axis] for axis in self.axes]
        return prod(turned[: self.rows]), prod(turned[self.rows :])

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return the tensor from the array of the parameter, whose shape fits: a view if numpy can make one."""
        shape = self.shape(array.shape)
        assert shape is not None
        matrix = array if self.place[1] == 1 else array[self.place[0]]
        return matrix if self.axes is None else matrix.transpose(self.axes).reshape(shape)


def is_tunix(names: Iterable[str]) -> bool:
    """Whether the names of arrays, keys joined by dots, are those of a model of tunix."""
    return any(name.startswith(_EMBEDDER) for name in names)


def find_sources(parameters: Iterable[str], family: Family, where: str) -> dict[str, Source]:
    """Return where each tensor of a model is, by its Hugging Face name.

    Raises:
        CheckpointError: tunix has no class for the family, or a parameter is not one of this class.
    """
    if family.name not in TUNIX:
        msg = f"{where}: tunix has a class for {', '.join(TUNIX)}, and the configuration is of {family.name}: give the "
        raise CheckpointError(msg + "config.json of this model")
    sources: dict[str, Source] = {}
    for parameter in parameters:
        found = _sources_in(parameter, family)
        if not found:
            msg = f"{where}: parameter {parameter!r} is not known for {family.name}: give the config.json of this "
            raise CheckpointError(msg + "model; experts and vision towers are not read")
        sources |= found
    return sources


def _sources_in(parameter: str, family: Family) -> dict[str, Source]:
    """Return the tensors that a parameter holds, none if it is not known."""
    if parameter in _OUTSIDE:
        return {_OUTSIDE[parameter] or f"{family.final_norm}.weight": Source(parameter)}
    if parameter == HEAD_MATRIX:
        return {HEAD: Source(parameter, axes=(1, 0))}
    match = _LAYER.fullmatch(parameter)
    if match is None:
        return {}
    prefix, name = f"model.layers.{match[1]}.", match[2]
    if name in _BIASES:
        return {prefix + _BIASES[name]: Source(parameter)}
    if (norm := family.norms.get(_NORMS.get(name, ""))) is not None:
        return {f"{prefix}{norm}.weight": Source(parameter)}
    modules = {**TUNIX[family.name][0], **TUNIX[family.name][1]}.get(name, ())
    axes, rows = _AXES.get(name, ((1, 0), 1))
    return {
        f"{prefix}{module}.weight": Source(parameter, (place, len(modules)), axes, rows)
        for place, module in enumerate(modules)
    }
