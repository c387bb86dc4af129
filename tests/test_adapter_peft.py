"""Reading against peft: base weights plus our updates equal peft's merged weights."""

import numpy as np
import pytest
from adapter_folders import delta
from tiny_models import tiny_model, torch

from jcrosslora.adapter import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYERS = 12  # Layers 1 and 11 share a prefix.


def trained(folder, **settings):
    """Save an adapter with random factors; return the weights of the base and the merged weights, by name."""
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    wrapped.save_pretrained(folder)
    return base, wrapped.merge_and_unload().state_dict()


CASES = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "rank pattern": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2, "up_proj": 7}},
    "alpha pattern": {"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
    "distill": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3, "layers.2.self_attn.q_proj": 5},
        "alpha_pattern": {r"^model\.layers\.\d\.mlp\.down_proj": 1, "down_proj": 5},
    },
    "first match wins": {
        "target_modules": ["q_proj"],
        "alpha_pattern": {r"layers\.1.*q_proj": 3, "model.layers.1.self_attn.q_proj": 30},
    },
    "rslora and patterns": {
        "target_modules": ["o_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.[0-4]\..*": 9},
        "alpha_pattern": {r".*\.11\..*": 2},
    },
    "regex": {"target_modules": r".*\.layers\.(1|11)\.mlp\.(up|gate)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["k_proj"], "layers_to_transform": [1, 11]},
    "exclude": {"target_modules": ["k_proj", "q_proj"], "exclude_modules": ["layers.1.self_attn.k_proj"]},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_merged_weights_equal_those_of_peft(tmp_path, settings):
    base, merged = trained(tmp_path, **settings)
    modules = load_adapter(tmp_path).modules
    changed = {name.removesuffix(".weight") for name in base if not torch.equal(base[name], merged[name])}
    assert changed == set(modules)
    for name, factors in modules.items():
        want = merged[f"{name}.weight"].numpy()
        got = base[f"{name}.weight"].numpy().astype(np.float64) + delta(factors)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors_keep_their_bits(tmp_path, dtype):
    model = tiny_model("llama", num_hidden_layers=1).to(getattr(torch, dtype))
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    wrapped.save_pretrained(tmp_path)
    factors = load_adapter(tmp_path).modules["model.layers.0.self_attn.q_proj"]
    assert factors.b.dtype.name == dtype
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    np.testing.assert_array_equal(factors.b.astype(np.float32), layer.lora_B["default"].weight.detach().float().numpy())


def test_other_tensors_of_peft_are_listed_as_ignored(tmp_path):
    model = tiny_model("qwen2", num_hidden_layers=1, tie_word_embeddings=False)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], bias="lora_only"
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = load_adapter(tmp_path)
    assert list(adapter.modules) == ["model.layers.0.self_attn.q_proj"]
    said = " ".join(adapter.info.ignored)
    assert all(word in said for word in ("embedding", "lm_head", "biases"))
