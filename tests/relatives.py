"""Make tiny bases of several families and change them: prune, permute, merge, train, round."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from checkpoint_files import write_safetensors
from gguf_files import converted, gguf, gguf_name, write_gguf

from jcrosslora.architectures.architecture import Architecture
from jcrosslora.checkpoint import FAMILIES, BaseModel, check_config, expected_shapes, open_base, read_dims

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
ATTENTION_ROWS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}


@dataclasses.dataclass(frozen=True)
class Made:
    """The configuration and tensors of a base in memory."""

    config: dict
    tensors: dict[str, np.ndarray]

    def change(self, change: Callable[[str, np.ndarray], np.ndarray], **config) -> "Made":
        return Made(self.config | config, {name: change(name, x) for name, x in self.tensors.items()})

    def rounded(self, dtype: str) -> "Made":
        """Round all tensors to a float format; other formats leave them unchanged."""
        kind = DTYPES.get(dtype, np.float32)
        return self.change(lambda _, x: x.astype(kind).astype(np.float32))

    def quantised(self, kind: str) -> "Made":
        """Round every matrix as a GGUF quantisation does."""
        quant = gguf.GGMLQuantizationType[kind]
        return self.change(
            lambda _, x: gguf.quants.dequantize(gguf.quants.quantize(x, quant), quant) if x.ndim == 2 else x
        )

    def size(self, key: str) -> int:
        return self.config[key]

    def write(self, folder: Path, dtype: str = "F32") -> BaseModel:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        stored = {name: (dtype, x.astype(DTYPES[dtype])) for name, x in self.tensors.items()}
        write_safetensors(folder / "model.safetensors", stored)
        return open_base(folder)

    def write_gguf(self, path: Path, kind: str) -> BaseModel:
        """Write a GGUF file as llama.cpp's converter and quantiser do."""
        path.parent.mkdir(parents=True, exist_ok=True)
        heads = self.size("num_attention_heads"), self.size("num_key_value_heads")
        stored = {
            gguf_name(name, "llama"): (
                converted(name, x, "llama", heads),
                gguf.GGMLQuantizationType[kind] if x.ndim == 2 else None,
            )
            for name, x in self.tensors.items()
        }
        metadata = {
            "block_count": self.size("num_hidden_layers"),
            "context_length": 64,
            "embedding_length": self.size("hidden_size"),
            "feed_forward_length": self.size("intermediate_size"),
            "attention.head_count": heads[0],
            "attention.head_count_kv": heads[1],
            "attention.key_length": self.size("head_dim"),
            "attention.value_length": self.size("head_dim"),
            "rope.dimension_count": self.size("head_dim"),
            "attention.layer_norm_rms_epsilon": 1e-6,
        }
        return open_base(write_gguf(path, "llama", metadata, stored))


def make(family: str = "llama", *, seed: int = 0, **changes) -> Made:
    """Make a random base with decaying singular values, as trained ones have."""
    config = {
        "model_type": family,
        "architectures": list(FAMILIES[family].architectures[:1]),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
    } | changes
    rng = np.random.default_rng(seed)
    tensors = {}
    model = check_config(config, Path())
    layout = None if model.family.experts is None else model.family.experts.layouts[-1 if family == "gpt_oss" else 0]
    architecture = Architecture(model.family, model.values, read_dims(model, Path()))
    for name, shape in expected_shapes(architecture, layout).items():
        if len(shape) == 3 and "experts" in name:
            tensors[name] = rng.normal(size=shape) / 8
        elif len(shape) == 2:
            sizes = 1 + 2 * np.exp(-np.arange(shape[1]) / 8)
            tensors[name] = rng.normal(size=shape) @ (rng.normal(size=(shape[1], shape[1])) * sizes[:, None]) / 90
        else:
            tensors[name] = rng.uniform(0.5, 1.5, shape)
    return Made(config, {name: x.astype(np.float32) for name, x in tensors.items()})


def is_linear(name: str) -> bool:
    return "_proj.weight" in name


def role_of(name: str) -> str:
    return name.split(".")[-2]


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def noisy(size: float, *, seed: int = 7, only: Callable[[str], bool] = lambda _: True):
    """Add dense noise of a size relative to each weight, as further training does."""
    rng = np.random.default_rng(seed)

    def add(name: str, x: np.ndarray) -> np.ndarray:
        if x.ndim < 2 or not only(name):
            return x
        return (x + size * np.sqrt(np.mean(x**2)) * rng.normal(size=x.shape)).astype(np.float32)

    return lambda made: made.change(add)


def merged(rank: int, size: float, *, roles=("q_proj", "v_proj"), seed: int = 8):
    """Merge a LoRA update into some roles."""
    rng = np.random.default_rng(seed)

    def add(name: str, x: np.ndarray) -> np.ndarray:
        if not is_linear(name) or role_of(name) not in roles:
            return x
        update = rng.normal(size=(x.shape[0], rank)) @ rng.normal(size=(rank, x.shape[1]))
        return (x + size * np.linalg.norm(x) / np.linalg.norm(update) * update).astype(np.float32)

    return lambda made: made.change(add)


def scaled(factor: float):
    return lambda made: made.change(lambda name, x: np.float32(factor) * x if is_linear(name) else x)


def rescaled(spread: float, *, seed: int = 9):
    """Scale channels as AWQ does: a norm and the columns behind it, up and down, v and o.

    The model computes the same. `spread` is the standard deviation of the logarithm of the scales.
    """
    rng = np.random.default_rng(seed)

    def build(made: Made) -> Made:
        tensors = dict(made.tensors)
        offset = FAMILIES[made.config["model_type"]].gain_offset

        def scale(name: str, factors: np.ndarray) -> None:
            tensors[name] = (tensors[name] * factors).astype(np.float32)

        def draw(size: int) -> np.ndarray:
            return np.exp(spread * rng.normal(size=size))

        for layer in range(made.size("num_hidden_layers")):
            prefix = f"model.layers.{layer}."
            mlp_norm = "pre_feedforward" if f"{prefix}pre_feedforward_layernorm.weight" in tensors else "post_attention"
            reads = {"input": ("self_attn.q", "self_attn.k", "self_attn.v"), mlp_norm: ("mlp.gate", "mlp.up")}
            for norm, behind in reads.items():
                name, factors = f"{prefix}{norm}_layernorm.weight", draw(made.size("hidden_size"))
                tensors[name] = ((tensors[name] + offset) / factors - offset).astype(np.float32)
                for module in behind:
                    scale(f"{prefix}{module}_proj.weight", factors)
            for first, second in (("mlp.up", "mlp.down"), ("self_attn.v", "self_attn.o")):
                rows, columns = (
                    tensors[f"{prefix}{one}_proj.weight"].shape[side] for side, one in enumerate((first, second))
                )
                factors = draw(rows)
                scale(f"{prefix}{first}_proj.weight", 1 / factors[:, None])
                if f"{prefix}{first}_proj.bias" in tensors:
                    scale(f"{prefix}{first}_proj.bias", 1 / factors)
                heads = factors.reshape(-1, made.size("head_dim")) if columns > rows else factors[None]
                scale(f"{prefix}{second}_proj.weight", np.repeat(heads, columns // rows, axis=0).reshape(-1))
        return Made(made.config, tensors)

    return build


def with_layers(layers):
    """Take the listed layers, in this order."""

    def build(made: Made) -> Made:
        tensors = {name: x for name, x in made.tensors.items() if layer_of(name) is None}
        for new, old in enumerate(layers):
            prefix = f"model.layers.{old}."
            tensors |= {
                name.replace(prefix, f"model.layers.{new}.", 1): x
                for name, x in made.tensors.items()
                if name.startswith(prefix)
            }
        return Made(made.config | {"num_hidden_layers": len(layers)}, tensors)

    return build


def with_neurons(choose):
    """Take the neurons `choose(layer, count)`."""

    def build(made: Made) -> Made:
        def change(name, x):
            if layer_of(name) is None or ".mlp." not in name:
                return x
            index = choose(layer_of(name), made.size("intermediate_size"))
            return x[:, index] if role_of(name) == "down_proj" else x[index]

        found = made.change(change)
        return Made(found.config | {"intermediate_size": len(choose(0, made.size("intermediate_size")))}, found.tensors)

    return build


def with_heads(choose, within=lambda layer, size: np.arange(size)):
    """Take the heads `choose(layer, groups, served)`, (groups, heads of each); `within` orders the values of a head."""

    def build(made: Made) -> Made:
        groups, size = made.size("num_key_value_heads"), made.size("head_dim")
        served = made.size("num_attention_heads") // groups

        def change(name, x):
            if layer_of(name) is None or "self_attn" not in name or role_of(name).endswith("norm"):
                return x
            chosen = np.asarray(choose(layer_of(name), groups, served))
            role, inside = role_of(name), within(layer_of(name), size)
            heads = chosen[:, 0] // served if role in ("k_proj", "v_proj") else chosen.reshape(-1)
            order = inside if role in ("v_proj", "o_proj") else np.arange(size)
            index = (heads[:, None] * size + order).reshape(-1)
            return x[:, index] if role == "o_proj" else x[index]

        chosen = np.asarray(choose(0, groups, served))
        return made.change(change, num_attention_heads=chosen.size, num_key_value_heads=len(chosen))

    return build


def with_stream(index):
    """Take these dimensions of the residual stream, in this order."""

    def change(name, x):
        if is_linear(name) and role_of(name) in ("o_proj", "down_proj"):
            return x[index]
        if x.ndim == 2:
            return x[:, index]
        return x if "proj" in name or x.size == 16 else x[index]

    return lambda made: made.change(change, hidden_size=len(index))


def with_tokens(index):
    def change(name, x):
        return x[index] if name in ("model.embed_tokens.weight", "lm_head.weight") else x

    return lambda made: made.change(change, vocab_size=len(index))


def then(*steps):
    """Apply changes one after the other."""

    def build(made: Made) -> Made:
        for step in steps:
            made = step(made)
        return made

    return build


def shuffled(count: int, seed: int, keep: int | None = None) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)[:keep]


def subset(count: int, seed: int, keep: int) -> np.ndarray:
    return np.sort(shuffled(count, seed, keep))
