"""Reading PEFT folders: updates are read, other changes listed, and unreadable files refused with one line."""

import json
import math
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import CONFIG, Q, V, delta, matrix, tensors, write_folder
from command_line import main

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.names import exact_pattern, matching_key
from jcrosslora.errors import AdapterError

A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"


def refusal(folder) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_factors_keep_their_values_and_dtype(tmp_path, dtype):
    weights = tensors(dtype=dtype)
    adapter = load_adapter(write_folder(tmp_path / "a", weights=weights))
    assert list(adapter.modules) == [Q, V]
    factors = adapter.modules[Q]
    assert factors.a.dtype == factors.b.dtype == dtype
    assert factors.a.flags.c_contiguous
    assert factors.a.flags.owndata
    np.testing.assert_array_equal(factors.a, weights[A])
    np.testing.assert_array_equal(factors.b, weights[B])
    assert factors.scale == 2.0
    assert adapter.info.digest is not None
    assert adapter.info.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("extra", "scale"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"lora_alpha": 22.6}, 11.3),
        ({"alpha_pattern": {"q_proj": 10, "layers.0.self_attn.q_proj": 99}}, 5.0),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 99}}, 2.0),
        ({"alpha_pattern": {r"^model\.layers\.[01]\..*": 6}}, 3.0),
        ({"target_modules": r".*\.q_proj"}, 2.0),
        ({"target_modules": "all-linear"}, 2.0),
        ({"target_modules": None}, 2.0),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, 2.0),
        ({"exclude_modules": ["o_proj"]}, 2.0),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, 2.0),
    ],
)
def test_scale_follows_the_configuration(tmp_path, extra, scale):
    adapter = load_adapter(write_folder(tmp_path / "a", CONFIG | extra))
    assert adapter.modules[Q].scale == pytest.approx(scale, rel=1e-15)


def test_pattern_of_layer_1_leaves_layer_11_alone():
    keys = ["layers.1.mlp.up_proj", exact_pattern("model.layers.2.mlp.up_proj")]
    assert matching_key(keys, "model.layers.1.mlp.up_proj") == keys[0]
    assert matching_key(keys, "model.layers.11.mlp.up_proj") is None
    assert matching_key(keys, "model.layers.2.mlp.up_proj") == keys[1]
    assert matching_key(keys, "vision.model.layers.2.mlp.up_proj") is None
    assert matching_key(["up", "layers.1.mlp", "_proj", "p_proj"], "model.layers.1.mlp.up_proj") is None


def test_patterns_for_every_module_of_a_large_model_are_fast():
    """The cache of re is too small: it would recompile most patterns for each module, for half a minute."""
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(250) for part in ("gate", "up", "down")]
    start, patterns = time.process_time(), [exact_pattern(name) for name in names]
    assert [matching_key(patterns, name) for name in names] == patterns
    assert time.process_time() - start < 10


@pytest.mark.parametrize("outer", ["model.language_model.", "language_model.model."])
def test_text_layers_of_multimodal_models_are_read_as_model_layers(tmp_path, outer):
    name = Q.replace("model.", outer, 1)
    config = CONFIG | {"alpha_pattern": {exact_pattern(name): 8}}
    adapter = load_adapter(write_folder(tmp_path / "a", config, tensors([name])))
    assert list(adapter.modules) == [Q]
    assert adapter.modules[Q].scale == 4.0


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (11, 2, 1)]
    adapter = load_adapter(write_folder(tmp_path / "a", weights=tensors(names)))
    assert [name.split(".")[2] for name in adapter.modules] == ["1", "2", "11"]


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("model.embed_tokens.lora_embedding_A", (2, 9), "embedding"),
        ("lm_head.lora_A.weight", (2, 6), "output head"),
        ("lm_head.weight", (9, 6), "modules_to_save"),
        (f"{Q}.base_layer.bias", (5,), "biases"),
        (f"{Q}.lora_B.bias", (5,), "lora_bias"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 6), "tokens"),
    ],
)
def test_changes_that_do_not_move_are_listed(tmp_path, key, shape, said):
    weights = tensors() | {f"base_model.model.{key}": matrix(*shape)}
    adapter = load_adapter(write_folder(tmp_path / "a", weights=weights))
    assert list(adapter.modules) == [Q, V]
    assert len(adapter.info.ignored) == 1
    assert said in adapter.info.ignored[0]


def test_copies_of_base_weights_are_ignored(tmp_path):
    weights = tensors() | {"base_model.model.lm_head.base_layer.weight": matrix(9, 6)}
    assert load_adapter(write_folder(tmp_path / "a", weights=weights)).info.ignored == ()


def test_ignored_settings_are_listed(tmp_path):
    config = CONFIG | {"fan_in_fan_out": True, "init_lora_weights": "lora_ga", "brand_new": 1, "unused": None}
    ignored = load_adapter(write_folder(tmp_path / "a", config)).info.ignored
    assert [word in " ".join(ignored) for word in ("fan_in_fan_out", "lora_ga", "brand_new", "unused")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"init_lora_weights": "pissa"}, "PiSSA starts from factors of the base's weights: the source base is needed"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"init_lora_weights": "novel"}, "novel"),
        ({"alora_invocation_tokens": [1, "x"]}, "expected a list of token ids"),
        ({"alora_invocation_tokens": []}, "expected a list of token ids"),
        ({"alora_invocation_tokens": [1], "init_lora_weights": "pissa"}, "PiSSA and aLoRA in one adapter"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"monteclora_config": {"a": 1}}, "MonteCLoRA"),
        ({"target_parameters": ["mlp.gate_up"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        (
            {"peft_type": "VERA"},
            "VeRA slices its matrices to the shapes of the base's modules: the source base is needed",
        ),
        ({"peft_type": "ADALORA"}, "no lora_E"),
        ({"peft_type": "PREFIX_TUNING"}, "changes no weight matrix"),
        ({"peft_type": "IA3"}, "change of full rank"),
        ({"peft_type": "MISS"}, "save_as_lora"),
        ({"peft_type": None}, "peft_type"),
        ({"fine_tune_type": "lora"}, "MLX"),
        ({"r": None}, "r is None"),
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"r": 3}, "rank 2"),
        ({"r": float("inf")}, "'r' is inf"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, "rank 2"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
        ({"target_modules": 7}, "target_modules"),
    ],
)
def test_other_kinds_and_invalid_values_are_refused_by_name(tmp_path, extra, named):
    assert named in refusal(write_folder(tmp_path / "a", CONFIG | extra))


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("/home/ann/models/base", "base"),
        ("/home/ann lee/models/my base/", "my base"),
        ("~/models/base", "base"),
        ("./models/of/base", "base"),
        ("../base", "base"),
        ("C:\\Users\\ann\\base", "base"),
        ("C:/Users/ann/base", "base"),
        ("\\\\server\\base", "base"),
        ("file:///home/ann/base", "base"),
        ("/", None),
        ("org/base", "org/base"),
        ("base", "base"),
    ],
)
def test_the_base_is_named_by_its_hub_id_or_the_last_part_of_its_path(tmp_path, stated, name):
    folder = write_folder(tmp_path / "a", CONFIG | {"base_model_name_or_path": stated})
    assert load_adapter(folder).info.base_name == name


def test_missing_rank_is_refused(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "r"}
    assert "r is missing" in refusal(write_folder(tmp_path / "a", config))


def changed(**changes):
    weights = tensors()
    for key, value in changes.items():
        weights[{"a": A, "b": B}[key]] = value
    return {key: value for key, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (changed(b=None), "without its lora_B"),
        (changed(a=None), "without its lora_A"),
        (changed(b=matrix(5, 3)), "[5, 3]"),
        (changed(a=matrix(2, 6, 1)), "[2, 6, 1]"),
        (changed(a=matrix(2)), "[2]"),
        (changed(a=matrix(2, 6) * np.nan), "NaN"),
        (changed(b=matrix(5, 2) + np.float32(np.inf)), "infinite"),
        (changed(a=np.ones((2, 6), np.int8)), "I8"),
        (changed(a=np.ones((2, 6), ml_dtypes.float8_e4m3fn)), "F8_E4M3"),
        ({}, "empty"),
        ({"base_model.model.lm_head.lora_A.weight": matrix(2, 6)}, "output head"),
        (
            tensors([Q]) | {f"base_model.model.{Q}.lora_magnitude_vector": matrix(5)},
            "DoRA rescales the rows of W + B A",
        ),
        (tensors([Q]) | {f"base_model.model.{Q}.lora_magnitude_vector": matrix(6)}, "6 magnitudes for 5 rows"),
        (tensors() | {f"base_model.model.{Q}.lora_diag": matrix(2)}, "KaSA"),
        (tensors(["model.layers.0.mlp.experts.base_layer"]), "expert"),
        (tensors([Q, Q.replace("model.", "model.language_model.", 1)]), "two spellings"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, weights, named):
    assert named in refusal(write_folder(tmp_path / "a", weights=weights))


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\x00", "[" * 100_000], ids=["cut", "list", "text", "nul", "deep"])
def test_configuration_that_is_not_a_json_object_is_refused(tmp_path, text):
    folder = write_folder(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(folder)


def test_configuration_that_is_not_utf8_is_refused(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    assert "not valid JSON" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    folder = write_folder(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "adapter_model.safetensors" in refusal(folder)


def test_header_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    folder = write_folder(tmp_path / "a")
    header = json.dumps({A: {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "download it again" in refusal(folder)


def test_missing_files_are_named(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "not a path" in refusal("x" * 5000)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "adapter_config.json" in refusal(empty)
    (empty / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert "adapter_model.safetensors" in refusal(empty)
    assert "a file" in refusal(empty / "adapter_config.json")
    safetensors.numpy.save_file({"x": matrix(1)}, empty / "adapters.safetensors")
    assert "MLX" in refusal(empty)
    (empty / "adapter_model.bin").write_bytes(b"pickle")
    assert "safe_serialization" in refusal(empty)


def test_hub_id_without_a_connection_is_refused_with_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "hub" in refusal("owner/no-such-adapter")


def test_hub_id_downloads_only_what_is_read(monkeypatch, tmp_path):
    import huggingface_hub

    folder, asked = write_folder(tmp_path / "snapshot"), []

    def download(repo, name, revision=None, **_):
        asked.append((repo, name, revision))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    adapter = load_adapter("owner/adapter", revision="v1")
    names = ("adapter_config.json", "README.md", "chat_template.jinja", "adapter_model.safetensors")
    assert asked == [("owner/adapter", name, "v1") for name in names]
    assert adapter.info.name == "owner/adapter"


def test_a_local_adapter_of_another_revision_is_refused(tmp_path, capsys):
    plain = write_folder(tmp_path / "plain")
    cached = write_folder(tmp_path / "models--org--name" / "snapshots" / "abc123")
    assert load_adapter(cached, revision="abc123").modules
    for folder, known in ((plain, "no revision is known"), (cached, "of revision abc123")):
        with pytest.raises(AdapterError, match=f"{known}.*; expected revision 'v2'"):
            load_adapter(folder, revision="v2")
    with pytest.raises(SystemExit):
        main(["inspect", str(plain), "--revision", "v2"])
    assert "expected revision 'v2'" in capsys.readouterr().err


def test_a_symbolic_link_is_followed_on_reading(tmp_path):
    folder = write_folder(tmp_path / "a")
    (tmp_path / "link").symlink_to(folder)
    np.testing.assert_array_equal(
        delta(load_adapter(tmp_path / "link").modules[Q]), delta(load_adapter(folder).modules[Q])
    )
