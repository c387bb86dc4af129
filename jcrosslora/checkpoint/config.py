"""A model's configuration: find its family, and refuse unknown settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jcrosslora.architectures import FAMILIES, Dims, Family
from jcrosslora.architectures.config import COMMON_KEYS, HARMLESS_KEYS, check_multiple, size
from jcrosslora.architectures.families import UNSUPPORTED
from jcrosslora.checkpoint.quantised import check_quantization
from jcrosslora.checkpoint.store import FileNames, errors_of, read_json_object, refuse_not_finite
from jcrosslora.checkpoint.wrapped import TENSOR_PREFIXES, WRAPPERS, Wrapper, is_empty, refuse_unknown, text_config
from jcrosslora.errors import CheckpointError
from jcrosslora.utils.texts import shortened

_SIZE_LIMIT = 1 << 31
# Files with the quantisation settings of older writers, AutoGPTQ and AutoAWQ.
_SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_UNBOUNDED = ("time_step_limit",)  # its upper limit is infinite in nearly all files


@dataclass(frozen=True)
class ModelConfig:
    """A checked configuration.

    Attributes:
        values: the configuration of the (text) model, Hugging Face keys.
        wrapper: the multimodal class around the text model; None for a text-only model.
    """

    family: Family
    values: Mapping[str, Any]
    wrapper: Wrapper | None = None

    @property
    def names(self) -> FileNames:
        """The mapping from tensor names in the checkpoint to the text model's."""
        prefixes = self.family.stored.tensor_prefixes() if self.wrapper is None else TENSOR_PREFIXES
        return FileNames(prefixes, self.family.stored.modules)


def read_config(folder: Path) -> ModelConfig:
    """Read and check `config.json` of a folder.

    Raises CheckpointError if there is none, it is not JSON, or `check_config` refuses it.
    """
    path = folder / "config.json"
    if path.exists():
        config = read_json_object(path)
        for name, method in _SETTINGS_FILES.items():
            if not config.get("quantization_config") and (folder / name).exists():
                config["quantization_config"] = {"quant_method": method, **read_json_object(folder / name)}
        return check_config(config, path)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: is an adapter (adapter_config.json), where a base model was expected")
    msg = f"{folder}: has no config.json: give the folder of a base model, a .gguf file or a hub id"
    if packed := sorted(folder.glob("*.gguf")):
        msg = f"{folder}: has no config.json but a GGUF file: give the path {packed[0]}"
    raise CheckpointError(msg)


def check_config(config: Mapping[str, Any], where: Path | str) -> ModelConfig:
    """Find the family of a configuration and refuse unknown settings.

    Raises:
        CheckpointError: unknown model type, architecture or key, a number that is not finite, or a value that changes
            what the weights mean.
    """
    with errors_of(where):
        return _checked(config)


def _checked(config: Mapping[str, Any]) -> ModelConfig:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in WRAPPERS:
        return replace(_checked(text_config(config)), wrapper=WRAPPERS[model_type])
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        like, lacks = UNSUPPORTED.get(model_type, ("", "")) if isinstance(model_type, str) else ("", "")
        why = f": it is like {like}, but has what the decoder lacks: {lacks}" if like else ""
        supported = ", ".join([*FAMILIES, *WRAPPERS])
        raise CheckpointError(f"model_type {model_type!r} is not supported{why}; supported: {supported}")
    family = FAMILIES[model_type]
    if (named := config.get("architectures")) and (
        not isinstance(named, list) or not set(map(str, named)) <= set(family.architectures)
    ):
        wanted = family.architectures[0]
        raise CheckpointError(f"architectures {named!r} is not supported for {family.name}; supported: {wanted}")
    _check_keys(family, config)
    refuse_not_finite(config, but=_UNBOUNDED)
    check_quantization(config)
    values = {**family.defaults, **config}
    return ModelConfig(family, values if family.resolve is None else family.resolve(values))


def _check_keys(family: Family, config: Mapping[str, Any]) -> None:
    known = COMMON_KEYS | HARMLESS_KEYS | family.known_keys
    for key, value in config.items():
        short = shortened(repr(value))
        if key in family.fixed:
            if value is not None and value not in family.fixed[key]:
                wanted = " or ".join(map(repr, family.fixed[key]))
                raise CheckpointError(
                    f"config key {key!r}={short} is not supported for {family.name}: expected {wanted}"
                )
        elif key not in known and not is_empty(value):
            refuse_unknown(key, short, family.name)
        if key in ("hidden_act", "hidden_activation") and not isinstance(value, str | None):
            raise CheckpointError(f"config key {key!r}={short} is not the name of an activation")


def read_dims(model: ModelConfig, where: Path | str) -> Dims:
    """Read the sizes of a model from its configuration.

    Raises CheckpointError if a size is missing, or is not a positive integer.
    """
    config, width, read = model.values, model.family.width(model.values), partial(size, limit=_SIZE_LIMIT)
    with errors_of(where):
        hidden, heads = read(config, "hidden_size"), read(config, "num_attention_heads")
        config = {
            **config,
            "head_dim": config.get("head_dim") or max(hidden // heads, 1),
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
        }
        dims = Dims(
            layers=read(config, "num_hidden_layers"),
            hidden=hidden,
            intermediate=read(config, width),
            heads=heads,
            kv_heads=read(config, "num_key_value_heads"),
            head_dim=read(config, "head_dim"),
            vocab=read(config, "vocab_size"),
        )
        check_multiple("num_attention_heads", heads, "num_key_value_heads", dims.kv_heads)
    return dims
