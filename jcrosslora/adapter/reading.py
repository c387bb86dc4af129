"""Open an adapter, find its kind, and read its updates as low-rank factors.

Changes that are not low-rank updates are measured and described in sentences.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter import folder, names
from jcrosslora.adapter.changes import HEAD, ExpertUpdate, ReplacedTensors, TokenUpdate, update_norm
from jcrosslora.adapter.config import REFUSED_TENSORS, check_type, config_notes
from jcrosslora.adapter.contents import PeftView, check_names, stored_in_memory
from jcrosslora.adapter.experts import read_experts
from jcrosslora.adapter.gguf import open_gguf_adapter, translated_gguf
from jcrosslora.adapter.jax_trainers import as_state_dict
from jcrosslora.adapter.kinds import TYPES, kind_of
from jcrosslora.adapter.kinds.kind import Kind, ParsedAdapter, Update
from jcrosslora.adapter.kinds.products import PLAIN, invocation_of, read_embedding_factors
from jcrosslora.adapter.mlx import translated_mlx
from jcrosslora.adapter.names import TensorName, by_module, file_scale, is_of_experts, is_router, natural_key
from jcrosslora.adapter.orbax import read_checkpoint, stated_alpha
from jcrosslora.adapter.origin import earlier_of, read_record
from jcrosslora.adapter.other_changes import read_replaced, read_tokens
from jcrosslora.adapter.records import Adapter, AdapterInfo, ignored_sentence, why_idle
from jcrosslora.architectures.blocks import LAYER_EMBEDDING, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.hub import cached_identity
from jcrosslora.checkpoint.in_memory import named_arrays
from jcrosslora.checkpoint.wrapped import is_other_part, text_module_name
from jcrosslora.errors import AdapterError, JCrossLoRAError, UsageError

_EXTRAS = frozenset({"embedding", "lora_bias", "tokens", "bias", "full"})
# A smaller share of the update's energy is rounding.
_ROUNDING = 1e-6


def open_adapter(
    ref: str | Path,
    base: BaseModel | None,
    *,
    revision: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
) -> ParsedAdapter:
    """Open the files of an adapter; see `load_adapter`."""
    files = folder.find_adapter(ref, revision)
    identity = cached_identity(files.weights.parent)
    if alpha is not None and files.form != "Orbax":
        raise UsageError(f"{ref}: alpha was given for an adapter of {files.form}, which holds its own: leave it out")
    stored = _stored(files, base, alpha)
    origin = AdapterInfo(
        name=files.name,
        config=stored.stated,
        form=files.form,
        alpha=alpha,
        revision=identity[1] if identity is not None and identity[0] == files.name else None,
        **folder.stated_licences(files),
        chat_template=folder.stated_template(files.folder),
        earlier=earlier_of(read_record(files, stored.metadata)),
    )
    return _grouped(stored, str(files.config or files.weights), base, rank, origin)


def why_idle_files(ref: str | Path, base: BaseModel | None) -> str | None:
    """Return a sentence if the files of an adapter do nothing, see `why_idle`; None also if they cannot be read.

    Only files with an all-zero tensor are read in full.
    """
    with suppress(JCrossLoRAError):
        file = open_adapter(ref, base)
        # Compared with zero: `np.any` of a float warns about a signalling NaN, as damaged files have them.
        if any(not np.any(file.stored.array(name) != 0) for name in file.stored.entries):
            return why_idle(read_adapter(file, replaced=True))
    return None


def open_state_dict(
    tensors: Mapping[str, Any], config: Mapping[str, Any], base: BaseModel | None, *, name: str, rank: int | None = None
) -> ParsedAdapter:
    """Open the state dict of a PEFT adapter as if it had been read from files; see `load_adapter`.

    `tensors` are numpy, JAX or torch arrays by the names that PEFT gives them in a file; `name` is for messages.
    """
    check_type(config, name, TYPES)
    check_names(Path(name), tensors)
    stored = stored_in_memory(name, tensors, config, config_notes(config))
    return _grouped(stored, name, base, rank, AdapterInfo(name=name, config=config))


def open_trained(
    tree: Mapping[str, Any], base: BaseModel | None, *, alpha: float | None, rank: int | None = None
) -> ParsedAdapter:
    """Open the LoRA of a JAX trainer, a tree of arrays or an `nnx.State`; see `load_adapter`."""
    stated = {} if alpha is None else {"alpha": alpha}
    tensors, config = as_state_dict(named_arrays(tree), stated, "state", base)
    return open_state_dict(tensors, config, base, name="state", rank=rank)


def _stored(files: folder.AdapterPaths, base: BaseModel | None, alpha: float | None) -> PeftView:
    if files.form == "Orbax":
        stated = stated_alpha(files.weights) if files.config is None else folder.read_config(files.config)
        given = stated if alpha is None else {**stated, "alpha": alpha}
        tensors, settings = as_state_dict(read_checkpoint(files.weights), given, files.name, base)
        return replace(stored_in_memory(str(files.weights), tensors, settings), stated=stated)
    if files.config is None:
        return translated_gguf(open_gguf_adapter(files.weights), base)
    config, where = folder.read_config(files.config), str(files.config)
    if files.form == "MLX":
        return translated_mlx(config, folder.open_weights(files.weights), where)
    check_type(config, where, TYPES)
    file = folder.open_weights(files.weights)
    notes = config_notes(config)
    return PeftView(file.file.path, config, file.entries, file.array, file.file.sha256, config, notes, file.metadata)


def _grouped(
    stored: PeftView, where: str, base: BaseModel | None, rank: int | None, origin: AdapterInfo
) -> ParsedAdapter:
    """Group the tensors of a file by purpose, find its kind, and check the configuration at `where`."""
    tensors = [names.parse_tensor_name(key) for key in stored.entries]
    _refuse_tensors(tensors, stored.path)
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
    shared = {tensor.kind: tensor.key for tensor in tensors if not tensor.module}
    parts = {part for parts in (*modules.values(), *heads.values(), shared) for part in parts}
    kind = kind_of(stored.config, parts, where)
    kind.check(stored.config, where)
    return ParsedAdapter(
        kind=kind,
        origin=origin,
        stored=stored,
        modules=dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))),
        others=heads,
        shared=shared,
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


def read_adapter(file: ParsedAdapter, *, replaced: bool = False) -> Adapter:
    """Read all updates; see `load_adapter`."""
    kind = file.kind
    updates = file.by_text_name((name, update.truncated(file.rank)) for name, update in kind.read(file))
    head = _head(file, updates)
    linear = {name: update for name, update in updates.items() if name != HEAD}
    experts, why_no_experts = read_experts(file, file.extras.get("experts", ()))
    tokens, own, ignored = _other_changes(file, linear, head, experts, why_no_experts, replaced=replaced)
    total = math.fsum([*map(_energy, linear.values()), *(update.energy for update in (*tokens, *experts))])
    experts = tuple(replace(update, share=update.energy / total if total else None) for update in experts)
    held = [*linear, *experts, *([*tokens, *own] if replaced else ())]
    unused = [ignored_sentence(update.kind, update.modules, update.share) for update in tokens]
    file.check_not_empty(held, [*ignored, *unused])
    read = [*linear.values(), *(Update(one.factors, one.lost) for one in tokens if one.factors is not None)]
    info = file.info(
        ignored=(*file.stored.notes, *ignored),
        unread=bool(ignored),
        read_as=_read_as(kind, read),
        lost=_lost(read),
        rank_limit=file.rank,
        invocation=invocation_of(file.config) if kind.peft_type == "LORA" else None,
    )
    if file.base is not None:
        file.base.release()
    return Adapter({name: update.factors for name, update in linear.items()}, info, tokens, own, experts)


def _head(file: ParsedAdapter, updates: Mapping[str, Update]) -> Update | None:
    """Read the update of the output head; None if there is none or it cannot be read."""
    if not file.others:
        return updates.get(HEAD)  # For kinds whose file does not name its modules.
    try:
        found = list(file.kind.read(replace(file, modules=file.others, others=file.modules)))
    except AdapterError:
        return None
    return found[0][1] if len(found) == 1 else None


def _other_changes(
    file: ParsedAdapter,
    linear: Mapping[str, Update],
    head: Update | None,
    experts: Sequence[ExpertUpdate],
    why_no_experts: str,
    *,
    replaced: bool,
) -> tuple[tuple[TokenUpdate, ...], tuple[ReplacedTensors, ...], list[str]]:
    """Read changes of embedding and head, with `replaced` also replaced tensors; describe the rest in sentences."""
    tokens, read, reasons = read_tokens(file, head)
    left = _without(file.extras, read)
    own, read_own, reasons_own = read_replaced(file, left, linear) if replaced else ((), set(), {})
    kept = {
        kind: _change_energy(file, kind, [one for one in tensors if one.key in read_own])
        for kind, tensors in left.items()
    }
    left, reasons = _without(left, read_own), reasons | reasons_own | {"experts": why_no_experts}
    if experts:
        left.pop("experts")
    unread = {kind: [tensor.module for tensor in tensors] for kind, tensors in left.items() if tensors}
    energies = {kind: _change_energy(file, kind, left[kind]) for kind in unread}
    if (file.others or head is not None) and HEAD not in read:
        unread["head"] = list(file.others) or [HEAD]
        energies["head"] = None if head is None else _energy(head)
    total = math.fsum(map(_energy, linear.values())) + math.fsum(update.energy + update.lost for update in tokens)
    total += math.fsum(update.energy for update in experts)
    total += math.fsum(energy or 0.0 for energy in (*energies.values(), *kept.values()))

    def share(energy: float | None) -> float | None:
        return None if energy is None or total == 0 else energy / total

    ignored = [
        ignored_sentence(kind, found, share(energies[kind]), reasons.get(kind, "")) for kind, found in unread.items()
    ]
    moved = tuple(replace(update, share=share(update.energy + update.lost) or 0.0) for update in tokens)
    return moved, tuple(replace(group, share=share(kept[group.kind])) for group in own), ignored


def _without(groups: Mapping[str, Sequence[TensorName]], read: set[str]) -> dict[str, list[TensorName]]:
    return {kind: [tensor for tensor in tensors if tensor.key not in read] for kind, tensors in groups.items()}


def _energy(update: Update) -> float:
    return update_norm(update.factors) ** 2 + update.lost


def _lost(updates: Sequence[Update]) -> float:
    """Return the share of the energy that reading lost, 0 if it is only rounding."""
    total, lost = math.fsum(map(_energy, updates)), math.fsum(update.lost for update in updates)
    return lost / total if lost > _ROUNDING * total else 0.0


def _read_as(kind: Kind, updates: Sequence[Update]) -> str | None:
    lost = _lost(updates)
    if kind is PLAIN and lost == 0:
        return None
    ranks = sorted({update.factors.rank for update in updates})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    how = f"at {rank}, which loses {lost:.1%} of the update's energy" if lost else f"exactly, at {rank}"
    return f"{kind.name} ({kind.formula}), read {how}{f'; {kind.remark}' if kind.remark else ''}"


def _change_energy(file: ParsedAdapter, kind: str, tensors: Sequence[TensorName]) -> float | None:
    """Compute the squared Frobenius norm of a change that does not move; `kind` is a key of `records.CHANGES`.

    Returns None if it is unknown: a tensor that replaces one of the base is compared only if the base is given.
    """
    try:
        match kind:
            case "embedding":
                return sum(update_norm(read_embedding_factors(file, group)) ** 2 for group in by_module(tensors))
            case "lora_bias":
                return sum((_energy_of_bias(file, tensor) for tensor in tensors), 0.0)
            case "bias" | "full" if file.base is not None:
                return sum((_energy_of_new(file, file.base, tensor) for tensor in tensors), 0.0)
    # The figure is informative: a damaged tensor that does not move is no reason to refuse the adapter.
    except (JCrossLoRAError, ArithmeticError, KeyError, TypeError, ValueError):
        return None
    return None


def _energy_of_bias(file: ParsedAdapter, tensor: TensorName) -> float:
    change = file_scale(file.config, tensor.module) * file.read(tensor.key, axes=1).astype(np.float64)
    return float(np.sum(change**2))


def _energy_of_new(file: ParsedAdapter, base: BaseModel, tensor: TensorName) -> float:
    new = file.read(tensor.key, axes=len(file.stored.entries[tensor.key].shape))
    old = base.tensor(f"{text_module_name(tensor.module)}.{'bias' if tensor.kind == 'bias' else 'weight'}")
    return float(np.sum((new.astype(np.float64) - np.asarray(old).astype(np.float64)) ** 2))
