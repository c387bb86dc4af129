"""Open an adapter: find its files, group its tensors, tell its kind, and check it before its updates are read."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jcrosslora.adapter.config import REFUSED_TENSORS, check_type, config_notes
from jcrosslora.adapter.folder import (
    AdapterFiles,
    find_adapter,
    open_weights,
    read_config,
    stated_licences,
    stated_template,
)
from jcrosslora.adapter.gguf import open_gguf_adapter, translated_gguf
from jcrosslora.adapter.kinds import TYPES, kind_of
from jcrosslora.adapter.kinds.kind import AdapterFile, Kind
from jcrosslora.adapter.mlx import translated_mlx
from jcrosslora.adapter.names import TensorName, is_of_experts, is_router, natural_key, parse_tensor_name
from jcrosslora.adapter.records import AdapterInfo
from jcrosslora.adapter.weights import PeftContents, Weights, check_names
from jcrosslora.architectures.names import LAYER_EMBEDDING, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.hub import cached_identity
from jcrosslora.checkpoint.wrapped import TEXT, is_other_part, prefix_of, text_module_name
from jcrosslora.errors import AdapterError

T = TypeVar("T")
_EXTRAS = frozenset({"embedding", "lora_bias", "tokens", "bias", "full"})


def _grouped(contents: PeftContents, base: BaseModel | None, rank: int | None) -> AdapterFile:
    """Group the tensors of a file by purpose.

    Raises:
        AdapterError: a tensor belongs to a kind of adapter that is refused (named).
    """
    weights = contents.weights
    tensors = [parse_tensor_name(key) for key in weights.entries]
    _refuse_tensors(tensors, weights.path)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    heads: dict[str, dict[str, str]] = defaultdict(dict)
    extras: dict[str, list[TensorName]] = defaultdict(list)
    for tensor in tensors:
        if is_other_part(tensor.module):
            extras["other part"].append(tensor)
        elif f"{text_module_name(tensor.module)}.weight" in (LAYER_EMBEDDING, LAYER_INPUT_PROJECTION):
            extras["layer inputs"].append(tensor)
        elif is_of_experts(tensor.module) or is_router(tensor.module):
            extras["experts" if is_of_experts(tensor.module) else "router"].append(tensor)
        elif tensor.kind in _EXTRAS:
            extras[tensor.kind].append(tensor)
        elif tensor.module and tensor.kind != "copy":
            group = heads if text_module_name(tensor.module) == "lm_head" else modules
            group[tensor.module][tensor.kind] = tensor.key
    # The magnitudes of a DoRA of an embedding belong to the embedding.
    for tensor in extras["embedding"]:
        modules.pop(tensor.module, None)
    return AdapterFile(
        config=contents.config,
        weights=weights,
        modules=dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))),
        others=heads,
        shared={tensor.kind: tensor.key for tensor in tensors if not tensor.module},
        extras={kind: found for kind, found in extras.items() if found},
        base=base,
        rank=rank,
    )


def _refuse_tensors(tensors: Sequence[TensorName], path: Path) -> None:
    for tensor in tensors:
        if tensor.kind in REFUSED_TENSORS:
            msg = f"{path}: tensor {tensor.key!r} is of a kind that is not supported, {REFUSED_TENSORS[tensor.kind]}"
            raise AdapterError(msg)
        if tensor.kind in ("A", "B") and tensor.module.endswith(".base_layer") and not is_of_experts(tensor.module):
            msg = f"{path}: tensor {tensor.key!r} is a LoRA of parameters (target_parameters) that are not experts', "
            raise AdapterError(msg + "which is not supported; train an adapter of linear layers instead")


@dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """An adapter whose kind is known and whose configuration was checked, but whose updates were not read yet.

    Attributes:
        origin: what is known before its tensors are read.
        kind: of adapter.
        file: its configuration and tensors.
        notes: settings that are not read, one sentence each.
    """

    origin: AdapterInfo
    kind: Kind
    file: AdapterFile
    notes: tuple[str, ...]

    def info(self, **known: Any) -> AdapterInfo:
        """Return the provenance, with what else is known of the adapter."""
        base_name = self.file.config.get("base_model_name_or_path")
        return dataclasses.replace(
            self.origin,
            base_name=base_name if isinstance(base_name, str) and base_name else None,
            digest=f"sha256:{self.file.weights.sha256()}",
            kind=self.kind.name,
            prefix=next((found for module in self.file.modules if (found := prefix_of(module)) != TEXT), TEXT),
            **known,
        )

    def by_text_name(self, found: Iterable[tuple[str, T]]) -> dict[str, T]:
        """Key what was read of each module by the module names of text-only models.

        Raises:
            AdapterError: two modules have one name there.
        """
        named: dict[str, T] = {}
        for module, value in found:
            name = text_module_name(module)
            if name in named:
                msg = f"{self.file.path}: module {name!r} occurs under two spellings: remove one of them"
                raise AdapterError(msg)
            named[name] = value
        return named

    def check_not_empty(self, updates: Collection[object], ignored: Sequence[str]) -> None:
        """Refuse an adapter without updates that are of use; the message says what there is instead."""
        if not updates:
            found = "; ".join(sentence.rstrip(".") for sentence in ignored) or "it is empty"
            msg = f"{self.file.path}: holds no {self.kind.name} of a linear layer ({found}): nothing can be moved"
            hint = "; merge and export hold changes of embedding and head, given the base" if ignored else ""
            raise AdapterError(msg + hint)


def open_adapter(
    ref: str | Path, base: BaseModel | None, *, revision: str | None = None, rank: int | None = None
) -> OpenedAdapter:
    """Open the files of an adapter; see `load_adapter`.

    Raises:
        AdapterError: not there, damaged, or of a kind that is refused (named).
    """
    files = find_adapter(ref, revision)
    where, identity = str(files.config or files.weights), cached_identity(files.weights.parent)
    commit = identity[1] if identity is not None and identity[0] == files.name else None
    contents = _peft_contents(files, base)
    origin = AdapterInfo(
        name=files.name,
        config=contents.stated,
        form=files.form,
        revision=commit,
        **stated_licences(files),
        chat_template=stated_template(files.weights.parent),
    )
    return _opened(contents, where, base, rank, origin)


def open_state_dict(
    tensors: Mapping[str, Any], config: Mapping[str, Any], base: BaseModel | None, *, name: str, rank: int | None = None
) -> OpenedAdapter:
    """Open the state dict of a PEFT adapter as if it had been read from files.

    Args:
        tensors: numpy, JAX or torch arrays by the names that PEFT gives them in a file.
        config: its `adapter_config.json`.
        base: see `load_adapter`.
        name: stands in messages in place of a path.
        rank: see `load_adapter`.

    Raises:
        AdapterError: damaged, or of a kind that is refused (named).
    """
    check_type(config, name, TYPES)
    check_names(Path(name), tensors)
    contents = PeftContents(config, Weights.of_memory(name, tensors), config, config_notes(config))
    return _opened(contents, name, base, rank, AdapterInfo(name=name, config=config))


def _opened(
    contents: PeftContents, where: str, base: BaseModel | None, rank: int | None, origin: AdapterInfo
) -> OpenedAdapter:
    file = _grouped(contents, base, rank)
    parts = {part for parts in (*file.modules.values(), *file.others.values(), file.shared) for part in parts}
    kind = kind_of(contents.config, parts, where)
    kind.check(contents.config, where)
    return OpenedAdapter(origin, kind, file, contents.notes)


def _peft_contents(files: AdapterFiles, base: BaseModel | None) -> PeftContents:
    if files.config is None:
        return translated_gguf(open_gguf_adapter(files.weights), base)
    config, where = read_config(files.config), str(files.config)
    if files.form == "MLX":
        return translated_mlx(config, open_weights(files.weights), where)
    check_type(config, where, TYPES)
    file = open_weights(files.weights)
    return PeftContents(config, Weights.of_file(file.file, file.entries, file.array), config, config_notes(config))
