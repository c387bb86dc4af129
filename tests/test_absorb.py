"""`export --absorb`: a base with what engines do not load and an adapter with the rest, against both as one in peft."""

import errno
import json
import os

import numpy as np
import pytest
from adapter_folders import write_folder
from command_line import main
from engine_readers import llama_cpp_log_probs, log_softmax, mlx_log_probs
from full_set import full_except
from gguf_files import converted, gguf_name, metadata_of, write_gguf
from kind_cases import make_adapter, peft
from tiny_models import save_tiny, tiny_model, torch, transformers

import jcrosslora as jcl
from jcrosslora.adapter import check_engines, load_adapter
from jcrosslora.utils import files

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LAYERS = {"num_hidden_layers": 2}
TOKENS = [5, 9, 30, 7, 61, 44, 12]
FEW = [5, 7, 50]


def lora(**settings):
    return peft.LoraConfig(r=3, **({"lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]} | settings))


# Name -> family, whether head and embedding are tied, and the configuration of an adapter.
MADE = {
    "norms and an embedding": ("llama", True, lambda: lora(modules_to_save=["norm", "embed_tokens"])),
    "head": ("llama", False, lambda: lora(modules_to_save=["lm_head"])),
    "tokens": ("llama", True, lambda: lora(trainable_token_indices=FEW)),
    "tokens of each": (
        "llama",
        False,
        lambda: lora(trainable_token_indices={"embed_tokens": FEW, "lm_head": [1, 2]}),
    ),
    "LoRA of embedding and head": ("llama", False, lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "biases": ("qwen2", True, lambda: lora(bias="all")),
    "biases of B": ("qwen2", True, lambda: lora(lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "layers": ("qwen2", True, lambda: lora(modules_to_save=["layers.1.self_attn.q_proj", "k_proj"])),
    "fused layers": (
        "phi3",
        False,
        lambda: lora(target_modules=["o_proj"], modules_to_save=["layers.0.self_attn.qkv_proj", "norm"]),
    ),
    "scaled embedding": ("gemma2", True, lambda: lora(modules_to_save=["norm"], trainable_token_indices=FEW)),
}


def predicted(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def train(family, tied, config, out):
    """Save an adapter with random numbers in all trained parameters; return the logits of peft without and with it."""
    make_adapter(config, out, tiny_model(family, tie_word_embeddings=tied, **LAYERS))
    plain = tiny_model(family, tie_word_embeddings=tied, **LAYERS)
    before = predicted(plain)
    return before, predicted(peft.PeftModel.from_pretrained(plain, out))


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def absorb(base, adapter, out, *more):
    main(["export", str(adapter), "--base", str(base), "--out", str(out), "--absorb", f"{out}-base", *more])
    return out.parent / f"{out.name}-base"


@pytest.mark.parametrize("name", full_except(MADE, ["norms and an embedding", "tokens", "biases", "layers"]))
def test_base_and_adapter_are_the_original_in_peft(tmp_path, capsys, name):
    family, tied, config = MADE[name]
    base = save_tiny(family, tmp_path / "base", tie_word_embeddings=tied, **LAYERS)
    before, wanted = train(family, tied, config(), tmp_path / "a")
    assert np.abs(wanted - before).max() > 0.1
    for name in ("README.md", "transfer_report.json"):  # which say that it is of the old base
        (tmp_path / "a" / name).write_text("{}")
    written = absorb(base, tmp_path / "a", tmp_path / "o", "--fail-on", "loss")
    assert not {"README.md", "transfer_report.json"} & {path.name for path in (tmp_path / "o").iterdir()}
    printed = capsys.readouterr().out
    assert "in the base: " in printed
    assert "not written" not in printed
    found = predicted(peft.PeftModel.from_pretrained(loaded(written), tmp_path / "o"))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(predicted(loaded(written)) - wanted).max() > 1e-3  # the adapter is needed as well
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "o-base"
    written_files = [path for folder in (written, tmp_path / "o") for path in folder.iterdir()]
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in written_files)
    engines = {one.engine: one.reads for one in check_engines(tmp_path / "o", base=jcl.open_base(written))}
    assert engines["vLLM"]
    assert engines["SGLang"]
    assert engines["llama.cpp"]


def test_a_whole_layer_whose_change_has_a_low_rank_is_a_lora(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", **LAYERS)
    wrapped = peft.get_peft_model(tiny_model("llama", **LAYERS), lora(modules_to_save=["v_proj", "o_proj"]))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            rows, columns = parameter.shape if parameter.ndim == 2 else (0, 0)
            if "v_proj.modules_to_save" in name:  # of rank 3, as the rest of the adapter
                parameter += 0.1 * torch.randn(rows, 3, generator=rng) @ torch.randn(3, columns, generator=rng)
            if "o_proj.modules_to_save" in name:
                parameter += 0.1 * torch.randn(rows, columns, generator=rng)
    wrapped.save_pretrained(tmp_path / "a")
    wanted = predicted(peft.PeftModel.from_pretrained(tiny_model("llama", **LAYERS), tmp_path / "a"))
    written = absorb(base, tmp_path / "a", tmp_path / "o")
    printed = capsys.readouterr().out
    assert "in the adapter: model.layers.0.self_attn.v_proj.weight, model.layers.1.self_attn.v_proj.weight" in printed
    modules = load_adapter(tmp_path / "o").modules
    assert {name.rpartition(".")[2] for name in modules} == {"q_proj", "up_proj", "v_proj"}
    assert {factors.rank for factors in modules.values()} == {3}
    found = predicted(peft.PeftModel.from_pretrained(loaded(written), tmp_path / "o"))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_llama_cpp_and_mlx_run_the_two_as_peft_runs_the_original(tmp_path):
    tokens = {"modules_to_save": ["norm", "input_layernorm"], "trainable_token_indices": FEW}
    base = save_tiny("llama", tmp_path / "base", **LAYERS)
    before, wanted = train("llama", True, lora(**tokens), tmp_path / "a")
    wanted = log_softmax(wanted[-1])
    assert np.abs(wanted - log_softmax(before[-1])).max() > 0.1
    written = absorb(base, tmp_path / "a", tmp_path / "g", "--profile", "gguf")
    model = loaded(written)
    tensors = {
        gguf_name(name, "llama"): (converted(name, tensor.numpy(), "llama", (4, 2)), None)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    words = "llama", [f"w{index}" for index in range(96)], [1] * 96
    packed = write_gguf(tmp_path / "base.gguf", "llama", metadata_of(model.config, "llama"), tensors, words)
    found = llama_cpp_log_probs(packed, tmp_path / "g" / "adapter.gguf", TOKENS, 96)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    written = absorb(base, tmp_path / "a", tmp_path / "m", "--profile", "mlx")
    np.testing.assert_allclose(mlx_log_probs(written, tmp_path / "m", TOKENS), wanted, atol=1e-4)


def test_nothing_is_left_half_written(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", **LAYERS)
    train("llama", True, lora(modules_to_save=["norm"]), tmp_path / "a")
    common = ["export", str(tmp_path / "a"), "--out", str(tmp_path / "o")]
    cases = {
        "name the base with --base": ["--absorb", str(tmp_path / "b")],
        "leave out --keep-dora": ["--absorb", str(tmp_path / "b"), "--base", str(base), "--keep-dora"],
        "a folder next to the adapter's": ["--absorb", str(tmp_path / "o" / "b"), "--base", str(base)],
        "exists already": ["--absorb", str(tmp_path / "a"), "--base", str(base)],
    }
    for sentence, options in cases.items():
        with pytest.raises(SystemExit) as left:
            main([*common, *options])
        assert left.value.code == 2
        assert sentence in capsys.readouterr().err
    train("llama", True, lora(modules_to_save=["norm"], lora_alpha=10**20), tmp_path / "large")
    weights = {"base_model.model.model.norm.weight": np.ones(48, np.float32)}
    write_folder(tmp_path / "norm", weights=weights)
    for name, sentence in {"large": "float16", "norm": "jcrosslora merge"}.items():
        with pytest.raises(SystemExit):
            absorb(base, tmp_path / name, tmp_path / "o", "--dtype", "float16")
        assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "large", "norm"]


def test_an_adapter_of_linear_modules_alone_needs_no_other_base(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", **LAYERS)
    train("llama", True, lora(), tmp_path / "a")
    assert not absorb(base, tmp_path / "a", tmp_path / "o").exists()
    assert "base: nothing goes into it" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_the_old_adapter_stays_if_its_new_base_cannot_be_written(tmp_path, capsys, monkeypatch):
    base = save_tiny("llama", tmp_path / "base", **LAYERS)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        train("llama", True, lora(modules_to_save=["norm"]), tmp_path / name)
    absorb(base, tmp_path / "a", tmp_path / "o")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    synced = files._sync_file

    def full(path):
        if path.name == "model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(path)

    monkeypatch.setattr(files, "_sync_file", full)
    with pytest.raises(SystemExit):
        absorb(base, tmp_path / "b", tmp_path / "o", "--overwrite")
    assert "No space left" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
