"""`check --run`: an adapter in the engine that its format is for, against our decoder."""

import json

import numpy as np
import pytest
from command_line import main
from gguf_files import converted, gguf_name, metadata_of, write_gguf
from kind_cases import make_adapter, peft
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter
from tiny_models import save_tiny, tiny_model, transformers
from tiny_tokenizers import byte_level, write_tokenizer

import jcrosslora as jcl
from jcrosslora.evaluate import engine_runs

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
SIZES = {"num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return jcl.open_base(write_tokenizer(save_tiny("llama", folder, **SIZES), byte_level(bos=True)))


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    """The base as GGUF, with its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path)
    vocabulary = json.loads((base.path / "tokenizer.json").read_text())["model"]
    words = [name for name, _ in sorted(vocabulary["vocab"].items(), key=lambda item: item[1])]
    words += [f"<unused{index}>" for index in range(SIZES["vocab_size"] - len(words))]
    tensors = {
        gguf_name(name, "llama"): (converted(name, tensor.numpy(), "llama", (4, 2)), None)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    metadata = metadata_of(model.config, "llama") | {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocabulary["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    kinds = [3, 3, 3, *[1] * (len(words) - 3)]
    path = tmp_path_factory.mktemp("packed") / "base.gguf"
    return jcl.open_base(write_gguf(path, "llama", metadata, tensors, ("gpt2", words, kinds)))


def checked(capsys, *arguments) -> tuple[int, dict]:
    try:
        main(["check", *map(str, arguments), "--run", "--json"])
        code = 0
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code in (0, 1), printed.err
    return code, json.loads(printed.out)


def spoil(folder, file="adapter_model.safetensors"):
    """Change one tensor of an adapter."""
    weights = load_file(folder / file)
    name = next(name for name in weights if "v_proj.lora_B" in name or "v_proj.lora_b" in name)
    save_file(weights | {name: weights[name] * -1}, folder / file, {"format": "pt"})


@pytest.mark.parametrize(("profile", "file"), [("portable", "adapter_model"), ("mlx", "adapters")])
def test_a_right_adapter_agrees_and_a_spoiled_one_differs(base, tmp_path, capsys, profile, file):
    if profile == "mlx":
        pytest.importorskip("mlx_lm")
    original = jcl.save_adapter(random_adapter(base, scale=0.1), tmp_path / "a", base=base)
    out = jcl.save_adapter(jcl.load_adapter(original), tmp_path / "o", base=base, profile=profile)
    code, found = checked(capsys, out, "--base", base.path, "--original", original)
    assert (code, found["differs"], found["agreeing"]) == (0, False, found["answers"])
    assert max(found["difference"], found["plain"]) < 1e-3
    assert found["change"] > 0.1
    spoil(out, f"{file}.safetensors")
    code, found = checked(capsys, out, "--base", base.path, "--original", original)
    assert (code, found["differs"]) == (1, True)
    assert found["difference"] > 0.01


def test_llama_cpp_is_run_on_a_gguf_base(base, packed, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    adapter = random_adapter(base, scale=0.1)
    right, wrong = (jcl.save_adapter(adapter, tmp_path / name, base=base) for name in "ab")
    spoil(wrong)
    for folder, code in ((right, 0), (wrong, 1)):
        out = jcl.save_adapter(jcl.load_adapter(folder), tmp_path / f"{folder.name}-g", base=base, profile="gguf")
        assert checked(capsys, out, "--base", packed.path, "--original", right)[0] == code
    # transformers reads this base from GGUF.
    assert checked(capsys, right, "--base", packed.path)[0] == 0


def test_a_module_that_the_engine_does_not_find_is_a_difference(base, tmp_path, capsys):
    out = jcl.save_adapter(random_adapter(base, scale=0.1), tmp_path / "o", base=base)
    weights = load_file(out / "adapter_model.safetensors")
    inner = {key.replace("model.model.", "model.model.language_model.", 1): one for key, one in weights.items()}
    save_file(inner, out / "adapter_model.safetensors", {"format": "pt"})
    code, found = checked(capsys, out, "--base", base.path)
    assert code == 1
    assert found["difference"] == pytest.approx(found["change"], rel=1e-3)


def test_norms_and_token_rows_are_run_as_well(base, tmp_path, capsys):
    settings = {"modules_to_save": ["norm"], "trainable_token_indices": [5, 50], "target_modules": ["q_proj"]}
    make_adapter(peft.LoraConfig(r=2, **settings), tmp_path / "a", tiny_model("llama", **SIZES))
    code, found = checked(capsys, tmp_path / "a", "--base", base.path)
    assert (code, found["notes"]) == (0, [])
    assert found["change"] > 0.1
    main(["export", str(tmp_path / "a"), "--base", str(base.path), "--out", str(tmp_path / "o")])
    capsys.readouterr()
    assert checked(capsys, tmp_path / "o", "--base", base.path, "--original", tmp_path / "a")[0] == 1


def test_what_cannot_be_run_is_said_in_one_line(base, tmp_path, capsys, monkeypatch):
    plain = jcl.save_adapter(random_adapter(base, scale=0.1), tmp_path / "p", base=base)
    stated = json.loads((plain / "adapter_config.json").read_text())
    evil = jcl.save_adapter(jcl.load_adapter(plain), tmp_path / "e", base=base)
    (evil / "adapter_config.json").write_text(json.dumps(stated | {"megatron_config": {"a": 1}, "megatron_core": "x"}))
    assert "name it with --base" in refusal(capsys, plain)
    assert "which is not imported" in refusal(capsys, evil, "--base", base.path)
    missing = engine_runs.Engine("peft", "not-a-package", "torch", "", lambda *_: [])
    monkeypatch.setitem(engine_runs.ENGINES, "PEFT", missing)
    assert "pip install 'jcrosslora[torch]'" in refusal(capsys, plain, "--base", base.path)


@pytest.mark.parametrize(
    ("profile", "package", "loads"), [("gguf", "xllamacpp", "in GGUF"), ("mlx", "mlx_lm", "in safetensors")]
)
def test_a_base_that_the_engine_does_not_load_is_refused(base, packed, tmp_path, capsys, profile, package, loads):
    pytest.importorskip(package)
    adapter = jcl.save_adapter(random_adapter(base, scale=0.1), tmp_path / "a", base=base, profile=profile)
    wrong = base if profile == "gguf" else packed
    assert f"it loads bases {loads}" in refusal(capsys, adapter, "--base", wrong.path)


def refusal(capsys, *arguments):
    """Return the one line by which `check --run` refuses to run."""
    with pytest.raises(SystemExit) as left:
        main(["check", *map(str, arguments), "--run"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_predictions_that_are_no_numbers_differ(base, tmp_path, capsys):
    original = jcl.save_adapter(random_adapter(base, scale=0.1), tmp_path / "a", base=base)
    broken = jcl.save_adapter(jcl.load_adapter(original), tmp_path / "o", base=base)
    weights = load_file(broken / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] * np.nan}, broken / "adapter_model.safetensors", {"format": "pt"})
    code, found = checked(capsys, broken, "--base", base.path, "--original", original)
    assert (code, found["differs"], found["difference"]) == (1, True, None)


def test_the_line_names_engine_version_and_figures(base, tmp_path, capsys):
    out = jcl.save_adapter(random_adapter(base, scale=0.1), tmp_path / "o", base=base)
    main(["check", str(out), "--base", str(base.path), "--run"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"peft {peft.__version__} agrees: log-probabilities differ by up to ")
    assert line.endswith("3 of 3 answers agree")
    assert np.isfinite(float(line.split("differ by up to ")[1].split()[0]))
