"""A DoRA written again as a DoRA: peft and MLX predict the same as peft with the original."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import main
from engine_readers import log_softmax, mlx_log_probs
from kind_cases import lora, peft
from safetensors.numpy import load_file
from tiny_models import tiny_model, torch
from transfers import move_files

import jcrosslora as jcl
from jcrosslora.adapter import load_dora, save_adapter
from jcrosslora.errors import AdapterError, OutputError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOKENS = [5, 9, 30, 7, 61, 44, 12]
# Label -> the family of the base and the settings of the adapter.
CASES = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}}),
    "some layers": ("llama", {"layers_to_transform": [0, 2]}),
    "of PiSSA": ("llama", {"init_lora_weights": "pissa"}),
    "of OLoRA": ("llama", {"init_lora_weights": "olora"}),
    "beside biases": ("qwen2", {}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
}


@dataclasses.dataclass
class House:
    """Make a base, a DoRA of it by peft, and the logits (N, V) with and without the DoRA."""

    family: str
    base: str
    adapter: str
    wanted: np.ndarray
    plain: np.ndarray


def logits(family, adapter=None) -> np.ndarray:
    model = tiny_model(family)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def make_dora(folder, case) -> House:
    family, settings = CASES[case]
    tiny_model(family).save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(tiny_model(family), lora(use_dora=True, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                # Magnitudes far from the norms of the rows, which no low rank could represent.
                noise = torch.randn_like(parameter)
                parameter.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.add_(0.1 * noise)
    wrapped.save_pretrained(folder / "adapter")
    base, adapter = str(folder / "base"), str(folder / "adapter")
    return House(family, base, adapter, logits(family, adapter), logits(family))


@pytest.fixture(scope="module", params=list(CASES))
def house(request, tmp_path_factory):
    return make_dora(tmp_path_factory.mktemp("house"), request.param)


def one_house(*cases):
    return pytest.mark.parametrize("house", cases, indirect=True)


def test_peft_predicts_the_same(house, tmp_path):
    jcl.export_adapter(
        jcl.ExportSettings((house.adapter,), str(tmp_path / "o"), "peft", base=house.base, keep_dora=True)
    )
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["use_dora"] is True
    np.testing.assert_allclose(logits(house.family, tmp_path / "o"), house.wanted, rtol=0, atol=1e-4)
    assert np.abs(house.wanted - house.plain).max() > 0.1


@one_house("plain")
def test_a_fit_of_a_dora_is_inexact_and_says_so(house, tmp_path, capsys):
    main(["export", house.adapter, "--out", str(tmp_path / "o"), "--profile", "peft", "--base", house.base])
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"lost: {house.adapter} is DoRA (")
    assert said.endswith("of the update's energy; --keep-dora, in profile peft or mlx, loses nothing")
    assert np.abs(logits(house.family, tmp_path / "o") - house.wanted).max() > 0.05


@one_house("plain", "patterns", "some layers", "fused")
def test_mlx_predicts_the_same(house, tmp_path):
    jcl.export_adapter(
        jcl.ExportSettings((house.adapter,), str(tmp_path / "o"), "mlx", base=house.base, keep_dora=True)
    )
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    found = mlx_log_probs(Path(house.base), tmp_path / "o", TOKENS)
    np.testing.assert_allclose(found, log_softmax(house.wanted[-1]), rtol=0, atol=1e-4)


@one_house("plain")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_magnitudes_stay_in_float32(house, tmp_path, dtype):
    settings = jcl.ExportSettings((house.adapter,), str(tmp_path / "o"), "peft", keep_dora=True, dtype=dtype)
    stored = load_file(f"{house.adapter}/adapter_model.safetensors")
    jcl.export_adapter(settings)
    _, kept = load_dora(tmp_path / "o")
    assert len(kept) == 9
    for name, magnitude in kept.items():
        np.testing.assert_array_equal(magnitude, stored[f"base_model.model.{name}.lora_magnitude_vector"])
    assert np.abs(logits(house.family, tmp_path / "o") - house.wanted).max() < 0.05


@one_house("plain")
def test_the_command_keeps_a_dora_without_its_base(house, tmp_path, capsys):
    main(["export", house.adapter, "--out", str(tmp_path / "o"), "--profile", "peft", "--keep-dora"])
    assert capsys.readouterr().out.splitlines()[0] == "kept: a DoRA, with the magnitudes of its 9 modules"
    np.testing.assert_allclose(logits(house.family, tmp_path / "o"), house.wanted, rtol=0, atol=1e-4)
    engines = {verdict.engine: verdict for verdict in jcl.check_engines(tmp_path / "o")}
    assert engines["PEFT"].reads
    assert "DoRA" in engines["vLLM"].reasons[0]


@one_house("plain")
def test_settings_that_a_kept_dora_excludes_are_refused(house, tmp_path):
    settings = jcl.ExportSettings((house.adapter,), str(tmp_path / "o"), "peft", keep_dora=True)
    refused = [
        ({"profile": "portable"}, UsageError, "does not hold the magnitudes of a DoRA; use peft or mlx"),
        ({"profile": "gguf", "base": house.base}, UsageError, "does not hold the magnitudes"),
        ({"out_rank": 2}, UsageError, "magnitudes do not fit"),
        ({"adapter": (house.adapter,) * 2}, UsageError, "a sum of DoRAs is not a DoRA"),
        ({"adapter": ()}, UsageError, "0 adapters"),
    ]
    for change, error, said in refused:
        with pytest.raises(error, match=said):
            jcl.export_adapter(dataclasses.replace(settings, **change))
    directions, _ = load_dora(house.adapter)
    with pytest.raises(OutputError, match="magnitudes"):
        save_adapter(directions, tmp_path / "o", profile="peft", magnitudes={})
    assert list(tmp_path.iterdir()) == []


@one_house("plain")
def test_a_transfer_to_equal_weights_suggests_keep_dora(house, tmp_path):
    where = {"adapter": house.adapter, "source": house.base, "target": house.base, "out": str(tmp_path / "o")}
    moved = move_files(**where, method="copy")
    assert any("export --keep-dora" in warning for warning in moved.report.warnings)


@one_house("of PiSSA")
def test_a_dora_initialised_from_its_base_needs_it(house):
    with pytest.raises(AdapterError, match="the source base is needed"):
        load_dora(house.adapter)


@one_house("plain")
def test_another_kind_or_another_base_is_refused(house, tmp_path):
    tiny_model("llama", hidden_size=32).save_pretrained(tmp_path / "narrow")
    with pytest.raises(AdapterError, match=r"in the base .* it is"):
        load_dora(house.adapter, jcl.open_base(tmp_path / "narrow"))
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(AdapterError, match="is not one of the base"):
        load_dora(house.adapter, jcl.open_base(tmp_path / "short"))
    tiny_model("phi3").save_pretrained(tmp_path / "fused")
    with pytest.raises(AdapterError, match=r"is rows of 'model\.layers\.0\.self_attn\.qkv_proj'"):
        load_dora(house.adapter, jcl.open_base(tmp_path / "fused"))
    peft.get_peft_model(tiny_model("llama"), lora()).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError, match="a LoRA has no magnitudes"):
        load_dora(tmp_path / "lora")
