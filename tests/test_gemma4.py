"""Gemma 4 in the places beside the decoder's pass: gradients, streams, comparisons, and files as they are published."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import random_model
from gradients_of_both import gradients_of_both
from hybrid_models import ATTENTION, HYBRIDS
from safetensors.numpy import load_file, save_file
from tiny_models import torch

import jcrosslora as jcl
from jcrosslora.architectures import LAYER_EMBEDDING
from jcrosslora.checkpoint import ROLE_PATHS
from jcrosslora.decoder import stack_adapter
from jcrosslora.errors import AdapterError
from jcrosslora.session.timing import time_layer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)
PLE = "model.per_layer_model_projection"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a model whose last layers read keys of others, with inputs of each layer."""
    folder = tmp_path_factory.mktemp("gemma4")
    random_model(*HYBRIDS["gemma4"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return jcl.open_base(folder)


def rewritten(folder, out, change):
    """Write the files again with other tensors."""
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | change(tensors), out / "model.safetensors", {"format": "pt"})
    return jcl.open_base(out)


def adapted(folder, targets):
    """A model with an adapter of peft, which is written too."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(random_model(*HYBRIDS["gemma4"]), config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.full
def test_gradients_through_keys_that_layers_share_are_those_of_torch(base, tmp_path):
    model = adapted(tmp_path, [*ATTENTION, "per_layer_input_gate"])
    stacked = stack_adapter(jcl.load_adapter(tmp_path, base), base)
    found, wanted = gradients_of_both(model, base, stacked, TOKENS)
    seen = set()
    for role, factors in found.roles.items():
        for layer, a, b in zip(base.layers_with(role), factors.a, factors.b, strict=True):
            for side, own in (("A", a), ("B", 1.5 * b)):  # the scale is part of our B
                name = f"base_model.model.model.layers.{layer}.{ROLE_PATHS[role]}.lora_{side}.default.weight"
                assert np.linalg.norm(own - wanted[name].numpy()) < 1e-3 * wanted[name].norm()
                seen.add(name)
    assert seen == set(wanted)


def test_heads_of_more_than_ten_layers_are_stated_as_transformers_does(tmp_path):
    name, settings = HYBRIDS["gemma4"]
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    random_model(name, settings | {"num_hidden_layers": 12, "layer_types": kinds}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    heads = {key: config.pop(key) for key in ("global_head_dim", "num_global_key_value_heads") if key in config}
    stated = {"head_dim": heads.get("global_head_dim") or 20}
    config["per_layer_config"] = {f"{layer:02}": stated for layer, kind in enumerate(kinds) if kind == kinds[2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert jcl.open_base(tmp_path).modules["model.layers.2.self_attn.q_proj"].shape[0] % 20 == 0


def test_keys_of_layers_that_read_those_of_others_are_ignored_as_in_transformers(folder, base, tmp_path):
    """Published files have such tensors, which the class drops."""
    own = base.tensor("model.layers.0.self_attn.k_proj.weight")
    other = rewritten(folder, tmp_path, lambda _: {"model.layers.3.self_attn.k_proj.weight": np.array(own)})
    assert set(other.modules) == set(base.modules)
    assert "model.layers.3.self_attn.k_proj" not in other.modules


def test_what_makes_the_inputs_of_layers_is_compared(folder, base, tmp_path):
    assert jcl.compare_bases(base, jcl.open_base(folder)).words == ("same",)

    def change(tensors):
        noise = np.random.default_rng(2).normal(size=tensors[LAYER_EMBEDDING].shape).astype(np.float32)
        return {LAYER_EMBEDDING: tensors[LAYER_EMBEDDING] + 0.01 * noise}

    assert jcl.compare_bases(base, rewritten(folder, tmp_path, change)).words != ("same",)


def test_updates_of_what_makes_the_inputs_of_layers_are_listed_as_left_behind(base, tmp_path):
    adapted(tmp_path / "all", "all-linear")
    adapter = jcl.load_adapter(tmp_path / "all", base)
    assert set(adapter.modules) == set(base.modules)
    (sentence,) = adapter.info.ignored
    assert sentence.startswith(f"updates of what makes the inputs of layers, {PLE}")
    adapted(tmp_path / "alone", [PLE.rpartition(".")[2]])
    with pytest.raises(AdapterError, match=f"{PLE}.*nothing can be moved"):
        jcl.load_adapter(tmp_path / "alone", base)


def test_the_time_of_a_layer_is_measured(base):
    assert time_layer(base, (1, 4), jnp.float32) > 0
