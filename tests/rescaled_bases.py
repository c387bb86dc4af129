"""Change the scales of channels of tiny bases of any family, so that they compute the same, as AWQ and SmoothQuant do.

What reads a norm is listed here by the names of tensors, and not taken from the package: tests check that the changed
base computes the same.
"""

import re

import numpy as np
from relatives import Made, layer_of

from jcrosslora.checkpoint import FAMILIES

# Norm -> what reads it, as ends of names in a layer.
_ATTENTION = r"self_attn\.(q|k|v|qkv|q_a)_proj|kv_a_proj_with_mqa|linear_attn\.(in_proj_\w+|[qkvgba]_proj)|in_proj"
_ROUTERS = r"(mlp|block_sparse_moe|feed_forward)\.gate|router|shared_expert_gate"
_MLP = rf"(gate|up|gate_up)_proj|w1|w3|c_fc|{_ROUTERS}"
_INSIDE = {
    r"self_attn\.q_a_layernorm": r"q_b_proj",
    r"self_attn\.kv_a_layernorm": r"kv_b_proj",
    r"linear_attn\.(o_)?norm": r"linear_attn\.(o|out)_proj",
    r"mamba\.norm": r"mamba\.out_proj",
}
# Of Gemma 4, whose experts and router read the stream through others than the MLP.
_APART = {"pre_feedforward_layernorm_2": r"experts\.gate_up_proj", r"router\.scale": r"router\.proj"}
_DENSE = r"mlp\.(gate|up)_proj"
# What divides its rows -> what multiplies its columns: ends of names that begin alike.
_BETWEEN = {
    "self_attn.v_proj": "self_attn.o_proj",
    "self_attn.qkv_proj": "self_attn.o_proj",
    "self_attn.kv_b_proj": "self_attn.o_proj",
    "self_attn.v_proj ": "self_attn.out_proj",
    "conv.in_proj": "conv.out_proj",
    "up_proj": "down_proj",
    "gate_up_proj": "down_proj",
    "w3": "w2",
}


def rescale(made: Made, spread: float, *, norms=True, modules=True, layers=None, signs=False, seed: int = 9) -> Made:
    """Scale channels of a base.

    Args:
        made: the base.
        spread: standard deviation of the logarithms of the scales.
        norms: whether scales move from norms to what reads them.
        modules: whether scales move from modules, and matrices of experts, to others.
        layers: those that are changed; None for all.
        signs: whether scales may be negative.
        seed: of the scales.
    """
    return _Rescaler(made, spread, signs, seed).run(norms, modules, layers)


class _Rescaler:
    def __init__(self, made, spread, signs, seed):
        self.made, self.spread, self.signs = made, spread, signs
        self.rng, self.tensors = np.random.default_rng(seed), dict(made.tensors)
        self.family = FAMILIES[made.config["model_type"]]

    def run(self, norms, modules, layers):
        for layer in range(self.made.size("num_hidden_layers")):
            if layers is not None and layer not in layers:
                continue
            self.prefix = f"model.layers.{layer}."
            self.names = [name for name in self.tensors if layer_of(name) == layer]
            if norms:
                self._norms()
            if modules:
                self._modules()
        return Made(self.made.config, {name: x.astype(np.float32) for name, x in self.tensors.items()})

    def _draw(self, size):
        found = np.exp(self.spread * self.rng.normal(size=size))
        return found * self.rng.choice([-1, 1], size) if self.signs else found

    def _named(self, pattern):
        return [name for name in self.names if re.search(rf"(^|\.)({pattern})(\.weight)?$", name)]

    def _norms(self):
        parallel, places = self.family.parallel, self.family.norms
        mlp = _DENSE if self._named(next(iter(_APART))) else _MLP
        pairs = {places.get("attn"): f"{_ATTENTION}|{mlp}" if parallel else _ATTENTION}
        pairs |= {} if parallel else {places.get("mlp"): mlp}
        for norm, readers in (*pairs.items(), *_INSIDE.items(), *_APART.items()):
            found = self._named(norm) if norm else []
            # A hybrid calls the norm after attention as that before an MLP.
            after = norm in pairs and norm == places.get("attn_post") and self._named("post_feedforward_layernorm")
            if not found or after:
                continue
            own = self.family.gain_offset if norm in pairs else 0.0
            factors = self._draw(len(self.tensors[found[0]]))
            self.tensors[found[0]] = (self.tensors[found[0]] + own) / factors - own
            if (bias := f"{found[0].removesuffix('.weight')}.bias") in self.tensors:
                self.tensors[bias] = self.tensors[bias] / factors
            for name in self._named(readers):
                self._scale(name, np.ones(1), np.tile(factors, self._matrix(name).shape[-1] // len(factors)))

    def _matrix(self, name):
        """Return a matrix (O, I), or those of all experts (E, O, I)."""
        x, rules = self.tensors[name], self.family.experts
        return x.swapaxes(-1, -2) if rules is not None and name.removeprefix(self.prefix) in rules.transposed else x

    def _scale(self, name, rows, columns):
        scaled = self._matrix(name) * rows[..., :, None] * columns[..., None, :]
        self.tensors[name] = scaled if self._matrix(name) is self.tensors[name] else scaled.swapaxes(-1, -2)

    def _modules(self):
        for first, second in _BETWEEN.items():
            first = first.strip()
            for name in [one for one in self.names if one.removesuffix(".weight").endswith(f".{first}")]:
                other = name.replace(first, second)
                clamped = self.family.experts is not None and self.family.experts.clamp and "experts" in name
                gated = "up_proj" not in first or "gate_up" in first or name.replace(first, "gate_proj") in self.tensors
                normed = "gemma4" in self.family.name and "v_proj" in name
                if other in self.tensors and gated and not clamped and not normed:
                    self._between(name, other, self._rows(first, name))

    def _rows(self, first, name):
        """Return the rows of a matrix that have a scale each: (heads, features)."""
        rows, config = np.arange(self._matrix(name).shape[-2]), self.made.config
        if first == "gate_up_proj":
            return rows[len(rows) // 2 :][None]
        if first == "conv.in_proj":
            return np.split(rows, 3)[1][None]
        if first == "self_attn.kv_b_proj":
            return rows.reshape(config["num_attention_heads"], -1)[:, config["qk_nope_head_dim"] :]
        if first in ("self_attn.v_proj", "self_attn.qkv_proj"):
            size = config["num_key_value_heads"] * config["head_dim"]
            return rows[-size:].reshape(-1, config["head_dim"])
        return rows[None]

    def _between(self, name, other, rows):
        shape = self._matrix(name).shape[:-1]
        factors = self._draw((*shape[:-1], *rows.shape))
        scales = np.ones(shape)
        scales[..., rows] = factors
        self._scale(name, 1 / scales, np.ones(1))
        if (bias := f"{name.removesuffix('.weight')}.bias") in self.tensors:
            self.tensors[bias] = self.tensors[bias] / scales
        served = self._matrix(other).shape[-1] // rows.size
        self._scale(other, np.ones(1), np.repeat(factors, served, axis=-2).reshape(*shape[:-1], -1))
