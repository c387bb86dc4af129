"""Gemma 4 from GGUF files: its predictions, what published files hold beside the model, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import random_model
from full_set import full_except
from gguf_files import write_gguf
from gguf_forms import SPARSE_FORMS, metadata_of, stored_tensors
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.checkpoint import architecture
from jcrosslora.decoder import forward, load_model, logits, settings_of
from jcrosslora.errors import CheckpointError

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)
DENSE = SPARSE_FORMS["gemma4"]
UNIFIED = {
    "num_hidden_layers": 6,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 6,
    "final_logit_softcapping": 3.0,
}
OF_UNIFIED = {
    "attention.shared_kv_layers": 0,
    "attention.sliding_window": 6,
    "attention.sliding_window_pattern": [*[True] * 5, False],
    "attention.head_count_kv": [*[2] * 5, 1],
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.key_length_swa": 8,
    "attention.value_length_swa": 8,
    "embedding_length_per_layer_input": 0,
    "rope.freq_base": 1_000_000.0,
    "rope.freq_base_swa": 10_000.0,
    "rope.dimension_count": 16,
    "rope.dimension_count_swa": 8,
    "final_logit_softcapping": 3.0,
}


def write(path, form=DENSE, drop=(), extra=None, **changed):
    """Write a form with some of its metadata or tensors left out, changed or added; return the model and its base."""
    model = random_model(form.family, form.settings)
    metadata = metadata_of(model, form) | {key.replace("__", "."): value for key, value in changed.items()}
    stored = stored_tensors(model, form) | (extra or {})
    metadata, stored = ({key: one for key, one in part.items() if key not in drop} for part in (metadata, stored))
    return model, write_gguf(path / "model.gguf", form.arch, metadata, stored)


def predict(base):
    ours = load_model(base, jnp.float32)
    return np.asarray(logits(ours, forward(ours, jnp.asarray(TOKENS)).hidden))


@pytest.mark.parametrize("name", full_except(["gemma4", "gemma4-experts"], ["gemma4-experts"]))
def test_predictions_are_those_from_safetensors(name, tmp_path):
    model, path = write(tmp_path, SPARSE_FORMS[name])
    model.save_pretrained(tmp_path / "folder")
    found, wanted = predict(jcl.open_base(path)), predict(jcl.open_base(tmp_path / "folder"))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_a_unified_model_is_read_as_gemma4_and_has_its_adapters(tmp_path):
    form = type(DENSE)("gemma4_unified_text", "gemma4", UNIFIED, OF_UNIFIED, rotated=2)
    model, path = write(tmp_path, form)
    base, live = jcl.open_base(path), jcl.open_base(model)
    assert base.family.name == "gemma4_text"
    assert architecture(live.family.name, live.has_experts) == "gemma4"
    np.testing.assert_allclose(predict(base), predict(live), atol=1e-4, rtol=0)
    adapter = random_adapter(live, rank=2, roles=["q_proj", "global_q_proj", "global_k_proj", "down_proj"])
    out = jcl.save_adapter(adapter, tmp_path / "out", base=live, profile="gguf")
    for base_of in (live, base):
        again = jcl.load_adapter(out / "adapter.gguf", base_of)
        assert set(again.modules) == set(adapter.modules)
        for name, factors in adapter.modules.items():
            read = again.modules[name]
            np.testing.assert_allclose(read.scale * read.b @ read.a, factors.b @ factors.a, atol=1e-5)


def test_keys_of_layers_that_read_those_of_others_are_ignored(tmp_path):
    """The converter writes them where published files have them."""
    plain = jcl.open_base(write(tmp_path)[1])
    modules, settings = set(plain.modules), settings_of(plain)
    weights = {f"blk.{layer}.attn_{part}.weight": np.ones((24, 32), np.float32) for layer in (3, 4) for part in "kv"}
    norms = {f"blk.{layer}.attn_k_norm.weight": np.ones(12, np.float32) for layer in (3, 4)}
    extra = {name: (array, None) for name, array in (weights | norms).items()}
    base = jcl.open_base(write(tmp_path, extra=extra)[1])
    assert set(base.modules) == modules
    assert settings_of(base) == settings


def test_logits_are_not_capped_where_the_metadata_do_not_say_so(tmp_path):
    _, path = write(tmp_path, drop=["final_logit_softcapping"])
    assert settings_of(jcl.open_base(path)).final_soft_cap is None


@pytest.mark.parametrize(
    ("drop", "changed", "message"),
    [
        (["rope_freqs.weight"], {}, "rope_freqs.weight is missing, or does not hold 1 for the first pairs of 20"),
        (["attention.sliding_window_pattern"], {}, "sliding_window_pattern is None, expected a list that says of 6"),
        (["attention.key_length_swa"], {}, "'attention.key_length_swa' is None, expected a positive integer"),
        ([], {"feed_forward_length": [40, 80]}, r"feed_forward_length is \[40, 80\], expected a positive integer, or"),
        (
            [],
            {"feed_forward_length": [40, 40, 40, 90, 90, 90]},
            "expected twice the width for the last 3 layers, or one for",
        ),
        ([], {"attention__shared_kv_layers": 6}, "attention.shared_kv_layers is 6, expected fewer than 6 layers"),
        ([], {"rope__dimension_count_swa": 6}, "rope.dimension_count_swa is '6', which is not supported"),
        ([], {"rope__scaling__type": "linear"}, "rope.scaling.type is 'linear', which is not supported"),
        (["blk.2.attn_v.weight"], {"embedding_length_per_layer_input": 7}, "has shape"),
        (["blk.1.attn_v.weight"], {}, "layers.1.self_attn.v_proj.weight is missing"),
    ],
)
def test_what_does_not_fit_is_refused(drop, changed, message, tmp_path):
    _, path = write(tmp_path, drop=drop, **changed)
    with pytest.raises(CheckpointError, match=message):
        jcl.open_base(path)


def test_experts_with_matrices_of_their_own_are_refused(tmp_path):
    extra = {"blk.0.ffn_gate_exps.weight": (np.ones((5, 12, 32), np.float32), None)}
    _, path = write(tmp_path, SPARSE_FORMS["gemma4-experts"], extra=extra)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_gate_exps.weight' is not known for architecture 'gemma4'"):
        jcl.open_base(path)
