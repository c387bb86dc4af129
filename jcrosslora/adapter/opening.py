"""Open an adapter: find its files, tell its kind, and check what is known before its updates are read."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jcrosslora.adapter.config import check_type, config_notes
from jcrosslora.adapter.folder import (
    AdapterFiles,
    Form,
    Licences,
    find_adapter,
    open_weights,
    read_config,
    stated_licences,
    stated_template,
)
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind
from jcrosslora.adapter.kinds.registry import TYPES, kind_of
from jcrosslora.adapter.mlx import translated_mlx
from jcrosslora.adapter.names import parse_tensor_name
from jcrosslora.adapter.read_gguf import open_gguf_adapter, translated_gguf
from jcrosslora.adapter.records import AdapterInfo
from jcrosslora.adapter.tensor_groups import TensorGroups, group_tensors
from jcrosslora.adapter.weights import MemoryWeights, PeftContents, check_names
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.hub import cached_identity
from jcrosslora.checkpoint.wrapped import TEXT, prefix_of, text_module_name
from jcrosslora.errors import AdapterError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """An adapter whose kind is known and whose configuration was checked, but whose updates were not read yet.

    Attributes:
        name: the path, hub id or name that it was asked for by.
        form: the format of its files; None in memory.
        revision: hub commit of the files, if they were asked for by a hub id.
        licences: what the model card beside the files states of it, see `stated_licences`.
        chat_template: as the file beside them states it, or None.
        kind: of adapter.
        file: its configuration and tensors.
        groups: the same tensors by purpose.
        stated: the configuration in the files, in their own format.
        notes: settings that are not read, one sentence each.
    """

    name: str
    form: Form | None
    revision: str | None
    licences: Licences
    chat_template: str | None
    kind: Kind
    file: AdapterFile
    groups: TensorGroups
    stated: Mapping[str, Any]
    notes: tuple[str, ...]

    def info(self, **known: Any) -> AdapterInfo:
        """Return the provenance, with what else is known of the adapter."""
        base_name = self.file.config.get("base_model_name_or_path")
        return AdapterInfo(
            name=self.name,
            base_name=base_name if isinstance(base_name, str) and base_name else None,
            config=self.stated,
            form=self.form,
            digest=f"sha256:{self.file.file.file.sha256()}",
            revision=self.revision,
            **self.licences,
            chat_template=self.chat_template,
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
        """Refuse an adapter without an update of a linear layer or of experts, or whatever else is of use.

        Raises:
            AdapterError: there are no updates; says what there is instead.
        """
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
    origin = {
        "name": files.name,
        "form": files.form,
        "revision": commit,
        "licences": stated_licences(files),
        "chat_template": stated_template(files.weights.parent),
    }
    return _opened(_peft_contents(files, base), where, base, rank, **origin)


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
    contents = PeftContents(config, MemoryWeights(name, tensors), config, tuple(config_notes(config)))
    return _opened(contents, name, base, rank, name=name, form=None, revision=None, licences={}, chat_template=None)


def _opened(
    contents: PeftContents, where: str, base: BaseModel | None, rank: int | None, **origin: Any
) -> OpenedAdapter:
    config, weights = contents.config, contents.weights
    groups = group_tensors([parse_tensor_name(key) for key in weights.entries], weights.file.path)
    kind = kind_of(config, groups.parts, where)
    kind.check(config, where)
    file = AdapterFile(config, weights, groups.modules, groups.heads, groups.shared, base, rank)
    return OpenedAdapter(kind=kind, file=file, groups=groups, stated=contents.stated, notes=contents.notes, **origin)


def _peft_contents(files: AdapterFiles, base: BaseModel | None) -> PeftContents:
    if files.config is None:
        return translated_gguf(open_gguf_adapter(files.weights), base)
    config, where = read_config(files.config), str(files.config)
    if files.form == "MLX":
        return translated_mlx(config, open_weights(files.weights), where)
    check_type(config, where, TYPES)
    return PeftContents(config, open_weights(files.weights), config, tuple(config_notes(config)))
