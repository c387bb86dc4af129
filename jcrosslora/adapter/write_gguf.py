"""Write the format of llama.cpp: one GGUF file of type adapter.

A module's factors are named after the base's tensor, `blk.0.attn_q.weight.lora_a` (K, I) and `.lora_b` (O, K), and the
update is lora_b lora_a times adapter.lora.alpha over the rank of the tensor. For Llama and families like it the base
has rows of q and k reordered, and the rows of lora_b with them. Source: llama.cpp's src/llama-adapter.cpp.
"""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jcrosslora.adapter.contents import Contents, file_factors
from jcrosslora.adapter.folder import GGUF_WEIGHTS
from jcrosslora.adapter.names import ending
from jcrosslora.checkpoint.gguf_names import architecture, gguf_name, permutes_heads
from jcrosslora.checkpoint.gguf_tensors import unpermuted_rows
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.errors import OutputError

# dtype -> ggml type of a tensor, and file type of a file that mostly holds it.
_TYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}


def write_gguf(contents: Contents, folder: Path) -> None:
    """Write each module's own rank; alpha is the largest of them, and lora_b compensates for it.

    Raises:
        OutputError: see `check_gguf`; a module that the architecture has no tensor for; values that do not fit the
            dtype.
    """
    gguf, arch, heads = check_gguf(contents.family, contents.heads, contents.has_experts)
    alpha = float(max(contents.rank, 1))
    kind, file_type = _TYPES[contents.dtype]
    writer = gguf.GGUFWriter(folder / GGUF_WEIGHTS, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if contents.invocation is not None:
        # llama.cpp requires UINT32; the writer would choose INT32 by itself.
        types = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        tokens = [int(token) for token in contents.invocation]
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, *types)
    if permutes_heads(arch):  # llama.cpp does not need them, but a reader without the base does.
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
    writer.add_file_type(gguf.LlamaFileType[file_type])
    _add_base(writer, contents.base_name)
    for key, value in sorted(contents.metadata.items()):
        writer.add_string(key, value)
    for name, factors in contents.modules.items():
        stored = gguf_name(f"{name}.weight", arch)
        if stored is None:
            msg = f"module {name!r} has no tensor in a GGUF of architecture {arch!r}: write it in another profile"
            raise OutputError(msg)
        scaled = dataclasses.replace(factors, scale=factors.scale * factors.rank / alpha)
        a, b = file_factors(name, scaled, contents.dtype)
        _add(writer, gguf, kind, f"{stored}.lora_a", a)
        _add(writer, gguf, kind, f"{stored}.lora_b", _permuted(name, b, heads) if permutes_heads(arch) else b)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()  # also on a full disk, where an open file would keep its space


def check_gguf(
    family: str | None, heads: tuple[int, int] | None, has_experts: bool = False
) -> tuple[ModuleType, str, tuple[int, int]]:
    """Return the gguf package, the architecture and the heads, or refuse a base that cannot be written for.

    Raises:
        OutputError: the package is missing, the base is not known, or GGUF has no architecture for its family.
    """
    try:
        gguf = importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        msg = "profile gguf needs the gguf package: pip install 'jcrosslora[gguf]'"
        raise OutputError(msg) from error
    if family is None or heads is None:
        msg = "profile gguf needs the base model, whose heads decide the order of rows: name it with --base (base=...)"
        raise OutputError(msg)
    arch = architecture(family, has_experts)
    if arch is None:
        msg = f"profile gguf has no architecture for the family {family!r}: use another profile"
        raise OutputError(msg)
    return gguf, arch, heads


def _add_base(writer: Any, name: str | None) -> None:
    if name is None:
        return
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    if is_hub_id(name):
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")


def _add(writer: Any, gguf: ModuleType, kind: str, name: str, array: np.ndarray) -> None:
    # As bytes, because the writer does not know numpy's bfloat16.
    writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])


def _permuted(module: str, b: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """Reorder the rows of b as GGUF stores those of the module; see `unpermuted_rows`."""
    count = {"q_proj": heads[0], "k_proj": heads[1]}.get(ending(module))
    if count is None:
        return b
    if b.shape[0] % (2 * count):
        msg = f"module {module!r} has {b.shape[0]} rows, which do not split into {count} heads: "
        msg += "it belongs to another base"
        raise OutputError(msg)
    stored = np.empty_like(b)
    stored[unpermuted_rows(b.shape[0], count)] = b
    return stored
