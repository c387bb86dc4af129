"""Open a base model from a folder, a GGUF file, a hub id, or objects in memory."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.architectures import Architecture, Family
from jcrosslora.architectures.blocks import EMBEDDING, HEAD
from jcrosslora.checkpoint import hub
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.config import ModelConfig, check_config, read_config, read_dims
from jcrosslora.checkpoint.gguf import open_gguf
from jcrosslora.checkpoint.in_memory import (
    MemoryStore,
    config_values,
    flat_weights,
    is_live_model,
    is_nnx_model,
    named_arrays,
    tokenizer_folder,
)
from jcrosslora.checkpoint.layout import build_modules, check_tensors, fused_modules
from jcrosslora.checkpoint.orbax import checkpoint_arrays, find_checkpoint, nearest_file
from jcrosslora.checkpoint.quantised import dequantised
from jcrosslora.checkpoint.safetensors import ShardedStore
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.checkpoint.tunix import ParameterStore, is_tunix, live_arrays
from jcrosslora.errors import CheckpointError, UsageError
from jcrosslora.utils.files import read_small_text


def open_base(
    base: Any,
    *,
    revision: str | None = None,
    name: str | None = None,
    config: Any = None,
    tokenizer: Any = None,
    chat_template: str | Path | None = None,
) -> BaseModel:
    """Open a base model and check its configuration and the shapes of its tensors; weights are read when used.

    Args:
        base: a folder with config.json and safetensors, a .gguf file, or a hub id "org/name"; a live model of
            transformers or PEFT, whose adapters are left out; or weights with Hugging Face names and matrices of
            shape (out features, in features): a mapping such as a torch `state_dict`, nested mappings, or an
            `nnx.State`. A model of tunix, whose LoRA is left out and whose quantisation by qwix is undone: a folder
            with config.json and an Orbax checkpoint, a live model, or its `nnx.State`. Weights in memory are not
            copied and must not change while the base is in use. A `BaseModel` is returned unchanged.
        revision: branch, tag or commit of a hub id. Of local files only their known commit is accepted.
        name: what adapters should name as their base; the rule without it is at `BaseModel.name`.
        config: for weights in memory, the content of config.json, a configuration of transformers, or a ModelConfig
            of tunix. A live model has its own, except tunix's Llama, whose ModelConfig is incomplete.
        tokenizer: for weights in memory, the tokenizer, needed for text: a folder, a tokenizer.json, a fast
            tokenizer of transformers, or a `tokenizers.Tokenizer`.
        chat_template: a file with a Jinja template that replaces the base's own.

    Raises:
        CheckpointError: not found, not of that revision, of an unknown family, or tensors that do not fit the
            configuration.
        UsageError: an argument that does not apply to this kind of base, or a template that cannot be read.
    """
    if chat_template is not None:
        opened = open_base(base, revision=revision, name=name, config=config, tokenizer=tokenizer)
        return replace(opened, chat_template=read_template(Path(chat_template)))
    if isinstance(base, str | Path):
        _refuse(base, "weights in memory", config=config, tokenizer=tokenizer)
        return _open_path(base, revision, name)
    if isinstance(base, BaseModel):
        _refuse(base.ref, "a base that is not open yet", revision=revision, config=config, tokenizer=tokenizer)
        return base if name is None else replace(base, name=name)
    _refuse(name or "weights in memory", "a hub id", revision=revision)
    return _open_memory(base, name, config, tokenizer)


def read_template(path: Path) -> str:
    """Read a chat template file; raise UsageError if it cannot be read or is empty."""
    try:
        text = read_small_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        msg = f"{path}: is no chat template that can be read ({reason}): give a file of Jinja source"
        raise UsageError(msg) from error
    if not text.strip():
        raise UsageError(f"{path}: holds no chat template: give a file of Jinja source")
    return text


def _refuse(ref: str | Path, wanted: str, **arguments: Any) -> None:
    if given := [argument for argument, value in arguments.items() if value is not None]:
        raise UsageError(f"{ref}: {' and '.join(given)} can be given with {wanted} only: leave it out")


def _open_path(ref: str | Path, revision: str | None, name: str | None) -> BaseModel:
    try:
        path = Path(ref).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # an unknown home, or a name that is too long
        reason = getattr(error, "strerror", None) or error
        msg = f"{str(ref)[:80]}: not a path ({reason}): give a folder, a .gguf file or a hub id of the form org/name"
        raise CheckpointError(msg) from error
    if is_folder:
        hub.check_revision(ref, path, revision)
        return _open_folder(path, str(ref), name, hub.cached_identity(path))
    if is_file:
        hub.check_revision(ref, path, revision)
        if path.suffix != ".gguf":
            msg = f"{ref}: is a file, expected a .gguf file or the folder that holds config.json and the weights"
            raise CheckpointError(msg)
        config, store, named = open_gguf(path)
        return _build(name or named or str(path), str(ref), path, None, config, store)
    if isinstance(ref, str) and hub.is_hub_id(ref):
        folder = hub.fetch(ref, revision)
        return _open_folder(folder, ref, name, (ref, folder.name))
    raise CheckpointError(f"{ref}: no such folder or file, and not a hub id of the form org/name")


def _open_folder(folder: Path, ref: str, name: str | None, identity: tuple[str, str] | None) -> BaseModel:
    if not any(folder.glob("*.safetensors")) and (checkpoint := find_checkpoint(folder)) is not None:
        return _open_checkpoint(checkpoint, folder, ref, name)
    config = read_config(folder)
    store = dequantised(ShardedStore(folder, config.names), config.values, str(folder))
    hub_id, revision = identity or (None, None)
    return _build(name or hub_id or str(folder), ref, folder, revision, config, store)


def _open_checkpoint(checkpoint: Path, folder: Path, ref: str, name: str | None) -> BaseModel:
    path = nearest_file("config.json", checkpoint, folder)
    if path is None:
        msg = f"{ref}: is a checkpoint of Orbax without config.json, which states the model's sizes: get it from the "
        raise CheckpointError(msg + f"hub, as by 'hf download ORG/NAME config.json tokenizer.json --local-dir {ref}'")
    config = read_config(path.parent)
    store = ParameterStore(checkpoint_arrays(checkpoint), config.family, ref)
    return _build(name or str(folder), ref, path.parent, None, config, store)


def _open_memory(weights: Any, name: str | None, config: Any, tokenizer: Any) -> BaseModel:
    if is_live_model(weights):
        _refuse(name or "a live model", "weights without a configuration", config=config)
        config = weights.config
        loaded = str(getattr(config, "_name_or_path", ""))
        name = name or (loaded if hub.is_hub_id(loaded) else None)
    elif is_nnx_model(weights):
        from flax import nnx

        config = getattr(weights, "config", None) if config is None else config
        weights = nnx.state(weights)
    elif not isinstance(weights, Mapping):
        msg = f"a base of type {type(weights).__name__} cannot be opened: give a folder, a .gguf file, a hub id, a "
        raise CheckpointError(msg + "live model of transformers or tunix, or a mapping from names to arrays")
    ref = name or "base in memory"
    checked = check_config(config_values(config, ref), ref)
    parameters = named_arrays(weights) if isinstance(weights, Mapping) else {}
    if is_tunix(parameters):
        store: TensorStore = ParameterStore(live_arrays(parameters), checked.family, ref)
    else:
        store = _named_store(weights, checked, ref)
    return replace(_build(ref, ref, None, None, checked, store), tokenizer_path=tokenizer_folder(tokenizer, store, ref))


def _named_store(weights: Any, config: ModelConfig, ref: str) -> TensorStore:
    """Return the store of weights with Hugging Face names."""
    arrays = flat_weights(weights, config.names, ref)
    store = dequantised(MemoryStore(arrays, ref), config.values, ref)
    if config.family.is_tied(config.values) and not has_own_head(config.family, config.values, store):
        arrays.pop(HEAD, None)  # the embedding a second time
        store = dequantised(MemoryStore(arrays, ref), config.values, ref)
    return store


def _build(
    name: str, ref: str, path: Path | None, revision: str | None, config: ModelConfig, store: TensorStore
) -> BaseModel:
    family, values, notes = config.family, config.values, ()
    if has_own_head(family, values, store):
        values, notes = {**values, "tie_word_embeddings": False}, (NOTE,)
    elif config.wrapper is not None and "tie_word_embeddings" not in values:
        values = {**values, "tie_word_embeddings": HEAD not in store.names()}
    dims = read_dims(config, path or ref)
    model = Architecture(family, values, dims)
    check_tensors(model, store, ref)
    fused = fused_modules(model)
    return BaseModel(
        name=name,
        ref=ref,
        path=path,
        tokenizer_path=path,
        revision=revision,
        family=family,
        config=values,
        dims=dims,
        modules=build_modules(model, fused, store),
        fused=fused,
        store=store,
        wrapper=config.wrapper,
        notes=notes,
    )


_ROWS = 4096  # compared at a time
NOTE = (
    "the configuration ties the output head to the embedding (tie_word_embeddings), but the weights hold another head, "
    "which is used: set tie_word_embeddings to false in config.json, so that every engine uses it"
)


def has_own_head(family: Family, config: Mapping[str, object], store: TensorStore) -> bool:
    """Tell whether the weights hold a head that differs from the embedding, although the configuration ties the two.

    transformers 5 runs such a model with the stored head (`PreTrainedModel.tie_weights`).
    """
    return family.is_tied(config) and {EMBEDDING, HEAD} <= set(store.names()) and not _equal(store)


def _equal(store: TensorStore) -> bool:
    shape = store.shape(EMBEDDING)
    if len(shape) != 2 or store.shape(HEAD) != shape:
        return False
    for start in range(0, shape[0], _ROWS):
        ids = np.arange(start, min(start + _ROWS, shape[0]))
        if not np.array_equal(store.rows(EMBEDDING, ids), store.rows(HEAD, ids), equal_nan=True):
            return False
        store.release()
    return True
