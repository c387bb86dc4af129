"""Each architecture written as GGUF from a transformers model and read back; the state dict is the oracle."""

from pathlib import Path

import numpy as np
import pytest
from gguf_files import ARCHITECTURES, converted, gguf, gguf_name, metadata_of, small_llama, write_gguf
from tiny_models import FAMILIES, tiny_model, torch, transformers

from jcrosslora.checkpoint import open_base


@pytest.fixture(scope="module", params=list(FAMILIES))
def written(request, tmp_path_factory):
    family = request.param
    overrides = {"llama": {"attention_bias": True, "mlp_bias": True}, "phi3": {"partial_rotary_factor": 0.5}}
    overrides["gemma3_text"] = {"num_hidden_layers": 7}  # one full layer among sliding ones
    model = tiny_model(family, **overrides.get(family, {}))
    arch = ARCHITECTURES[family]
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    tensors = {
        gguf_name(name, arch): (converted(name, tensor.numpy(), arch, heads), None)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    path = tmp_path_factory.mktemp("gguf") / f"{family}.gguf"
    return model, open_base(write_gguf(path, arch, metadata_of(model.config, arch), tensors))


def test_every_tensor_equals_the_state_dict(written):
    model, base = written
    for name, tensor in model.state_dict().items():
        read, gemma_norm = base.tensor(name), base.family.gain_offset and name.endswith("norm.weight")
        # A norm of Gemma is stored as 1 + w in float32.
        assert np.allclose(read, tensor.numpy(), rtol=0, atol=1e-6 if gemma_norm else 0), name
        assert read.dtype == np.float32


def test_rows_equal_the_rows_of_the_tensor(written):
    model, base = written
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            ids = np.array([tensor.shape[0] - 1, 0, 5, 5])
            assert np.array_equal(base.rows(name, ids), tensor.numpy()[ids]), name


def test_transformers_builds_the_same_model_from_our_config(written):
    model, base = written
    config = transformers.AutoConfig.for_model(**base.config)
    config._attn_implementation = "eager"
    rebuilt = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(np.array(base.tensor(name))) for name in model.state_dict()}
    rebuilt.load_state_dict(state)
    # Longer than the sliding window of 16, so that layer types and both rope bases matter.
    tokens = torch.arange(40).reshape(1, 40) % 90
    with torch.no_grad():
        assert torch.allclose(rebuilt(tokens).logits, model(tokens).logits, atol=2e-4)


def test_residual_gain_equals_that_of_the_safetensors_reader(written, tmp_path: Path):
    model, base = written
    model.save_pretrained(tmp_path)
    other = open_base(tmp_path)
    for name in other.modules:
        assert np.allclose(base.residual_gain(name), other.residual_gain(name), atol=1e-6), name
        assert np.array_equal(base.weight(name), other.weight(name)), name
    assert base.dims == other.dims
    assert base.fused == other.fused


def test_transformers_reads_the_same_numbers_from_our_gguf(written, tmp_path: Path):
    _, base = written
    if base.family.name == "qwen3":
        pytest.skip("transformers 5.24 takes no head size from a qwen3 GGUF")
    (tmp_path / "x.gguf").symlink_to(base.path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    for name, tensor in oracle.state_dict().items():
        assert np.allclose(base.tensor(name), tensor.numpy(), rtol=0, atol=1e-6), name


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_transformers_reads_the_same_numbers_from_a_llama_gguf(kind: str, tmp_path: Path):
    quant = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
    path, _ = small_llama(tmp_path / "x.gguf", {"vocab_size": 10, "rope.dimension_count": 16}, kind=quant)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    base = open_base(path)
    for name, tensor in oracle.state_dict().items():
        assert np.array_equal(base.tensor(name), tensor.numpy()), name
    assert base.modules["model.layers.0.self_attn.q_proj"].dtype == kind


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_are_recognised(factor: float, tmp_path: Path):
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**sizes, rope_parameters=parameters)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    factors = (plain / scaled.numpy()).astype(np.float32)
    path, _ = small_llama(
        tmp_path / "x.gguf", {"rope.freq_base": 500000.0}, extra={"rope_freqs.weight": (factors, None)}
    )
    assert open_base(path).config["rope_parameters"] == parameters
