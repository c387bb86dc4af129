"""Read a PEFT adapter of any kind that is an update of weight matrices into memory, as low-rank factors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from jcrosslora.adapter.read_tokens import read_tokens
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.sorting import Contents, sort_tensors
from jcrosslora.adapter.token_updates import HEAD, TokenUpdate
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.hub import cached_identity
from jcrosslora.errors import AdapterError, UsageError

# A smaller share of the update's energy is rounding.
_ROUNDING = 1e-6


def load_adapter(
    ref: str | Path, base: BaseModel | None = None, *, revision: str | None = None, rank: int | None = None
) -> Adapter:
    """Read an adapter: LoRA, or another kind that peft or its own repository writes (`kinds.registry` lists them).

    Args:
        ref: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id (`HF_HUB_OFFLINE` is
            respected; only these two files are fetched).
        base: the model that it was trained on. Some kinds (DoRA, PiSSA, OLoRA, VeRA) are no update without its
            weights or shapes. With it changes of the embedding and the output head are read as well, into `tokens`,
            and for others it tells how much of the change does not move.
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
    files = find_adapter(ref, revision)
    config, where = read_config(files.config), str(files.config)
    check_type(config, where, TYPES)
    weights = open_weights(files.weights)
    contents = sort_tensors([parse_tensor_name(key) for key in weights.entries], files.weights)
    kind = kind_of(config, contents.parts, where)
    kind.check(config, where)
    file = AdapterFile(config, weights, contents.modules, contents.heads, contents.shared, base, rank)
    updates = _read(kind, file)
    head = _head(kind, file, contents, updates)
    modules = {name: update.factors for name, update in updates.items() if name != HEAD}
    tokens, ignored = _others(kind, file, contents, updates, head)
    if not modules:
        found = "; ".join([*ignored, *dropped.token_sentences(tokens, "")]) or "it is empty"
        msg = f"{files.weights}: holds no {kind.name} of a linear layer ({found.rstrip('.')}): nothing can be moved"
        raise AdapterError(msg)
    read = list(updates.values())
    if head is not None and HEAD not in updates and any(update.sort == "head" for update in tokens):
        read.append(head)
    info = AdapterInfo(
        name=files.name,
        base_name=_text_or_none(config.get("base_model_name_or_path")),
        config=config,
        digest=f"sha256:{weights.file.sha256()}",
        revision=_commit(files),
        ignored=tuple(config_notes(config) + ignored),
        kind=kind.name,
        read_as=_read_as(kind, config, read),
        lost=_lost(read),
        rank_limit=rank,
        invocation=invocation_of(config) if kind.peft_type == "LORA" else None,
    )
    if base is not None:
        base.release()
    return Adapter(modules=modules, info=info, tokens=tokens)


def _read(kind: Kind, file: AdapterFile) -> dict[str, Update]:
    """The updates by the names of text-only models, at no more than the rank that is wanted."""
    updates: dict[str, Update] = {}
    for module, update in kind.read(file):
        name = text_module_name(module)
        if name in updates:
            msg = f"{file.path}: module {name!r} occurs under two spellings: remove one of them"
            raise AdapterError(msg)
        updates[name] = cut(update, file.rank)
    return updates


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
    moved += math.fsum(update.energy for update in tokens)
    total = moved + math.fsum(energy or 0.0 for energy in energies.values())

    def share(energy: float | None) -> float | None:
        return None if energy is None or total == 0 else energy / total

    ignored = [
        dropped.sentence(sort, found, share(energies[sort]), reasons.get(sort, "")) for sort, found in names.items()
    ]
    return tuple(dataclasses.replace(update, share=share(update.energy) or 0.0) for update in tokens), ignored


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
    identity = cached_identity(files.config.parent)
    return identity[1] if identity is not None and identity[0] == files.name else None


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
