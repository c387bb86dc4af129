"""Weights, configuration and tokenizer of a base that a program already holds, brought into the form of files."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jcrosslora.errors import CheckpointError

# What PEFT puts between the name of a module that it wraps and the module's own parameters.
_PEFT_PREFIX = "base_model.model."
_PEFT_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})


def is_live_model(weights: Any) -> bool:
    """Whether an object is a model of transformers or PEFT, or one that looks like it."""
    return callable(getattr(weights, "state_dict", None)) and hasattr(weights, "config")


def flat_weights(weights: Any, ref: str) -> dict[str, Any]:
    """Bring weights into one mapping from Hugging Face name to array.

    Args:
        weights: a live model, an `nnx.State`, or mappings nested to any depth, whose keys are joined by ".".
        ref: names the base in errors.

    Raises:
        CheckpointError: a name that occurs twice, or adapters that are merged into the weights of a live model.
    """
    if is_live_model(weights):
        _check_not_merged(weights, ref)
        weights = weights.state_dict()
    pairs = list(_flatten(weights, ()))
    flat = _without_peft(pairs)
    if len(flat) != len({name for name, _ in flat}):
        msg = f"{ref}: two tensors have one name when the keys of the nested weights are joined by '.': rename one"
        raise CheckpointError(msg)
    return dict(flat)


def _flatten(weights: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(weights, Mapping):
        for key, value in weights.items():
            yield from _flatten(value, (*prefix, str(key)))
    elif isinstance(weights, list | tuple):
        for index, value in enumerate(weights):
            yield from _flatten(value, (*prefix, str(index)))
    else:  # A variable of flax holds its array.
        yield ".".join(prefix), weights.get_value() if hasattr(weights, "get_value") else weights


def _without_peft(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Drop the parameters of adapters; those of the modules that they wrap get their plain names."""
    split = [(name.removeprefix(_PEFT_PREFIX).split("."), value) for name, value in pairs]
    wrapped = {tuple(parts[:i]) for parts, _ in split for i, part in enumerate(parts) if part in _PEFT_WRAPPERS}

    def is_base(parts: list[str]) -> bool:
        return all(tuple(parts[:i]) not in wrapped or part in _PEFT_WRAPPERS for i, part in enumerate(parts))

    return [
        (".".join(part for part in parts if part not in _PEFT_WRAPPERS), value)
        for parts, value in split
        if is_base(parts)
    ]


def _check_not_merged(model: Any, ref: str) -> None:
    for name, module in model.named_modules() if hasattr(model, "named_modules") else ():
        if getattr(module, "merged_adapters", None):
            msg = f"{ref}: an adapter is merged into the weights of {name}: call unmerge_adapter() first"
            raise CheckpointError(msg)


def config_values(config: Any, ref: str) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: a mapping, or a configuration of transformers.
        ref: names the base in errors.

    Raises:
        CheckpointError: anything else.
    """
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if isinstance(values, Mapping):
        return dict(values)
    msg = f"{ref}: config is {'missing' if config is None else f'of type {type(config).__name__}'}, wanted "
    raise CheckpointError(msg + "the content of config.json as a mapping, or a configuration of transformers")


def tokenizer_folder(tokenizer: Any, owner: object, ref: str) -> Path | None:
    """Return a folder that holds tokenizer.json; a tokenizer in memory is written to a temporary one.

    Args:
        tokenizer: a folder, a tokenizer.json, a fast tokenizer of transformers, a `tokenizers.Tokenizer`, or None.
        owner: a temporary folder is removed when this object is.
        ref: names the base in errors.

    Raises:
        CheckpointError: anything else, or a path without tokenizer.json.
    """
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer).expanduser()
        folder = path.parent if path.name == "tokenizer.json" else path
        if (folder / "tokenizer.json").is_file():
            return folder
        msg = f"{ref}: {path} is neither a tokenizer.json nor a folder that holds one"
        raise CheckpointError(msg)
    if not hasattr(tokenizer, "backend_tokenizer") and not hasattr(tokenizer, "to_str"):
        msg = f"{ref}: tokenizer is of type {type(tokenizer).__name__}, wanted a folder, a tokenizer.json, a fast "
        raise CheckpointError(msg + "tokenizer of transformers, or a tokenizers.Tokenizer")
    folder = Path(tempfile.mkdtemp(prefix="jcrosslora-tokenizer-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer.save_pretrained(str(folder))  # with its end-of-text token and its chat template
    else:
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder
