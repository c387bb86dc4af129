"""Each family as written by transformers and read back; the state dict is the oracle."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_model, torch

from jcrosslora.architectures import DENSE_ROLES, EMBEDDING
from jcrosslora.checkpoint import open_base


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(family: str, request):
    return tiny_model(family).to(request.param)


@pytest.fixture(scope="module", params=["single", "sharded"])
def base(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    limits = {"max_shard_size": "50KB"} if request.param == "sharded" else {}
    model.save_pretrained(folder, **limits)
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "sharded")
    return open_base(folder)


def as_float(array) -> np.ndarray:
    return array.detach().float().numpy() if isinstance(array, torch.Tensor) else array.astype(np.float32)


def test_every_tensor_equals_the_state_dict(model, base):
    state = model.state_dict()
    for name, tensor in state.items():
        read = base.tensor(name)
        assert read.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert np.array_equal(as_float(read), as_float(tensor)), name
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(base.store.names()) == set(state) - tied


def test_dims_equal_the_config(model, base):
    config = model.config
    dims = base.dims
    assert (dims.layers, dims.hidden, dims.intermediate) == (3, 48, 80)
    assert (dims.heads, dims.kv_heads, dims.vocab) == (4, 2, 96)
    assert dims.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def test_modules_are_the_linear_layers_in_order(model, base):
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    expected = [
        f"model.layers.{layer}.{'self_attn' if role in attention else 'mlp'}.{role}"
        for layer in range(3)
        for role in DENSE_ROLES
    ]
    assert list(base.modules) == expected
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[model.dtype]
    for module in base.modules.values():
        assert base.weight(module.name).shape == module.shape
        assert module.dtype == dtype


def test_each_module_computes_what_the_torch_module_computes(model, base, family):
    # The output of a fused torch module is split as in its forward pass.
    x = np.random.default_rng(0).standard_normal((2, 48)).astype(np.float32)
    layer = copy.deepcopy(model).float().model.layers[1]
    if family == "phi3":
        qkv = layer.self_attn.qkv_proj(torch.from_numpy(x)).detach().numpy()
        queries = model.config.num_attention_heads * layer.self_attn.head_dim
        gate, up = layer.mlp.gate_up_proj(torch.from_numpy(x)).chunk(2, dim=-1)
        keys = layer.self_attn.num_key_value_heads * layer.self_attn.head_dim
        outputs = {
            "self_attn.q_proj": qkv[..., :queries],
            "self_attn.k_proj": qkv[..., queries : queries + keys],
            "self_attn.v_proj": qkv[..., queries + keys :],
            "mlp.gate_proj": gate.detach().numpy(),
            "mlp.up_proj": up.detach().numpy(),
        }
    else:
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
        outputs = {}
        for name in names:
            module = layer.get_submodule(name)
            linear = torch.nn.functional.linear(torch.from_numpy(x), module.weight)
            outputs[name] = linear.detach().numpy()
    for name, output in outputs.items():
        ours = x @ as_float(base.weight(f"model.layers.1.{name}")).T
        assert np.allclose(ours, output, atol=1e-4), name


def test_fused_modules_hold_their_parts_in_row_order(base, family):
    if family != "phi3":
        assert base.fused == {}
        return
    assert len(base.fused) == 6
    parts = base.fused["model.layers.2.self_attn.qkv_proj"]
    assert parts == (
        ("model.layers.2.self_attn.q_proj", 0, 48),
        ("model.layers.2.self_attn.k_proj", 48, 72),
        ("model.layers.2.self_attn.v_proj", 72, 96),
    )
    whole = as_float(base.tensor("model.layers.2.mlp.gate_up_proj.weight"))
    pieces = [base.weight(f"model.layers.2.mlp.{role}") for role in ("gate_proj", "up_proj")]
    assert np.array_equal(np.concatenate([as_float(piece) for piece in pieces]), whole)


def test_residual_gain_is_the_factor_of_the_norm(model, base, family):
    # A norm's gain is its output divided by its normalised input.
    x = torch.from_numpy(np.random.default_rng(1).uniform(0.5, 1.5, 48).astype(np.float32))
    layer = copy.deepcopy(model).float().model.layers[2]

    def gain(norm) -> np.ndarray:
        return (norm(x) / (x / torch.sqrt((x * x).mean() + 1e-6))).detach().numpy()

    sandwich = family.startswith("gemma")
    before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
    expected = {
        "self_attn.q_proj": gain(layer.input_layernorm),
        "self_attn.k_proj": gain(layer.input_layernorm),
        "self_attn.v_proj": gain(layer.input_layernorm),
        "mlp.gate_proj": gain(before_mlp),
        "mlp.up_proj": gain(before_mlp),
        "self_attn.o_proj": gain(layer.post_attention_layernorm) if sandwich else np.ones(48),
        "mlp.down_proj": gain(layer.post_feedforward_layernorm) if sandwich else np.ones(48),
    }
    for name, wanted in expected.items():
        ours = base.residual_gain(f"model.layers.2.{name}")
        assert ours.dtype == np.float32
        assert np.allclose(ours, wanted, atol=1e-4), name


def test_embedding_rows_equal_the_state_dict(model, base):
    ids = np.array([95, 3, 3, 0])
    table = as_float(model.get_input_embeddings().weight)
    rows = base.rows(EMBEDDING, ids)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, table[ids])


@pytest.mark.parametrize("family_name", list(FAMILIES))
def test_a_config_of_transformers_4_is_read(family_name: str, tmp_path: Path):
    tiny_model(family_name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"], config["rope_scaling"] = 10000.0, None
    if family_name == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 6
    config.pop("layer_types", None)
    config["transformers_version"] = "4.40.0"
    path.write_text(json.dumps(config))
    assert open_base(tmp_path).dims.layers == 3


def test_biases_of_the_config_are_read(tmp_path: Path):
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path)
    base = open_base(tmp_path)
    for name, tensor in model.state_dict().items():
        assert np.array_equal(base.tensor(name), tensor.numpy()), name


def test_the_text_model_of_a_multimodal_gemma3_is_read(tmp_path: Path):
    # A text model under the prefixes of transformers 4 and 5, with a vision tensor beside it.
    numpy_io = pytest.importorskip("safetensors.numpy")
    model = tiny_model("gemma3_text", num_attention_heads=8, num_key_value_heads=4)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    text = {
        key: model.config.to_dict()[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "head_dim", "vocab_size")
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text | {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"hidden_size": 4},
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
    }
    for old in ("language_model.model.", "model.language_model."):
        folder = tmp_path / old
        folder.mkdir()
        stored = {old + name.removeprefix("model."): array for name, array in state.items()}
        numpy_io.save_file(stored | {"vision_tower.x": np.ones(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        base = open_base(folder)
        assert base.family.name == "gemma3_text"
        assert base.dims.heads == 8
        assert set(base.store.names()) == set(state)
        for name, array in state.items():
            assert np.array_equal(base.tensor(name), array), name
