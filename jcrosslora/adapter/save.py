"""Write a LoRA adapter in the format of PEFT."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors.numpy

from jcrosslora.adapter.folder import CONFIG, WEIGHTS
from jcrosslora.adapter.fused import Layout, fuse
from jcrosslora.adapter.names import PREFIX, natural_key
from jcrosslora.adapter.patterns import exact_pattern
from jcrosslora.adapter.portable import FileDtype, file_factors
from jcrosslora.adapter.records import Adapter
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.files import atomic_folder, ensure_free

Profile = Literal["portable", "peft"]


def save_adapter(
    adapter: Adapter,
    out: str | Path,
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
    profile: Profile = "portable",
    dtype: FileDtype = "float32",
    overwrite: bool = False,
    fused: Layout | None = None,
    all_modules: Sequence[str] | None = None,
    documents: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter as a PEFT folder, whole or not at all.

    Args:
        adapter: at least one module; not changed.
        out: the folder to make.
        base_name: `base_model_name_or_path`, the base that the adapter is for; None takes `adapter.info.base_name`.
        base_revision: its revision.
        profile: "portable" writes one rank (lower ranks are padded with zeros) and lora_alpha == r, the form that
            every engine reads the same way; "peft" keeps each module's rank in `rank_pattern` and `alpha_pattern`,
            which PEFT and new releases of vLLM read. The scale is inside B in both.
        dtype: of the tensors in the file.
        overwrite: whether an adapter folder at `out` may be replaced.
        fused: layout of the base's fused modules; updates of their parts are merged, see `fuse`.
        all_modules: names of the base's linear modules. Those that have the ending of a written module but no update
            go into `exclude_modules`, without which PEFT would expect tensors for them.
        documents: file name to text, written into the same folder (README.md, transfer_report.json).
        metadata: pairs for the header of the safetensors file, beside {"format": "pt"}.

    Returns:
        `out` as a path.

    Raises:
        OutputError: the adapter is empty, its values do not fit the dtype, or the place cannot be written to.
        UsageError: an unknown profile or dtype, or a document or metadata entry that cannot be written.
    """
    out = Path(out)
    ensure_free(out, overwrite)
    _check_settings(profile, documents or {}, metadata or {})
    fused = fused or {}
    modules = fuse(adapter.modules, fused)
    if not modules:
        msg = f"{out}: the adapter has no modules, at least one was wanted: nothing was written"
        raise OutputError(msg)
    modules = dict(sorted(modules.items(), key=lambda item: natural_key(item[0])))
    ranks = {name: factors.rank for name, factors in modules.items()}
    rank = max(ranks.values()) if profile == "portable" else None
    tensors: dict[str, np.ndarray] = {}
    for name, factors in modules.items():
        a, b = file_factors(name, factors, dtype, rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
    config = peft_config(
        {name: rank or own for name, own in ranks.items()},
        base_name=base_name or adapter.info.base_name,
        base_revision=base_revision,
        exclude=_without_update(ranks, all_modules, fused),
        invocation=adapter.info.invocation,
    )
    texts = {**(documents or {}), CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}
    with atomic_folder(out, overwrite) as folder:
        # As bytes, because safetensors' own writer hides the system's error (disk full) in one of its own.
        (folder / WEIGHTS).write_bytes(_serialized(tensors, {**(metadata or {}), "format": "pt"}))
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def peft_config(
    ranks: Mapping[str, int],
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
    exclude: Sequence[str] = (),
    invocation: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The `adapter_config.json` for modules of these ranks, all with scale 1.

    Keys that peft learned after 0.14 are left out: their default is what is meant, and older readers warn about or
    refuse keys that they do not know.

    Args:
        ranks: module name to rank; the most frequent rank is `r`, the others go into the patterns.
        base_name: the base, an id or a path.
        base_revision: its revision.
        exclude: modules that have the ending of one in `ranks`, but no update.
        invocation: tokens from which on the adapter acts (aLoRA); None for one that always does.
    """
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    patterns = {exact_pattern(name): rank for name, rank in ranks.items() if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,  # An integer: Ollama reads no other number.
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted({_ending(name) for name in ranks}),
        "exclude_modules": list(exclude) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }
    return config if invocation is None else {**config, "alora_invocation_tokens": list(invocation)}


def _serialized(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The file as bytes, the same for the same content: safetensors writes metadata in an order that varies."""
    data = safetensors.numpy.save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def _without_update(ranks: Mapping[str, int], all_modules: Sequence[str] | None, fused: Layout) -> list[str]:
    owner = {part: name for name, parts in fused.items() for part, _, _ in parts}
    endings = {_ending(name) for name in ranks}
    every = dict.fromkeys(owner.get(name, name) for name in all_modules or ())
    return sorted((name for name in every if _ending(name) in endings and name not in ranks), key=natural_key)


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _check_settings(profile: str, documents: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    if profile not in get_args(Profile):
        msg = f"profile {profile!r} is unknown; use one of {', '.join(get_args(Profile))}"
        raise UsageError(msg)
    for name in documents:
        if Path(name).name != name or name in (CONFIG, WEIGHTS):
            msg = f"document {name!r} cannot be written: a plain file name other than {CONFIG} and {WEIGHTS} was wanted"
            raise UsageError(msg)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key == "format":
            msg = f"metadata {key!r} cannot be written: text for a key other than 'format' was wanted"
            raise UsageError(msg)
