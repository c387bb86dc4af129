"""Biases, norms and whole layers of an adapter, on its own base: what peft merges, and a report where they are lost."""

import json

import jax
import numpy as np
import pytest
import safetensors
from adapter_folders import write_folder
from command_line import main
from gguf_files import small_llama
from kind_cases import make_adapter, peft
from tiny_models import save_tiny, tiny_model, torch

import jcrosslora as jcl
from jcrosslora import MergeSettings, merge
from jcrosslora.adapter import add_adapters, load_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LAYERS = {"num_hidden_layers": 2}
P = "base_model.model.model."


def lora(**settings):
    return peft.LoraConfig(r=3, lora_alpha=5, **({"target_modules": ["q_proj", "up_proj"]} | settings))


# Name -> family, and the configuration of an adapter with more than updates of low rank.
MADE = {
    "biases of LoRA's modules": ("qwen2", lambda: lora(bias="lora_only")),
    "all biases": ("qwen2", lambda: lora(bias="all")),
    "biases of B": ("qwen2", lambda: lora(lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "norms": ("qwen2", lambda: lora(modules_to_save=["norm"])),
    "layers": ("qwen2", lambda: lora(modules_to_save=["layers.1.self_attn.q_proj", "k_proj", "embed_tokens"])),
    "fused layers": ("phi3", lambda: lora(target_modules=["o_proj"], modules_to_save=["layers.0.self_attn.qkv_proj"])),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {family: save_tiny(family, tmp_path_factory.mktemp(family), **LAYERS) for family in ("qwen2", "phi3")}


def train(family, config, out):
    """Save an adapter with random numbers in all trained parameters; return the weights that peft merges of it."""
    make_adapter(config, out, tiny_model(family, **LAYERS))
    return merged_by_peft(family, out)


def merged_by_peft(family, folder) -> dict[str, np.ndarray]:
    state = peft.PeftModel.from_pretrained(tiny_model(family, **LAYERS), folder).merge_and_unload().state_dict()
    return {name: value.numpy() for name, value in state.items()}


def assert_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", MADE)
def test_merge_and_export_hold_what_peft_loads(tmp_path, bases, name, capsys):
    family, config = MADE[name]
    wanted = train(family, config(), tmp_path / "a")
    base = jcl.open_base(bases[family])
    plain = tiny_model(family, **LAYERS).state_dict()
    assert sum(not np.array_equal(array, plain[key]) for key, array in wanted.items()) >= 3
    common = ["--base", str(bases[family]), "--fail-on", "loss"]

    main(["merge", str(bases[family]), str(tmp_path / "a"), "--out", str(tmp_path / "merged"), "--fail-on", "loss"])
    merged = jcl.open_base(tmp_path / "merged")
    assert_weights({key: np.array(merged.tensor(key)) for key in wanted}, wanted)

    main(["export", str(tmp_path / "a"), "--profile", "peft", "--out", str(tmp_path / "o"), *common])
    assert not any(word in capsys.readouterr().out for word in ("not merged", "not written", "lost"))
    assert_weights(merged_by_peft(family, tmp_path / "o"), wanted)
    again = load_adapter(tmp_path / "o", base, replaced=True)
    assert again.info.ignored == ()
    assert jax.tree.structure(again) == jax.tree.structure(load_adapter(tmp_path / "o", base, replaced=True))

    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "p"), *common])
    assert left.value.code == 3
    assert "profile portable does not hold it, profile peft does" in capsys.readouterr().out
    with safetensors.safe_open(tmp_path / "p" / "adapter_model.safetensors", "np") as file:
        account = json.loads(file.metadata()["jcrosslora.export"])
    assert account["not_written"]
    assert load_adapter(tmp_path / "p", base, replaced=True).replaced == ()


def test_biases_that_a_base_has_no_place_for_are_said_to_be_missing(tmp_path, capsys):
    """Without them the model predicts something else, which nobody should learn from its answers."""
    base = save_tiny("llama", tmp_path / "base", **LAYERS)
    wrapped = peft.get_peft_model(tiny_model("llama", **LAYERS), lora(lora_bias=True))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "a")
    for command in (["merge", str(base), str(tmp_path / "a")], ["export", str(tmp_path / "a"), "--base", str(base)]):
        out = tmp_path / command[0]
        profile = ["--profile", "peft"] if command[0] == "export" else []
        with pytest.raises(SystemExit) as left:
            main([*command, "--out", str(out), "--fail-on", "loss", *profile])
        assert left.value.code == 3
        printed = capsys.readouterr().out
        assert "self_attn.q_proj.bias to add it to, so what is written predicts something else" in printed
        assert "without parts of the adapter, see above" in printed.splitlines()[-1]
    report = json.loads((tmp_path / "merge" / "merge_report.json").read_text())
    assert not report["whole"]
    assert any("lora_bias" in note for note in report["notes"])


def test_a_live_model_of_peft_gets_them(tmp_path, bases):
    wanted = train("qwen2", lora(bias="all", modules_to_save=["norm"]), tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", jcl.open_base(bases["qwen2"]), replaced=True)
    live = jcl.adapter.to_peft(adapter, tiny_model("qwen2", **LAYERS))
    assert_weights({name: value.numpy() for name, value in live.merge_and_unload().state_dict().items()}, wanted)


def test_norms_are_merged_into_a_gguf_base(tmp_path):
    path, tensors = small_llama(tmp_path / "base.gguf")
    rng = np.random.default_rng(0)
    norms = {name: rng.normal(size=64).astype(np.float32) for name in tensors if name.endswith("norm.weight")}
    pair = {
        f"{P}layers.0.self_attn.v_proj.lora_{side}.weight": rng.normal(size=shape).astype(np.float32)
        for side, shape in (("A", (2, 64)), ("B", (32, 2)))
    }
    folder = write_folder(tmp_path / "a", weights=pair | {f"base_model.model.{key}": one for key, one in norms.items()})
    done = merge(MergeSettings(str(path), str(folder), str(tmp_path / "out")))
    assert (done.modules, done.lost) == (1 + len(norms), False)
    merged = jcl.open_base(tmp_path / "out")
    for name, array in norms.items():
        np.testing.assert_array_equal(merged.tensor(name), array)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("layers.0.self_attn.o_proj.bias", (48,), "has no model.layers.0.self_attn.o_proj.bias"),
        ("layers.7.input_layernorm.weight", (48,), "has no model.layers.7"),
        ("norm.weight", (47,), "model.norm.weight is 47, in the base"),
        ("layers.0.self_attn.q_proj.weight", (48, 48), "is changed in another way as well"),
    ],
)
def test_tensors_that_do_not_fit_are_reported_and_the_rest_is_merged(tmp_path, bases, capsys, name, shape, why):
    rng = np.random.default_rng(0)
    weights = {
        f"{P}layers.0.self_attn.q_proj.lora_A.weight": rng.normal(size=(2, 48)),
        f"{P}layers.0.self_attn.q_proj.lora_B.weight": rng.normal(size=(48, 2)),
        f"{P}layers.1.input_layernorm.weight": np.ones(48),
        f"{P}{name}": np.ones(shape),
    }
    folder = write_folder(tmp_path / "a", weights={key: array.astype(np.float32) for key, array in weights.items()})
    with pytest.raises(SystemExit) as left:
        main(["merge", str(bases["qwen2"]), str(folder), "--out", str(tmp_path / "out"), "--fail-on", "loss"])
    assert left.value.code == 3
    assert why in capsys.readouterr().out
    np.testing.assert_array_equal(jcl.open_base(tmp_path / "out").tensor("model.layers.1.input_layernorm.weight"), 1)


def test_they_stay_with_their_own_base(tmp_path, bases):
    """Without being asked for they are listed, as a transfer needs it; a sum of adapters has none either."""
    train("qwen2", lora(modules_to_save=["norm"]), tmp_path / "a")
    base = jcl.open_base(bases["qwen2"])
    plain, whole = (load_adapter(tmp_path / "a", base, replaced=replaced) for replaced in (False, True))
    assert plain.replaced == ()
    assert any("whole tensors (modules_to_save)" in sentence for sentence in plain.info.ignored)
    assert len(whole.replaced[0].tensors) == 5
    share = whole.replaced[0].share
    assert share is not None
    assert 0 < share < 1
    total = add_adapters([whole, plain])
    assert total.replaced == ()
    assert "a sum has no tensors that replace those of the base" in total.info.ignored[0]
    moved = jcl.transfer(whole, base, base, "copy", cache=False, effect="never")
    assert any("method copy does not move them" in warning for warning in moved.report.warnings)
