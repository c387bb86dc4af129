"""Damaged files of every kind: an invalid tensor or setting is refused with one line, or is harmless."""

import json
from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import CONFIG, Q, matrix, tensors, write_folder
from full_set import full_except
from kind_cases import LORA, MADE, make_adapter, peft
from tiny_models import tiny_model

from jcrosslora.adapter import load_adapter
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ONE = r"model\.layers\.0\.self_attn\.q_proj"
SMALL = {
    "DoRA": lambda: peft.LoraConfig(**LORA, target_modules=ONE, use_dora=True),
    "PiSSA": lambda: peft.LoraConfig(**LORA, target_modules=ONE, init_lora_weights="pissa"),
    "OLoRA": lambda: peft.LoraConfig(**LORA, target_modules=ONE, init_lora_weights="olora"),
    "aLoRA": lambda: peft.LoraConfig(**LORA, target_modules=ONE, alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=ONE),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=ONE),
    "VeRA, drawn": lambda: peft.VeraConfig(r=4, target_modules=ONE, save_projection=False),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=9, vector_length=8, target_modules=ONE),
    "VB-LoRA, top": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=9, vector_length=8, target_modules=ONE, save_only_topk_weights=True
    ),
    "LoHa": lambda: peft.LoHaConfig(r=3, target_modules=ONE),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=ONE, decompose_both=True),
    "Uni-LoRA": lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=ONE),
    "Uni-LoRA, stored": lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=ONE, save_indices=True),
}
# Settings that the update depends on; those of plain LoRA are damaged in test_adapter_read.
READ = {
    *("r", "init_r", "lora_alpha", "alpha", "topk", "projection_prng_key", "proj_seed", "theta_d_length"),
    *("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"),
    "alora_invocation_tokens",
}
VALUES = [None, [], {}, "text", -1, 0, 2.5, True, 1e400, [None, {}], "(", ["("], 2**40]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make the base, and the configuration and tensors of a file of each kind."""
    folder = tmp_path_factory.mktemp("damaged")
    tiny_model("llama").save_pretrained(folder / "base")
    files = {}
    for place, (kind, make) in enumerate(SMALL.items()):
        make_adapter(make(), folder / str(place))
        config = json.loads((folder / str(place) / "adapter_config.json").read_text())
        files[kind] = config, safetensors.numpy.load_file(folder / str(place) / "adapter_model.safetensors")
    weights = tensors([Q], width=48, rows=48)
    files["LoRA-XS"] = CONFIG, weights | {f"base_model.model.{Q}_lora_latent_mapping.weight": matrix(2, 2)}
    files["BeamLoRA"] = CONFIG | {"use_beamlora": True}, weights | {f"base_model.model.{Q}.lora_gate": matrix(1, 2)}
    return open_base(folder / "base"), files


def read(folder, base, config, weights):
    with suppress(AdapterError):
        adapter = load_adapter(write_folder(folder, config, weights), base)
        for factors in adapter.modules.values():
            assert np.isfinite(factors.a).all()
            assert np.isfinite(factors.b).all()
        return True
    return False


def spoilt(array):
    """Yield damaged versions of a tensor, and last a harmless one; a vector is flat already."""
    yield None
    yield np.concatenate([array, array])
    yield array[..., :-1]
    yield array.reshape(-1) if array.ndim > 1 else None
    yield array[None]
    yield array.astype(np.int8)
    yield np.full_like(array, np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.nan)
    yield array.astype(np.float64)


@pytest.mark.parametrize("kind", full_except([*SMALL, "LoRA-XS", "BeamLoRA"], ["DoRA", "VeRA", "LoKr", "LoRA-XS"]))
def test_a_damaged_tensor_is_refused_with_one_line(tmp_path, made, kind):
    base, files = made
    config, weights = files[kind]
    assert read(tmp_path, base, config, weights)
    for key, array in weights.items():
        read_without = [
            read(tmp_path, base, config, weights | {key: np.ascontiguousarray(value)})
            if value is not None
            else read(tmp_path, base, config, {other: x for other, x in weights.items() if other != key})
            for value in spoilt(array)
        ]
        # Other lengths may be consistent, and are refused if they do not fit the base.
        assert not any(read_without[3:7])


@pytest.mark.parametrize(
    "kind", full_except([kind for kind in SMALL if kind not in ("DoRA", "PiSSA", "OLoRA")], ["aLoRA", "VeRA", "LoKr"])
)
def test_an_invalid_setting_is_refused_with_one_line(tmp_path, made, kind):
    base, files = made
    config, weights = files[kind]
    for key in READ & config.keys():
        for value in VALUES:
            read(tmp_path, base, config | {key: value}, weights)


def test_small_files_of_huge_updates_are_refused(tmp_path):
    """Kronecker products, elementwise products and vector banks can describe huge updates in small files."""
    side = {f"base_model.model.{Q}.lokr_{part}": matrix(200, 200) for part in ("w1", "w2")}
    config = {"peft_type": "LOKR", "r": 200, "alpha": 1}
    with pytest.raises(AdapterError, match=r"3,200,000,000 numbers.*--adapter-rank"):
        load_adapter(write_folder(tmp_path / "lokr", config, side))
    assert load_adapter(write_folder(tmp_path / "lokr", config, side), rank=2).modules[Q].shape == (40000, 40000)
    pairs = {"w1_a": (12000, 110), "w1_b": (110, 12000), "w2_a": (12000, 110), "w2_b": (110, 12000)}
    factors = {f"base_model.model.{Q}.hada_{part}": np.ones(shape, np.float32) for part, shape in pairs.items()}
    config = {"peft_type": "LOHA", "r": 110, "alpha": 1}
    with pytest.raises(AdapterError, match=r"288,000,000 numbers: use another adapter"):
        load_adapter(write_folder(tmp_path / "loha", config, factors), rank=2)
    logits = {f"base_model.model.{Q}.vblora_logits_{part}": matrix(300, 300, 2) for part in "AB"}
    bank = {"base_model.vblora_vector_bank": matrix(2, 3000)}
    with pytest.raises(AdapterError, match="read it at a lower rank"):
        load_adapter(write_folder(tmp_path / "bank", {"peft_type": "VBLORA", "r": 300}, logits | bank))


def test_the_size_of_redrawn_matrices_is_bounded(tmp_path, made, monkeypatch):
    """A vector of gains, or a rank in a configuration, determines how many random numbers are drawn."""
    base, files = made
    config, weights = files["VeRA, drawn"]
    key = next(key for key in weights if key.endswith("lambda_d"))
    rank = 2**28 // sum(base.modules[Q].shape) + 1
    with pytest.raises(AdapterError, match=r"q_proj' would hold 268,\d{3},\d{3} numbers"):
        load_adapter(write_folder(tmp_path / "vera", config, weights | {key: np.ones(rank, np.float32)}), base)
    config, weights = files["Uni-LoRA"]
    count = config["r"] * sum(base.modules[Q].shape)
    folder = write_folder(tmp_path / "uni", config, weights)
    for most in (count, count - 1):
        monkeypatch.setattr("jcrosslora.adapter.kinds.shared.LARGEST", most)
        if most == count:
            load_adapter(folder, base)
            continue
        with pytest.raises(AdapterError, match=rf"r is 2, for which {count} indices .*save_indices"):
            load_adapter(folder, base)


ENDLESS = r"([a-z_.0-9]+)+!"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDLESS},
        {"modules_to_save": [ENDLESS]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
        {"target_modules": "a{99999999999999999999}"},
        {"modules_to_save": ["("]},
    ],
)
def test_invalid_and_exponential_patterns_are_refused(tmp_path, made, settings):
    """For files that do not name their modules; other kinds never match these settings."""
    base, files = made
    config, weights = files["Uni-LoRA"]
    with pytest.raises(AdapterError, match="not a regular expression, or has too many ways to match"):
        load_adapter(write_folder(tmp_path, config | settings, weights), base)


def test_every_kind_has_a_damaged_case():
    assert {kind.partition(",")[0] for kind in SMALL} | {"LoRA"} == MADE.keys()
