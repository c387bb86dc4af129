"""Convert the weights, configuration and tokenizer of a model in memory to the form that file readers return."""

import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.architectures.config import FULL, SLIDING
from jcrosslora.checkpoint.safetensors import DTYPE_CODES, DTYPES
from jcrosslora.checkpoint.store import FileNames, TensorStore
from jcrosslora.errors import CheckpointError

# Names that PEFT adds: a prefix, and parts between a wrapped module's name and its parameters.
_PEFT_PREFIX = "base_model.model."
_PEFT_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})


def is_live_model(weights: Any) -> bool:
    """Tell whether an object is, or looks like, a transformers or PEFT model."""
    return callable(getattr(weights, "state_dict", None)) and hasattr(weights, "config")


def is_nnx_model(weights: Any) -> bool:
    """Tell whether an object is a `flax.nnx` module; False if `flax.nnx` was never imported."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(weights, nnx.Module)


def flat_weights(weights: Any, names: FileNames, ref: str) -> dict[str, Any]:
    """Flatten weights into one mapping from tensor name in the text model to array.

    The weights are a live model, an `nnx.State`, or mappings nested to any depth, whose keys are joined by ".".

    Raises CheckpointError if a name occurs twice, or adapters are merged into the weights of a live model.
    """
    if is_live_model(weights):
        for name, module in weights.named_modules() if hasattr(weights, "named_modules") else ():
            if getattr(module, "merged_adapters", None):
                msg = f"{ref}: an adapter is merged into the weights of {name}: call unmerge_adapter() first"
                raise CheckpointError(msg)
        weights = weights.state_dict()
    flat = _without_peft(list(flatten(weights)))
    if len(flat) != len({name for name, _ in flat}):
        msg = f"{ref}: two tensors have one name when the keys of the nested weights are joined by '.': rename one"
        raise CheckpointError(msg)
    held = dict(flat)
    return {name: _joined([held[part] for part in parts]) for name, parts in names.parts(held).items()}


def flatten(weights: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, lists and `nnx` states by their keys, joined by dots."""
    if isinstance(weights, Mapping):
        for key, value in weights.items():
            yield from flatten(value, (*prefix, str(key)))
    elif isinstance(weights, list | tuple):
        for index, value in enumerate(weights):
            yield from flatten(value, (*prefix, str(index)))
    else:  # A variable of flax holds its array.
        yield ".".join(prefix), weights.get_value() if hasattr(weights, "get_value") else weights


def named_arrays(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the arrays of a nested mapping or an `nnx.State` by their keys, joined by dots."""
    return {array_name([name]): array for name, array in flatten(tree)}


def array_name(keys: Iterable[str]) -> str:
    """Join the keys of an array with dots, without the last key `value` of an `nnx` variable."""
    return ".".join(keys).removesuffix(".value")


def _joined(arrays: Sequence[Any]) -> Any:
    """Return a single array unchanged, or several concatenated along the rows as a numpy array."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([_to_numpy(array) for array in arrays])


def _without_peft(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Drop adapter parameters, and give the parameters of wrapped modules their plain names."""
    split = [(name.removeprefix(_PEFT_PREFIX).split("."), value) for name, value in pairs]
    wrapped = {tuple(parts[:i]) for parts, _ in split for i, part in enumerate(parts) if part in _PEFT_WRAPPERS}
    return [
        (".".join(part for part in parts if part not in _PEFT_WRAPPERS), value)
        for parts, value in split
        if all(tuple(parts[:i]) not in wrapped or part in _PEFT_WRAPPERS for i, part in enumerate(parts))
    ]


def config_values(config: Any, ref: str) -> dict[str, Any]:
    """Return the content of config.json from a mapping, a configuration of transformers, or a ModelConfig of tunix."""
    if type(config).__module__.startswith("tunix.models."):
        return _of_tunix(config, ref)
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if isinstance(values, Mapping):
        return {key: value for key, value in values.items() if not _of_gguf(key, value)}
    msg = f"{ref}: config is {'missing' if config is None else f'of type {type(config).__name__}'}, expected "
    raise CheckpointError(msg + "the content of config.json as a mapping, or a configuration of transformers")


def _of_gguf(key: str, value: Any) -> bool:
    """Tell whether a key marks a model that transformers read from GGUF, whose weights are now floats."""
    quantised = key == "quantization_config" and isinstance(value, Mapping)
    return key == "_model_name_or_path" or (quantised and value.get("quant_method") == "gguf")


def tokenizer_folder(tokenizer: Any, owner: object, ref: str) -> Path | None:
    """Return a folder that holds tokenizer.json; a tokenizer in memory is written to a temporary one.

    The tokenizer is a folder, a tokenizer.json, a fast tokenizer of transformers, a `tokenizers.Tokenizer`, or None. A
    temporary folder is removed together with `owner`.

    Raises CheckpointError for anything else, and for a path without tokenizer.json.
    """
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer).expanduser()
        folder = path.parent if path.name == "tokenizer.json" else path
        if (folder / "tokenizer.json").is_file():
            return folder
        raise CheckpointError(f"{ref}: {path} is neither a tokenizer.json nor a folder that holds one")
    if not hasattr(tokenizer, "backend_tokenizer") and not hasattr(tokenizer, "to_str"):
        msg = f"{ref}: tokenizer is of type {type(tokenizer).__name__}, expected a folder, a tokenizer.json, a fast "
        raise CheckpointError(msg + "tokenizer of transformers, or a tokenizers.Tokenizer")
    folder = Path(tempfile.mkdtemp(prefix="jcrosslora-tokenizer-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer.save_pretrained(str(folder))  # with its end-of-text token and its chat template
    else:
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder


class MemoryStore(TensorStore):
    """Arrays in memory: numpy, jax or torch, on any device.

    They are neither copied nor converted until they are read, so they must not change while the base is in use.

    Raises CheckpointError for a value that is no array, holds no data, or has a dtype that cannot be read.
    """

    advice = "give Hugging Face names and weights of shape (out, in)"

    def __init__(self, arrays: Mapping[str, Any], ref: str):
        self._arrays, self._ref = dict(arrays), ref
        for name, array in arrays.items():
            if (wrong := _defect(name, array)) is not None:
                raise CheckpointError(f"{ref}: {wrong}")

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            raise CheckpointError(f"{self._ref}: the weights have no tensor {name!r}")
        return self._arrays[name]

    def names(self) -> list[str]:
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._array(name).shape)

    def dtype(self, name: str) -> str:
        """Dtype as safetensors names it, e.g. "BF16"."""
        return DTYPE_CODES[_dtype_name(self._array(name))]

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of an array on the host, a copy of one on a device."""
        return _to_numpy(self._array(name))

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): only these rows leave the device."""
        array = self._array(name)
        flat = array if len(array.shape) == 2 else array.reshape(-1, array.shape[-1])
        return _to_numpy(flat[ids]).astype(np.float32)


def _defect(name: str, array: Any) -> str | None:
    """Return why an array cannot be read."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return f"{name!r} is of type {type(array).__name__}, expected a numpy, jax or torch array"
    if getattr(array, "is_meta", False):
        return f"tensor {name!r} is on the meta device and holds no data: load the weights first"
    supported = _dtype_name(array) in DTYPE_CODES
    return None if supported else f"tensor {name!r} has dtype {_dtype_name(array)}, which is not supported"


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _to_numpy(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        dtype = DTYPES[DTYPE_CODES[_dtype_name(array)]]
        if dtype.kind == "V":  # numpy knows bfloat16 and FP8 by ml_dtypes, which torch does not: pass the bits.
            array = array.view(getattr(sys.modules["torch"], f"int{8 * dtype.itemsize}"))
        array = array.numpy().view(dtype)
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
_GEMMA = {"rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"}
_PERIOD = 6  # the last layer of each period of Gemma 3 has full attention


def _of_tunix(config: Any, where: str) -> dict[str, Any]:
    """Return the content of config.json from the ModelConfig of a class of tunix (0.1.7).

    What the class fixes (Gemma's epsilon, bases of positions, the layers with windows) is written out. That of Llama
    does not tell how positions are scaled, so it cannot be translated.

    Raises CheckpointError for a class that does not tell everything, or that is not known.
    """
    name = type(config).__module__.split(".")[2]
    if name not in _CLASSES or getattr(config, "num_experts", None) is not None:
        why = "does not state how positions are scaled" if name == "llama3" else "is not one that can be translated"
        msg = f"{where}: the ModelConfig of tunix's {name} {why}: give config=, the content of the model's config.json"
        raise CheckpointError(msg)
    return {key: getattr(config, stated) for key, stated in _SIZES.items()} | _CLASSES[name](config)


def _qwen(config: Any, family: str) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.use_tied_embedding,
    }


def _gemma(config: Any) -> dict[str, Any]:
    stated = {"vocab_size": config.num_embed, "rope_theta": 10_000.0, **_GEMMA}
    if not config.use_post_attn_norm:
        return stated | {"model_type": "gemma"}
    return stated | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": config.head_dim,
        "final_logit_softcapping": config.final_logit_softcap,
        "attn_logit_softcapping": config.attn_logits_soft_cap,
        "sliding_window": config.sliding_window_size,
        "layer_types": [SLIDING if kind.name == "LOCAL_SLIDING" else FULL for kind in config.attention_types],
    }


def _gemma3(config: Any) -> dict[str, Any]:
    by_width = config.query_pre_attn_norm.name == "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS"
    full, local = (
        {"rope_type": "linear", "factor": float(factor), "rope_theta": float(theta)}
        for factor, theta in (
            (config.global_scale_factor, config.global_base_frequency),
            (config.local_scale_factor, config.local_base_frequency),
        )
    )
    return {
        "model_type": "gemma3_text",
        "vocab_size": config.num_embed,
        "query_pre_attn_scalar": config.embed_dim // config.num_heads if by_width else config.head_dim,
        "sliding_window": config.sliding_window_size,
        "layer_types": [FULL if (n + 1) % _PERIOD == 0 else SLIDING for n in range(config.num_layers)],
        "rope_parameters": {FULL: full, SLIDING: local},
        **_GEMMA,
    }


_CLASSES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "qwen2": lambda config: _qwen(config, "qwen2"),
    "qwen3": lambda config: _qwen(config, "qwen3"),
    "gemma": _gemma,
    "gemma3": _gemma3,
}
