"""Families beyond the first seven in GGUF files: names of the gguf package, numbers of the model in torch."""

from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import random_model
from full_set import full_except
from gguf_files import write_gguf
from gguf_forms import FORMS, SPARSE_FORMS, metadata_of, stored_tensors, write_form
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.architectures import EMBEDDING
from jcrosslora.checkpoint import architecture, expert_tensors, gguf_name
from jcrosslora.decoder import forward, load_model, logits, settings_of
from jcrosslora.errors import CheckpointError, OutputError


@pytest.fixture(scope="module", params=list(FORMS | SPARSE_FORMS))
def written(request, tmp_path_factory):
    form = (FORMS | SPARSE_FORMS)[request.param]
    model, path = write_form(tmp_path_factory.mktemp("gguf") / "model.gguf", form)
    return form, model, jcl.open_base(path)


def test_a_gguf_file_holds_the_tensors_and_settings_of_the_model(written):
    form, model, base = written
    assert base.family.name == form.family
    live = jcl.open_base(model)
    of_experts = {name for layer in live.layers_with("router") for name in live.experts.names(layer)}
    for stated, tensor in model.state_dict().items():
        name = EMBEDDING if stated == f"{base.family.stored.embedding}.weight" else stated
        if name in of_experts:
            continue
        atol = 2e-6 if form.offset or name.endswith("A_log") else 0
        np.testing.assert_allclose(base.tensor(name), tensor.numpy(), rtol=0, atol=atol, err_msg=name)
        if tensor.ndim == 2:
            ids = np.array([tensor.shape[0] - 1, 0, tensor.shape[0] // 2, 0])
            np.testing.assert_array_equal(base.rows(name, ids), base.tensor(name)[ids], err_msg=name)
    for layer in base.layers_with("router"):
        for name in expert_tensors(base.family.experts):
            np.testing.assert_array_equal(base.experts.tensor(layer, name), live.experts.tensor(layer, name))
    found, wanted = (asdict(settings_of(one)) for one in (base, live))
    ropes = [[tuple(rope.values()) for rope in settings.pop("ropes")] for settings in (found, wanted)]
    for (ours, *rest), (theirs, *others) in zip(*ropes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the base of the frequencies is stored as float32
        assert rest == others
    assert found == wanted


def test_a_gguf_adapter_is_read_as_it_was_written(written, tmp_path):
    form, _, base = written
    assert architecture(form.family, base.has_experts) == form.arch
    adapter = random_adapter(
        base, rank=2, roles=[role for role in base.architecture.role_shapes if _has_tensor(base, form, role)]
    )
    out = jcl.save_adapter(adapter, tmp_path / "out", base=base, profile="gguf")
    again = jcl.load_adapter(out / "adapter.gguf", base)
    holders = {parts[0][0]: whole for whole, parts in base.fused.items()}
    assert set(again.modules) == {holders.get(name, name) for name in adapter.modules}
    for name, factors in adapter.modules.items():
        read = again.modules[holders.get(name, name)]
        np.testing.assert_allclose(read.scale * read.b @ read.a, factors.b @ factors.a, atol=1e-5)


def _has_tensor(base, form, role) -> bool:
    """Whether a tensor of the file has the rows and columns of the modules of a role."""
    holders = {parts[0][0]: whole for whole, parts in base.fused.items() if len(parts) == 1}
    modules = [name for name, module in base.modules.items() if module.role == role]
    return all(gguf_name(f"{holders.get(name, name)}.weight", form.arch) is not None for name in modules)


@pytest.mark.parametrize(
    "name", full_except(["deepseek_v2-groups", "mistral4-growing", "nemotron_h-latent"], ["deepseek_v2-groups"])
)
def test_predictions_are_those_from_safetensors(name, tmp_path):
    model, path = write_form(tmp_path / "model.gguf", SPARSE_FORMS[name])
    model.save_pretrained(tmp_path / "folder")
    found, wanted = (_predict(jcl.open_base(place)) for place in (path, tmp_path / "folder"))
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


def _predict(base) -> np.ndarray:
    ours = load_model(base, jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 64, (2, 13)))
    return np.asarray(logits(ours, forward(ours, tokens).hidden))


def test_lists_of_another_length_are_refused(tmp_path):
    form = FORMS["apertus"]
    model = random_model(form.family, form.settings)
    metadata = metadata_of(model, form) | {"xielu.alpha_p": [0.5]}
    path = write_gguf(tmp_path / "model.gguf", form.arch, metadata, stored_tensors(model, form))
    with pytest.raises(CheckpointError, match=r"xielu.alpha_p is \[0.5\], expected a number for each of 2 layers"):
        jcl.open_base(path)


def test_ministral_without_its_scale_is_refused(tmp_path):
    form = FORMS["ministral3"]
    model = random_model(form.family, form.settings)
    metadata = {key: value for key, value in metadata_of(model, form).items() if "temperature" not in key}
    path = write_gguf(tmp_path / "model.gguf", form.arch, metadata, stored_tensors(model, form))
    with pytest.raises(CheckpointError, match="temperature_scale is missing"):
        jcl.open_base(path)


def _rewritten(path, name, drop=(), extra=None, **changed):
    """Write a form with some of its metadata left out or changed, and more tensors."""
    form = SPARSE_FORMS[name]
    model = random_model(form.family, form.settings)
    metadata = metadata_of(model, form) | {key.replace("__", "."): value for key, value in changed.items()}
    metadata = {key: value for key, value in metadata.items() if key not in drop}
    return model, write_gguf(path, form.arch, metadata, stored_tensors(model, form) | (extra or {}))


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("deepseek_v3", ["expert_gating_func"], "it has expert_weights_norm: it is neither a DeepSeek V2 nor a V3"),
        ("deepseek_v2", ["expert_group_count"], "expert_group_count is missing, as in older files"),
        ("mistral4", ["rope.scaling.type"], "temperature_scale is missing, or rope.scaling.yarn_log_multiplier"),
        ("nemotron_h", ["attention.head_count_kv"], "head_count_kv is None, expected a list with an entry for each"),
        ("nemotron_h", ["attention.layer_norm_epsilon"], r"layer_norm_epsilon are \[None, None\], expected one number"),
        ("nemotron_h", ["feed_forward_length"], "feed_forward_length is None, expected a list with an entry for each"),
        ("granite-dense", ["attention.scale"], "such as Bamba, are not supported"),
        ("lfm2", ["attention.head_count_kv"], "head_count_kv is None, expected a list with the heads of each layer"),
        ("qwen3_5", ["ssm.inner_size"], "config key 'ssm.inner_size' is None, expected a positive integer"),
    ],
)
def test_metadata_that_other_models_have_are_refused(tmp_path, name, drop, message):
    _, path = _rewritten(tmp_path / "model.gguf", name, drop)
    with pytest.raises(CheckpointError, match=message):
        jcl.open_base(path)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("glm4_moe", {"expert_gating_func": 1}, "expert_gating_func is 1, which glm4_moe does not have"),
        ("deepseek_v3", {"expert_gating_func": 3}, "expert_gating_func is 3, which deepseek_v3 does not have"),
        # As in files of Mistral Large 3.
        ("deepseek_v2", {"attention__temperature_scale": 0.1}, "it has attention.temperature_scale: it is neither a"),
        (
            "mistral4-growing",
            {"attention__temperature_length": 7},
            "temperature_length is 7, expected the original",
        ),
        (
            "mistral4",
            {"rope__scaling__yarn_log_multiplier": 0.07},
            "yarn_log_multiplier is 0.07, expected 0.1: use the",
        ),
        ("nemotron_h", {"attention__layer_norm_rms_epsilon": 1e-5}, "layer_norm_epsilon are .*, expected one number"),
        ("llama4", {"attention__sliding_window": 0}, "llama4.attention.sliding_window is 0, expected 8192 or nothing"),
        ("llama4", {"attention__sliding_window_pattern": 2}, "sliding_window_pattern is 2, expected 4 or nothing"),
        ("llama4", {"rope__freq_base_swa": 100.0}, "freq_base_swa is 100.0, expected 500000.0 or nothing: use the"),
        ("llama4", {"expert_gating_func": 1}, "expert_gating_func is 1, which llama4_text does not have"),
        ("llama4", {"expert_count": 0}, "'num_local_experts' is 0, expected a positive integer"),
        ("nemotron_h", {"expert_count": 8}, "experts are not supported for architecture 'nemotron_h'"),
        ("cohere2_moe", {"expert_gating_func": 1}, "expert_gating_func is 1, which cohere2_moe does not have"),
        ("cohere2_moe", {"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5, which cohere2_moe does not have"),
        # llama.cpp rotates both dense layers, the class perhaps the one that slides alone.
        ("cohere2_moe", {"leading_dense_block_count": 2}, "of sliding and of full attention, and which have positions"),
    ],
)
def test_metadata_that_the_class_does_not_have_are_refused(tmp_path, name, changed, message):
    _, path = _rewritten(tmp_path / "model.gguf", name, **changed)
    with pytest.raises(CheckpointError, match=message):
        jcl.open_base(path)


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("falcon-h1", "hold the factors"),
        ("phimoe", "weighs the experts"),
    ],
)
def test_architectures_whose_files_do_not_hold_the_model_are_refused(tmp_path, arch, why):
    path = write_gguf(tmp_path / "model.gguf", arch, {"block_count": 1}, {"x": (np.ones((2, 2), np.float32), None)})
    with pytest.raises(CheckpointError, match=f"{why}.*use the safetensors of the model"):
        jcl.open_base(path)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    extra = {f"blk.5.{name}.weight": (np.ones((4, 4), np.float32), None) for name in ("attn_q", "nextn.eh_proj")}
    flags = [True, True, False, True, True, False]
    changed = {"block_count": 6, "nextn_predict_layers": 1, "attention__recurrent_layers": flags}
    model, path = _rewritten(tmp_path / "model.gguf", "qwen3_5", extra=extra, **changed)
    base = jcl.open_base(path)
    assert base.dims.layers == 5
    assert settings_of(base).stack == settings_of(jcl.open_base(model)).stack


@pytest.mark.parametrize("further", [[], [False]])
def test_kinds_of_attention_are_listed_with_layers_that_predict_further_tokens_or_without(tmp_path, further):
    extra = {"blk.5.nextn.eh_proj.weight": (np.ones((4, 4), np.float32), None)}
    kinds = {"attention__sliding_window_pattern": [False, True, True, True, False, *further]}
    changed = kinds | {"block_count": 6, "nextn_predict_layers": 1}
    # llama.cpp takes sigmoids where no scores are stated.
    drop = ["expert_gating_func"]
    model, path = _rewritten(tmp_path / "model.gguf", "cohere2_moe", drop, extra=extra, **changed)
    found, wanted = (settings_of(jcl.open_base(one)) for one in (path, model))
    assert found.windows == wanted.windows == (None, 6, 6, 6, None)
    assert found.stack == wanted.stack
    assert {layer.experts.routing.scores for layer in found.stack if layer.experts} == {"chosen sigmoid"}


def test_layers_of_nemotron_h_that_predict_further_tokens_are_left_out(tmp_path):
    """Such a layer has attention and experts at once."""
    extra = {f"blk.5.{name}.weight": (np.ones((48, 32), np.float32), None) for name in ("attn_q", "ffn_up_shexp")}
    lists = {"attention__head_count_kv": [0, 0, 2, 0, 0, 2], "feed_forward_length": [0, 12, 0, 0, 12, 12]}
    changed = lists | {"block_count": 6, "nextn_predict_layers": 1}
    model, path = _rewritten(tmp_path / "model.gguf", "nemotron_h-experts", extra=extra, **changed)
    assert jcl.open_base(path).architecture.stack == jcl.open_base(model).architecture.stack


def test_layers_without_a_list_are_of_full_attention_by_their_interval(tmp_path):
    _, path = _rewritten(tmp_path / "model.gguf", "qwen3_5", ["attention.recurrent_layers"], full_attention_interval=3)
    assert jcl.open_base(path).layers_with("o_proj") == (2,)


def test_keys_and_values_of_latents_in_one_matrix_are_read(tmp_path):
    """As in files of before the absorbed form, which also state the sizes of heads by other keys."""
    form = SPARSE_FORMS["deepseek_v3"]
    model = random_model(form.family, form.settings)
    stored, state = stored_tensors(model, form), model.state_dict()
    for layer in range(3):
        del stored[f"blk.{layer}.attn_k_b.weight"], stored[f"blk.{layer}.attn_v_b.weight"]
        whole = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        stored[f"blk.{layer}.attn_kv_b.weight"] = state[whole].numpy(), None
    metadata = {key: value for key, value in metadata_of(model, form).items() if not key.endswith("_mla")}
    metadata |= {"attention.key_length": 14, "attention.value_length": 7, "attention.head_count_kv": 4}
    base = jcl.open_base(write_gguf(tmp_path / "model.gguf", form.arch, metadata, stored))
    np.testing.assert_array_equal(base.tensor(whole), state[whole].numpy())


@pytest.mark.parametrize(
    ("name", "role", "reads"),
    [
        ("deepseek_v2", "q_a_proj", False),
        ("deepseek_v2-direct", "q_proj", False),
        ("deepseek_v2", "shared_up_proj", True),
        ("nemotron_h-latent", "expert_in_proj", False),
        ("nemotron_h-latent", "q_proj", True),
    ],
)
def test_what_llama_cpp_loads_and_does_not_add_is_said(tmp_path, name, role, reads):
    _, path = write_form(tmp_path / "model.gguf", SPARSE_FORMS[name])
    base = jcl.open_base(path)
    adapter = random_adapter(base, rank=2, roles=[role])
    for profile in ("gguf", "portable"):
        out = jcl.save_adapter(adapter, tmp_path / profile, base=base, profile=profile)
        verdict = next(one for one in jcl.check_engines(out, base=base) if one.engine == "llama.cpp")
        assert verdict.reads == reads
        assert reads or "latent attention and does not add it" in verdict.reasons[0]


def test_modules_in_another_order_than_in_the_file_have_no_gguf_adapter(tmp_path):
    _, path = _rewritten(tmp_path / "model.gguf", "qwen3_5")
    base = jcl.open_base(path)
    adapter = random_adapter(base, rank=2, roles=["in_proj_qkv"])
    with pytest.raises(OutputError, match="in_proj_qkv' has no tensor in a GGUF of architecture 'qwen35'"):
        jcl.save_adapter(adapter, tmp_path / "out", base=base, profile="gguf")
