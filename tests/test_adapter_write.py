"""Writing adapters: the update is read back unchanged for every profile, dtype and memory layout."""

import copy
import errno
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from adapter_folders import Q, V, adapter_of, base_of, delta, matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from jcrosslora.adapter import Adapter, LoRAFactors, describe_adapter, load_adapter, save_adapter, update_norm
from jcrosslora.adapter.names import module_alpha, module_rank
from jcrosslora.errors import OutputError, UsageError

EPS = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_update(got: LoRAFactors, want: LoRAFactors, eps: float) -> None:
    """Compare entry by entry within the error of rounding a and b to `eps`."""
    bound = abs(want.scale) * np.abs(np.float64(want.b)) @ np.abs(np.float64(want.a))
    assert (np.abs(delta(got) - delta(want)) <= 2.1 * eps * bound + 1e-300).all()


@pytest.mark.parametrize("profile", ["portable", "peft"])
@pytest.mark.parametrize("dtype", list(EPS))
@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scale=st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3),
    seed=st.integers(0, 2**20),
)
def test_written_updates_are_read_back_exactly(tmp_path_factory, profile, dtype, ranks, scale, seed):
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (1, 11, 2, 111)]
    adapter = adapter_of(dict(zip(names, ranks, strict=False)), scale=scale, seed=seed)
    out = save_adapter(adapter, tmp_path_factory.mktemp("w") / "out", profile=profile, dtype=dtype)
    back = load_adapter(out)
    assert set(back.modules) == set(adapter.modules)
    for name, factors in adapter.modules.items():
        assert back.modules[name].scale == 1.0
        assert back.modules[name].rank == (max(ranks) if profile == "portable" else factors.rank)
        assert_same_update(back.modules[name], factors, EPS[dtype])


@settings(max_examples=15, deadline=None)
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), profile=st.sampled_from(["portable", "peft"]))
def test_a_second_round_trip_changes_nothing(tmp_path_factory, ranks, profile):
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(4)]
    folder = tmp_path_factory.mktemp("w")
    once = load_adapter(save_adapter(adapter_of(dict(zip(names, ranks, strict=False))), folder / "1", profile=profile))
    twice = load_adapter(save_adapter(once, folder / "2", profile=profile))
    for name, factors in once.modules.items():
        np.testing.assert_array_equal(twice.modules[name].a, factors.a)
        np.testing.assert_array_equal(twice.modules[name].b, factors.b)


def strided(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "transposed":
        return np.ascontiguousarray(array.T).T
    if layout == "reversed":
        return np.ascontiguousarray(array[::-1])[::-1]
    wide = np.zeros((array.shape[0], 2 * array.shape[1]), array.dtype)
    wide[:, ::2] = array
    return wide[:, ::2]


@pytest.mark.parametrize("layout", ["transposed", "reversed", "every other"])
@pytest.mark.parametrize("dtype", list(EPS))
def test_non_contiguous_factors_are_written_correctly(tmp_path, layout, dtype):
    adapter = adapter_of({Q: 3, V: 3}, scale=1.0)
    turned = Adapter(
        {
            name: LoRAFactors(a=strided(factors.a, layout), b=strided(factors.b, layout), scale=1.0)
            for name, factors in adapter.modules.items()
        }
    )
    assert not turned.modules[Q].b.flags.c_contiguous
    save_adapter(adapter, tmp_path / "plain", dtype=dtype)
    save_adapter(turned, tmp_path / "turned", dtype=dtype)
    files = [tmp_path / kind / "adapter_model.safetensors" for kind in ("plain", "turned")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_portable_configuration_is_the_one_every_engine_reads(tmp_path):
    other = "model.layers.2.self_attn.q_proj"
    bases = [Q, V, other, "model.layers.0.mlp.up_proj"]
    adapter = adapter_of({Q: 2, V: 3})
    config = config_of(save_adapter(adapter, tmp_path / "o", base=base_of(bases, revision="v1"), base_name="a/b"))
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["exclude_modules"] == [other]
    assert (config["base_model_name_or_path"], config["revision"]) == ("a/b", "v1")
    assert config["bias"] == "none"
    assert not any(config[key] for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save"))


def test_the_peft_profile_names_each_module_exactly(tmp_path):
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (1, 11, 2, 111)]
    ranks = dict(zip(names, (4, 2, 2, 3), strict=True))
    config = config_of(save_adapter(adapter_of(ranks), tmp_path / "o", profile="peft"))
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"]
    for name, rank in ranks.items():
        assert module_rank(config, name) == module_alpha(config, name) == rank
    assert module_rank(config, "model.layers.21.mlp.up_proj") == 2


def test_base_name_falls_back_to_the_adapters(tmp_path):
    assert config_of(save_adapter(adapter_of({Q: 1}), tmp_path / "o"))["base_model_name_or_path"] == "owner/base"


def test_documents_and_metadata_are_written_and_arguments_not_changed(tmp_path):
    adapter = adapter_of({Q: 2, V: 1})
    documents, metadata = {"README.md": "# ü\n"}, {"recipe": "x = 1"}
    arguments = copy.deepcopy((documents, metadata, dict(adapter.modules)))
    out = save_adapter(adapter, tmp_path / "o", documents=documents, metadata=metadata)
    assert (out / "README.md").read_text(encoding="utf-8") == "# ü\n"
    with safetensors.safe_open(out / "adapter_model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "recipe": "x = 1"}
    assert (documents, metadata) == arguments[:2]
    for name, factors in arguments[2].items():
        np.testing.assert_array_equal(adapter.modules[name].a, factors.a)
        np.testing.assert_array_equal(adapter.modules[name].b, factors.b)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(("size_a", "size_b"), [(1e-7, 1e7), (1e6, 1e-6), (1e-9, 1e3)])
def test_float16_balances_the_size_of_the_factors(tmp_path, size_a, size_b):
    """Neither pair fits float16 unchanged: the large factor overflows, or the small one loses its digits."""
    factors = LoRAFactors(a=matrix(2, 6) * np.float32(size_a), b=matrix(5, 2, seed=1) * np.float32(size_b), scale=1.0)
    back = load_adapter(save_adapter(Adapter({Q: factors}), tmp_path / "o", dtype="float16")).modules[Q]
    error = np.linalg.norm(delta(back) - delta(factors)) / np.linalg.norm(delta(factors))
    assert error < 2e-3


@pytest.mark.parametrize("size", [1e12, 1e-6, 1e-19])
def test_an_update_beyond_float16_is_refused(tmp_path, size):
    factors = LoRAFactors(a=matrix(2, 6) * np.float32(size), b=matrix(5, 2) * np.float32(size), scale=1.0)
    with pytest.raises(OutputError, match="float16"):
        save_adapter(Adapter({Q: factors}), tmp_path / "o", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_an_update_of_zeros_can_be_written(tmp_path):
    factors = LoRAFactors(a=matrix(2, 6), b=np.zeros((5, 2), np.float32))
    back = load_adapter(save_adapter(Adapter({Q: factors}), tmp_path / "o", dtype="float16"))
    assert update_norm(back.modules[Q]) == 0.0


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ({}, "no modules"),
        ({Q: LoRAFactors(a=np.zeros((0, 6)), b=np.zeros((5, 0)))}, "without a 0"),
        ({Q: LoRAFactors(a=matrix(2, 6), b=matrix(5, 3))}, "[5, 3]"),
        ({Q: LoRAFactors(a=matrix(2, 6), b=matrix(5, 2) * np.float32(np.nan))}, "NaN"),
        ({Q: LoRAFactors(a=matrix(2, 6), b=matrix(5, 2), scale=float("inf"))}, "infinite"),
    ],
    ids=["empty", "rank 0", "shapes", "nan", "scale"],
)
def test_invalid_adapters_are_not_written(tmp_path, modules, named):
    with pytest.raises(OutputError) as caught:
        save_adapter(Adapter(modules), tmp_path / "o")
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings_",
    [
        {"profile": "best"},
        {"dtype": "int8"},
        {"documents": {"../x": ""}},
        {"documents": {"adapter_config.json": ""}},
        {"metadata": {"format": "np"}},
        {"metadata": {"n": 1}},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(tmp_path, settings_):
    with pytest.raises(UsageError):
        save_adapter(adapter_of({Q: 1}), tmp_path / "o", **settings_)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_adapter(tmp_path, monkeypatch):
    out = save_adapter(adapter_of({Q: 2}), tmp_path / "o")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(self, data, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        save_adapter(adapter_of({V: 3}), out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(OutputError, match="exists"):
        save_adapter(adapter_of({V: 3}), out)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 7), scale=st.floats(-10, 10), seed=st.integers(0, 2**20))
def test_the_norm_is_that_of_the_full_product(rank, scale, seed):
    factors = adapter_of({Q: rank}, scale=scale, seed=seed).modules[Q]
    assert update_norm(factors) == pytest.approx(np.linalg.norm(delta(factors)), rel=1e-12)


def test_the_norm_of_half_precision_factors_is_not_computed_in_half_precision():
    factors = LoRAFactors(a=matrix(4, 300).astype(ml_dtypes.bfloat16), b=matrix(200, 4).astype(np.float16))
    assert update_norm(factors) == pytest.approx(np.linalg.norm(delta(factors)), rel=1e-12)


def test_an_adapter_is_described_by_role():
    adapter = adapter_of({Q: 2, Q.replace("0", "1"): 3, V: 2})
    rows = describe_adapter(adapter)
    assert [row["module"] for row in rows] == ["q_proj", "v_proj"]
    assert (rows[0]["n"], rows[0]["rank"], rows[0]["out x in"]) == ("2", "2, 3", "5 x 6")
    both = np.hypot(*(np.linalg.norm(delta(adapter.modules[name])) for name in (Q, Q.replace("0", "1"))))
    assert float(rows[0]["norm of dW"]) == pytest.approx(both, rel=1e-3)
