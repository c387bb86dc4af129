"""Adapters read by other engines, and by readers written from their documentation where the engines are not there."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_files import gguf, gguf_name
from safetensors.numpy import load_file

from jcrosslora.adapter import LoRAFactors, load_adapter


def peft_factors(folder: Path, heads=None) -> dict[str, LoRAFactors]:
    del heads
    return load_adapter(folder).modules


def mlx_factors(folder: Path, heads=None) -> dict[str, LoRAFactors]:
    """Read by mlx_lm's LORA.md and tuner: lora_a (I, K), lora_b (K, O), one rank and scale, keys inside a layer."""
    del heads
    config = json.loads((folder / "adapter_config.json").read_text())
    parameters, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    found = {}
    for name in {key.rpartition(".")[0] for key in tensors}:
        assert name.split(".", 3)[3] in parameters["keys"]
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        found[name] = LoRAFactors(a=a.T, b=b.T, scale=parameters["scale"])
    return found


def gguf_factors(folder: Path, heads: tuple[int, int]) -> dict[str, LoRAFactors]:
    """Read by src/llama-adapter.cpp: scale alpha / rank of the tensor; rows of a llama's q and k in pairs."""
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    tensors = {tensor.name: numbers(tensor) for tensor in reader.tensors}
    found = {}
    for key in (key for key in tensors if key.endswith(".lora_a")):
        stored = key.removesuffix(".lora_a")
        _, layer, part, _ = stored.split(".")
        a, b = tensors[key], tensors[f"{stored}.lora_b"]
        if fields["general.architecture"] == "llama" and part in ("attn_q", "attn_k"):
            b = in_pairs(b, heads[part == "attn_k"])
        found[f"{layer}.{part}"] = LoRAFactors(a=a, b=b, scale=fields["adapter.lora.alpha"] / a.shape[0])
    return found


def in_profile(name: str, profile: str) -> str:
    """Return the key of a llama's module in the result of a profile's reader."""
    return gguf_name(f"{name}.weight", "llama")[4:].removesuffix(".weight") if profile == "gguf" else name


def numbers(tensor) -> np.ndarray:
    """Decode bfloat16, which the reader returns as bytes."""
    data = np.array(tensor.data)
    return data.view(ml_dtypes.bfloat16) if tensor.tensor_type == gguf.GGMLQuantizationType.BF16 else data


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Move rows 2j and 2j + 1 of each head to its rows j and D/2 + j."""
    out, size = np.empty_like(rows), rows.shape[0] // heads
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + j] = rows[head * size + 2 * j]
            out[head * size + size // 2 + j] = rows[head * size + 2 * j + 1]
    return out


def mlx_log_probs(base: Path, adapter: Path, tokens: list[int]) -> np.ndarray:
    """Compute log-probabilities of the next token by mlx_lm's own loaders."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    model = load_adapters(load_model(base)[0], str(adapter))
    model.eval()
    return log_softmax(np.array(model(mx.array([tokens]))[0, -1].astype(mx.float32)))


def llama_cpp_log_probs(base: Path, adapter: Path, tokens: list[int], vocab: int) -> np.ndarray:
    """Compute the same by llama.cpp, as built by xllamacpp, with a cache in float32."""
    engine = pytest.importorskip("xllamacpp")
    params = engine.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 64, 1, 0, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [engine.CommonAdapterLoraInfo(str(adapter), 1.0)]
    wanted = {"prompt": tokens, "max_tokens": 1, "temperature": 0.0, "logprobs": vocab}
    answer = engine.Server(params).handle_completions(wanted)
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    result = np.full(vocab, np.nan)
    for entry in entries:
        result[entry["id"]] = entry["logprob"]
    return result


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
