"""Read an adapter of any kind that is an update of weight matrices into memory, as low-rank factors."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jcrosslora.adapter import dropped
from jcrosslora.adapter.config import check_type, config_notes
from jcrosslora.adapter.folder import AdapterFiles, find_adapter, open_weights, read_config
from jcrosslora.adapter.kinds.alora import invocation_of
from jcrosslora.adapter.kinds.opened import AdapterFile
from jcrosslora.adapter.kinds.plain import PLAIN
from jcrosslora.adapter.kinds.record import Kind, Update
from jcrosslora.adapter.kinds.registry import TYPES, kind_of
from jcrosslora.adapter.kinds.trim import cut
from jcrosslora.adapter.names import parse_tensor_name, text_module_name
from jcrosslora.adapter.norms import update_norm
from jcrosslora.adapter.read_gguf import open_gguf_adapter, translated_gguf
from jcrosslora.adapter.read_mlx import translated_mlx
from jcrosslora.adapter.read_tokens import read_tokens
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.sorting import Contents, sort_tensors
from jcrosslora.adapter.token_updates import HEAD, TokenUpdate
from jcrosslora.adapter.weights import Opened
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.hub import cached_identity
from jcrosslora.errors import AdapterError, UsageError

# A smaller share of the update's energy is rounding.
_ROUNDING = 1e-6

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """An adapter whose kind is known and whose configuration was checked, but whose updates were not read yet.

    Attributes:
        files: where it is.
        kind: what it is.
        file: to read it by.
        contents: its tensors, sorted.
        stated: the configuration that is in the files, whatever the format.
        notes: what of it is not read, one sentence each.
    """

    files: AdapterFiles
    kind: Kind
    file: AdapterFile
    contents: Contents
    stated: Mapping[str, Any]
    notes: tuple[str, ...]

    def info(self, **known: Any) -> AdapterInfo:
        """Where the adapter came from, with what else is known of it."""
        return AdapterInfo(
            name=self.files.name,
            base_name=_text_or_none(self.file.config.get("base_model_name_or_path")),
            config=self.stated,
            form=self.files.form,
            digest=f"sha256:{self.file.file.file.sha256()}",
            revision=_commit(self.files),
            kind=self.kind.name,
            **known,
        )


def load_adapter(
    ref: str | Path, base: BaseModel | None = None, *, revision: str | None = None, rank: int | None = None
) -> Adapter:
    """Read an adapter: LoRA, or another kind that peft or its own repository writes (`kinds.registry` lists them).

    Args:
        ref: a folder with `adapter_config.json` and `adapter_model.safetensors`; one of MLX, with
            `adapters.safetensors`; a .gguf file of llama.cpp, or a folder with `adapter.gguf`; or a hub id of one of
            the former two (`HF_HUB_OFFLINE` is respected; only the two files are fetched).
        base: the model that it was trained on. Some kinds (DoRA, PiSSA, OLoRA, VeRA) are no update without its
            weights or shapes, and llama.cpp's q and k of a llama are not without its heads. With it changes of the
            embedding and the output head are read as well, into `tokens`, and for others it tells how much of the
            change does not move.
        revision: branch, tag or commit of the hub repository.
        rank: the largest rank to read an update at, cut optimally; None is exact, and for DoRA, whose update is of
            full rank, twice the rank of its B A. What that loses stands in `info.read_as`.

    Returns:
        The factors, of plain LoRA in their stored dtype, a (K, I) and b (O, K), and their scale; module names as the
        base spells them (`model.layers.0.self_attn.q_proj`). The keys of the file decide which modules there are, not
        `target_modules`. What does not move is listed in `info.ignored`, changes of embedding and head without a base
        among it.

    Raises:
        AdapterError: not there, damaged, of a kind that is refused (named), or of one that the base is needed for.
        UsageError: a rank below 1.
    """
    if rank is not None and rank < 1:
        msg = f"adapter rank {rank} is out of range; it must be at least 1"
        raise UsageError(msg)
    opened = open_adapter(ref, base, revision=revision, rank=rank)
    kind, file, contents = opened.kind, opened.file, opened.contents
    updates = by_text_name(opened, ((name, cut(update, rank)) for name, update in kind.read(file)))
    head = _head(kind, file, contents, updates)
    modules = {name: update.factors for name, update in updates.items() if name != HEAD}
    tokens, ignored = _others(kind, file, contents, updates, head)
    check_any(opened, modules, [*ignored, *dropped.token_sentences(tokens, "")])
    read = [update for name, update in updates.items() if name != HEAD]
    read += [Update(update.factors, update.lost) for update in tokens if update.factors is not None]
    info = opened.info(
        ignored=(*opened.notes, *ignored),
        read_as=_read_as(kind, file.config, read),
        lost=_lost(read),
        rank_limit=rank,
        invocation=invocation_of(file.config) if kind.peft_type == "LORA" else None,
    )
    if base is not None:
        base.release()
    return Adapter(modules=modules, info=info, tokens=tokens)


def open_adapter(
    ref: str | Path, base: BaseModel | None, *, revision: str | None = None, rank: int | None = None
) -> OpenedAdapter:
    """Find an adapter, see what kind it is, and check what is known without its tensors; see `load_adapter`.

    Raises:
        AdapterError: not there, damaged, or of a kind that is refused (named).
    """
    files = find_adapter(ref, revision)
    opened, where = _opened(files, base), str(files.config or files.weights)
    config, weights = opened.config, opened.weights
    contents = sort_tensors([parse_tensor_name(key) for key in weights.entries], files.weights)
    kind = kind_of(config, contents.parts, where)
    kind.check(config, where)
    file = AdapterFile(config, weights, contents.modules, contents.heads, contents.shared, base, rank)
    return OpenedAdapter(files, kind, file, contents, opened.stated, opened.notes)


def _opened(files: AdapterFiles, base: BaseModel | None) -> Opened:
    """The adapter as PEFT would have written it."""
    if files.config is None:
        return translated_gguf(open_gguf_adapter(files.weights), base)
    config, where = read_config(files.config), str(files.config)
    if files.form == "MLX":
        return translated_mlx(config, open_weights(files.weights), where)
    check_type(config, where, TYPES)
    return Opened(config, open_weights(files.weights), config, tuple(config_notes(config)))


def by_text_name(opened: OpenedAdapter, found: Iterable[tuple[str, T]]) -> dict[str, T]:
    """What was read of each module, by the names of text-only models.

    Raises:
        AdapterError: two modules have one name there.
    """
    named: dict[str, T] = {}
    for module, value in found:
        name = text_module_name(module)
        if name in named:
            msg = f"{opened.file.path}: module {name!r} occurs under two spellings: remove one of them"
            raise AdapterError(msg)
        named[name] = value
    return named


def check_any(opened: OpenedAdapter, modules: Mapping[str, object], ignored: Sequence[str]) -> None:
    """Refuse an adapter that holds nothing which could be used.

    Raises:
        AdapterError: `modules` is empty; says what there is instead.
    """
    if not modules:
        found = ("; ".join(ignored) or "it is empty").rstrip(".")
        msg = f"{opened.files.weights}: holds no {opened.kind.name} of a linear layer ({found}): nothing can be moved"
        raise AdapterError(msg)


def _head(kind: Kind, file: AdapterFile, contents: Contents, updates: Mapping[str, Update]) -> Update | None:
    """The update of the output head; None if there is none, or none that can be read."""
    if not contents.heads:
        return updates.get(HEAD)  # Of a kind whose file does not name its modules.
    try:
        found = list(kind.read(dataclasses.replace(file, modules=contents.heads, others=contents.modules)))
    except AdapterError:
        return None
    return found[0][1] if len(found) == 1 else None


def _others(
    kind: Kind, file: AdapterFile, contents: Contents, updates: Mapping[str, Update], head: Update | None
) -> tuple[tuple[TokenUpdate, ...], list[str]]:
    """Changes of embedding and head, and one sentence for each sort of change that does not move."""
    tokens, read, reasons = read_tokens(kind, file, contents.dropped, head)
    left = {
        sort: [tensor for tensor in tensors if tensor.key not in read] for sort, tensors in contents.dropped.items()
    }
    names = {sort: [tensor.module for tensor in tensors] for sort, tensors in left.items() if tensors}
    energies = {sort: dropped.energy_of(file, sort, left[sort]) for sort in names}
    if (contents.heads or head is not None) and HEAD not in read:
        names["head"] = list(contents.heads) or [HEAD]
        energies["head"] = None if head is None else _energy(head)
    moved = math.fsum(_energy(update) for name, update in updates.items() if name != HEAD)
    moved += math.fsum(update.energy + update.lost for update in tokens)
    total = moved + math.fsum(energy or 0.0 for energy in energies.values())

    def share(energy: float | None) -> float | None:
        return None if energy is None or total == 0 else energy / total

    ignored = [
        dropped.sentence(sort, found, share(energies[sort]), reasons.get(sort, "")) for sort, found in names.items()
    ]
    tokens = tuple(dataclasses.replace(update, share=share(update.energy + update.lost) or 0.0) for update in tokens)
    return tokens, ignored


def _energy(update: Update) -> float:
    return update_norm(update.factors) ** 2 + update.lost


def _lost(updates: Sequence[Update]) -> float:
    """Share of the update's energy that reading it lost, 0 where it is no more than rounding."""
    total, lost = math.fsum(map(_energy, updates)), math.fsum(update.lost for update in updates)
    return lost / total if lost > _ROUNDING * total else 0.0


def _read_as(kind: Kind, config: Mapping[str, Any], updates: Sequence[Update]) -> str | None:
    lost, remark = _lost(updates), kind.remark(config)
    if kind is PLAIN and lost == 0:
        return None
    ranks = sorted({update.factors.rank for update in updates})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    how = f"at {rank}, which loses {lost:.1%} of the update's energy" if lost else f"exactly, at {rank}"
    return f"{kind.name} ({kind.formula}), read {how}{f'; {remark}' if remark else ''}"


def _commit(files: AdapterFiles) -> str | None:
    """The hub commit that the files are of, where they were asked for by a hub id."""
    identity = cached_identity(files.weights.parent)
    return identity[1] if identity is not None and identity[0] == files.name else None


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
