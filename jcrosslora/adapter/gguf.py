"""Read and write adapters of llama.cpp: one GGUF file of type adapter.

A module's factors are named after the base's tensor, `blk.0.attn_q.weight.lora_a` (K, I) and `.lora_b` (O, K). The
update is lora_b lora_a times adapter.lora.alpha / K. In Llama and similar families llama.cpp reorders the rows of q
and k, and those of lora_b in the same way.

Source: llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

import importlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jcrosslora.adapter.config import is_alpha, shown
from jcrosslora.adapter.contents import PeftView, WriteRequest, as_adapter_errors, check_names, file_factors
from jcrosslora.adapter.names import PREFIX, TensorName, ending, rank_settings
from jcrosslora.architectures.families import FAMILIES
from jcrosslora.checkpoint import BaseModel, MappedFile, is_hub_id
from jcrosslora.checkpoint.gguf import float_type, open_header, stored_rows, to_float
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES, GGUFHeader, hub_id_of
from jcrosslora.checkpoint.gguf_tensors import architecture, gguf_name, hf_name, permutes_heads, unpermuted_rows
from jcrosslora.checkpoint.safetensors import Entry
from jcrosslora.errors import AdapterError, OutputError

GGUF_WEIGHTS = "adapter.gguf"
TYPE, ALPHA, INVOCATION = "adapter.type", "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_NORM = "_norm.weight"  # llama.cpp ignores norms
_GGUF_EMBEDDING = "token_embd.weight"
_TURNED = "lora_embedding_A"  # stored as its transpose
# Kind of a tensor -> PEFT's name of that part of a module.
_PEFT = {"A": "lora_A.weight", "B": "lora_B.weight", "embedding": "", "norm": "weight"}
# Reordered roles: index into (query heads, key heads), and the metadata key of the number of heads.
_HEADS = {"q_proj": (0, "attention.head_count"), "k_proj": (1, "attention.head_count_kv")}
# dtype -> ggml type of a tensor, and file type of a file that mostly holds it.
_TYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}


@dataclass(frozen=True, eq=False)
class GGUFAdapter:
    """An adapter of llama.cpp whose header has been read: its metadata, and the offsets of its tensors."""

    file: MappedFile
    header: GGUFHeader
    gguf: ModuleType

    @property
    def arch(self) -> Any:
        """`general.architecture` of the bases that it is for."""
        return self.header.metadata.get("general.architecture")


def open_gguf_adapter(path: Path) -> GGUFAdapter:
    """Read the header of a llama.cpp adapter; raises an AdapterError if the file is a model or cannot be read."""
    with as_adapter_errors():
        gguf, file, header = open_header(path)
    kind = header.metadata.get("general.type", "model")
    if kind != "adapter":
        msg = f"{path}: is a GGUF of type {str(kind)[:60]!r}, expected an adapter: give the file or folder of a LoRA"
        raise AdapterError(msg)
    check_names(path, header.tensors)
    return GGUFAdapter(file, header, gguf)


def is_gguf_adapter(path: Path) -> bool:
    """Return whether a file is an adapter of llama.cpp and not a model; False if it cannot be read."""
    with suppress(AdapterError):
        return open_gguf_adapter(path) is not None
    return False


def parse_gguf_name(name: str) -> TensorName:
    """Parse a tensor's name; its module is the base's tensor, as GGUF calls it."""
    for suffix, kind in ((".lora_a", "A"), (".lora_b", "B")):
        if name.endswith(suffix):
            module = name.removesuffix(suffix)
            return TensorName(name, "embedding" if module == _GGUF_EMBEDDING else kind, module)
    return TensorName(name, "norm" if name.endswith(_NORM) else "other", name)


def translated_gguf(adapter: GGUFAdapter, base: BaseModel | None) -> PeftView:
    """Translate an adapter to PEFT's layout, with the rows of q and k in Hugging Face's order.

    For architectures such as "llama" that order depends on the number of heads: the file's if it states them (only
    files of this package do), else the base's.
    """
    path, metadata = adapter.file.path, adapter.header.metadata
    if metadata.get(TYPE) != "lora":
        raise AdapterError(f"{path}: {TYPE} is {shown(metadata, TYPE)}, expected 'lora': use a LoRA adapter")
    if not isinstance(adapter.arch, str) or adapter.arch not in ARCHITECTURES:
        msg = f"{path}: GGUF architecture {str(adapter.arch)[:60]!r} is not supported; supported: "
        raise AdapterError(msg + ", ".join(ARCHITECTURES))
    if base is not None and architecture(base.family.name, base.has_experts) != adapter.arch:
        msg = f"{path}: the adapter is for bases of architecture {adapter.arch!r}, {base.name} is of family "
        raise AdapterError(msg + f"{base.family.name}: give the base it was trained on")
    stored = {_name(name, adapter): name for name in adapter.header.tensors}
    entries: dict[str, Entry] = {}
    for name, old in stored.items():
        info = adapter.header.tensors[old]
        shape = info.shape[::-1] if name.endswith(_TURNED) else info.shape
        entries[name] = Entry(float_type(info.kind, adapter.gguf), shape, info.start)
    heads = _heads(adapter, base)
    config = _config(adapter, entries)
    read = partial(_read, adapter, heads, stored)
    return PeftView(path, config, entries, read, adapter.file.sha256, metadata, metadata=metadata)


def _name(stored: str, adapter: GGUFAdapter) -> str:
    parsed = parse_gguf_name(stored)
    name = hf_name(parsed.module, adapter.arch)
    if name is not None and name.startswith("model.layers.") and gguf_name(name, adapter.arch) != parsed.module:
        msg = f"{adapter.file.path}: the rows or columns of {parsed.module!r} are not those of a module in "
        msg += f"architecture {adapter.arch!r}: LoRA of it cannot be read; use the adapter in the format of PEFT"
        raise AdapterError(msg)
    layer = parsed.module.split(".")[1:2] if parsed.module.startswith("blk.") else []
    known = parsed.kind in _PEFT and all(part.isascii() and part.isdecimal() for part in layer)
    if not known or name is None or not name.endswith(".weight"):
        msg = f"{adapter.file.path}: tensor {stored!r} is not one of a LoRA for architecture {adapter.arch!r}"
        raise AdapterError(msg + ": use the adapter as llama.cpp's converter wrote it")
    part = f"lora_embedding_{stored[-1].upper()}" if parsed.kind == "embedding" else _PEFT[parsed.kind]
    return f"{PREFIX}{name.removesuffix('.weight')}.{part}"


def _read(adapter: GGUFAdapter, heads: tuple[Any, Any] | None, names: Mapping[str, str], name: str) -> np.ndarray:
    stored, path = names[name], adapter.file.path
    info = adapter.header.tensors[stored]
    array = to_float(stored_rows(adapter.file, info, adapter.gguf), info.kind, adapter.gguf, path)
    if name.endswith(_TURNED):
        return array.T
    module, _, part = name.removesuffix(".weight").rpartition(".")
    if part == "lora_B" and permutes_heads(adapter.arch) and ending(module) in _HEADS:
        rows = array.shape[0]
        return array[unpermuted_rows(rows, _heads_of(module.removeprefix(PREFIX), rows, path, heads))]
    if stored.endswith(_NORM):
        return array.astype(np.float32) - np.float32(FAMILIES[ARCHITECTURES[adapter.arch]].gain_offset)
    return array


def _heads(adapter: GGUFAdapter, base: BaseModel | None) -> tuple[Any, Any] | None:
    """Return (query heads, key heads) from the file or the base; None if unknown or rows are not reordered."""
    if not permutes_heads(adapter.arch):
        return None
    stated = tuple(adapter.header.metadata.get(f"{adapter.arch}.{key}") for _, key in _HEADS.values())
    of_base = None if base is None else (base.dims.heads, base.dims.kv_heads)
    if None in stated:
        return of_base
    if of_base is not None and stated != of_base:
        msg = f"{adapter.file.path}: the adapter is for a base of {str(stated)[:60]} query and key heads, this one has "
        raise AdapterError(msg + f"{of_base}: give the base it was trained on")
    return stated[0], stated[1]


def _heads_of(module: str, rows: int, path: Path, heads: tuple[Any, Any] | None) -> int:
    if heads is None:
        msg = f"{path}: the order of the rows of {module!r} depends on the heads of the base: the source base is needed"
        raise AdapterError(msg + "; give the base that it was trained on (`inspect --base`, or load_adapter's base)")
    count = heads[_HEADS[ending(module)][0]]
    if type(count) is not int or count < 1 or rows % (2 * count):
        msg = f"{path}: the {rows} rows of module {module!r} do not split into {str(count)[:60]} heads"
        raise AdapterError(msg + ": give the base it was trained on")
    return count


def _config(adapter: GGUFAdapter, entries: Mapping[str, Entry]) -> dict[str, Any]:
    metadata, path = adapter.header.metadata, adapter.file.path
    alpha = metadata.get(ALPHA, 0.0)
    if alpha != 0 and not is_alpha(alpha):
        raise AdapterError(f"{path}: {ALPHA} is {shown(metadata, ALPHA)}, expected a number: correct the file")
    ends = ".lora_A.weight", ".lora_embedding_A"
    factors = {name: entry.shape for name, entry in entries.items() if name.endswith(ends) and entry.shape}
    ranks = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]: max(shape[0], 1) for name, shape in factors.items()}
    settings = rank_settings(ranks)
    name = metadata.get("general.base_model.0.name")
    config = {
        "peft_type": "LORA",
        # The hub id of the first base that the file names, else its name.
        "base_model_name_or_path": hub_id_of(metadata.get("general.base_model.0.repo_url"))
        or (name if isinstance(name, str) else None),
        **settings,
        # llama.cpp does not scale if there is no alpha.
        "lora_alpha": alpha or settings["r"],
        "alpha_pattern": {} if alpha else settings["rank_pattern"],
    }
    tokens = metadata.get(INVOCATION)
    return config if tokens is None else {**config, "alora_invocation_tokens": tokens}


def write_gguf(contents: WriteRequest, folder: Path) -> None:
    """Write each module's own rank; alpha is the largest of them, and lora_b compensates for it."""
    base, tokens = contents.base, contents.adapter.info.invocation
    family, known, has_experts = (None, None, False) if base is None else (base.family, base.heads, base.has_experts)
    gguf, arch, heads = check_gguf(family, known, has_experts)
    alpha = float(max(contents.rank, 1))
    kind, file_type = _TYPES[contents.dtype]
    writer = gguf.GGUFWriter(folder / GGUF_WEIGHTS, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if tokens is not None:
        # llama.cpp requires UINT32; the writer would choose INT32 by itself.
        types = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, [int(token) for token in tokens], *types)
    if permutes_heads(arch):  # llama.cpp does not need them, but a reader without the base does.
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
    writer.add_file_type(gguf.LlamaFileType[file_type])
    if contents.base_name is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, contents.base_name)
        if is_hub_id(contents.base_name):
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{contents.base_name}")
    for key, value in sorted(contents.metadata.items()):
        writer.add_string(key, value)
    for name, factors in contents.modules.items():
        stored = gguf_name(f"{name}.weight", arch)
        if stored is None:
            msg = f"module {name!r} has no tensor in a GGUF of architecture {arch!r}: write it in another profile"
            raise OutputError(msg)
        scaled = replace(factors, scale=factors.scale * factors.rank / alpha)
        a, b = file_factors(name, scaled, contents.dtype)
        b = _permuted(name, b, heads) if permutes_heads(arch) else b
        for side, array in (("a", a), ("b", b)):
            # As bytes, because the writer does not know numpy's bfloat16.
            raw = array.view(np.uint8)
            writer.add_tensor(f"{stored}.lora_{side}", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()  # also on a full disk, where an open file would keep its space


def check_gguf(
    family: str | None, heads: tuple[int, int] | None, has_experts: bool = False
) -> tuple[ModuleType, str, tuple[int, int]]:
    """Return the gguf package, the architecture and the heads; raises an OutputError for an unsupported base."""
    try:
        gguf = importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise OutputError("profile gguf needs the gguf package: pip install 'jcrosslora[gguf]'") from error
    if family is None or heads is None:
        msg = "profile gguf needs the base model, whose heads decide the order of rows: name it with --base (base=...)"
        raise OutputError(msg)
    arch = architecture(family, has_experts)
    if arch is None:
        raise OutputError(f"profile gguf has no architecture for the family {family!r}: use another profile")
    return gguf, arch, heads


def _permuted(module: str, b: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """Reorder the rows of b as GGUF stores the module's; see `unpermuted_rows`."""
    if ending(module) not in _HEADS:
        return b
    count = heads[_HEADS[ending(module)][0]]
    if b.shape[0] % (2 * count):
        msg = f"module {module!r} has {b.shape[0]} rows, which do not split into {count} heads: "
        raise OutputError(msg + "it belongs to another base")
    stored = np.empty_like(b)
    stored[unpermuted_rows(b.shape[0], count)] = b
    return stored
