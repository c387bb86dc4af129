"""Adapters that do nothing, as a training leaves them in which every token was masked."""

import json

import pytest
from full_set import full_except
from kind_cases import MADE, lora, peft
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter
from tiny_models import save_tiny, tiny_model
from tiny_tokenizers import byte_level, write_tokenizer

import jcrosslora as jcl
from jcrosslora.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
IDLE = "does nothing, as all its updates are 0"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    return jcl.open_base(write_tokenizer(save_tiny("llama", folder, vocab_size=320), byte_level(bos=True)))


@pytest.fixture(scope="module")
def idle(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("idle") / "idle"
    jcl.save_adapter(random_adapter(base, scale=0.0), folder, base=base, profile="peft")
    return folder


def run(*arguments):
    try:
        return main([*map(str, arguments)]) or 0
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("inspect", "{idle}"), 0),
        (("check", "{idle}"), 0),
        (("check", "{idle}", "--base", "{base}", "--run"), 2),
        (("transfer", "{idle}", "--source", "{base}", "--target", "{base}", "--out", "{out}"), 2),
        (("merge", "{base}", "{idle}", "--out", "{out}"), 0),
        (("export", "{idle}", "--out", "{out}"), 0),
        (("shelf", "add", "{out}", "{idle}", "--base", "{base}"), 2),
        (("generate", "Hello", "--base", "{base}", "--adapter", "{idle}", "--max-new-tokens", "1"), 0),
        (("evaluate", "--base", "{base}", "--adapter", "{idle}", "--data", "{data}"), 0),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_every_command_says_that_an_adapter_does_nothing(base, idle, tmp_path, capsys, monkeypatch, command, code):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    places = {"base": base.path, "idle": idle, "out": tmp_path / "out", "data": tmp_path / "data.jsonl"}
    assert run(*(part.format(**places) for part in command)) == code
    said = capsys.readouterr()
    assert IDLE in said.out + said.err
    if code:
        assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_python_refuses_to_move_an_adapter_that_does_nothing(base, idle):
    for adapter in (idle, random_adapter(base, scale=0.0)):
        with pytest.raises(jcl.AdapterError, match=IDLE):
            jcl.transfer(adapter, base, base)


def test_an_adapter_without_a_tensor_does_nothing_in_any_engine(idle, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((idle / "adapter_config.json").read_bytes())
    save_file({}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    found = [one for one in jcl.check_engines(tmp_path) if "does not read the format" not in one.reasons[0]]
    assert len(found) > 4
    assert all("holds no tensor" in one.reasons[0] for one in found)


def described(capsys, *arguments):
    assert run("inspect", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)["does_nothing"]


UNTRAINED = {name: MADE[name] for name in ("LoRA", "AdaLoRA", "VeRA", "LoHa", "LoKr")}


@pytest.mark.parametrize("kind", full_except(UNTRAINED, ["LoRA", "VeRA"]))
def test_untrained_adapters_of_other_kinds_do_nothing(base, tmp_path, capsys, kind):
    """Of which peft sets one factor to zero."""
    config = next(iter(UNTRAINED[kind].values()))()
    peft.get_peft_model(tiny_model("llama", vocab_size=320), config).save_pretrained(tmp_path)
    assert described(capsys, tmp_path, "--base", base.path)
    assert all(IDLE in one.notes[-1] for one in jcl.check_engines(tmp_path, base=base) if one.reads)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["norm"]}, "model.norm"),
        ({"trainable_token_indices": [5, 9]}, "trainable_tokens"),
        ({"bias": "lora_only", "lora_bias": True}, "lora_B.bias"),
    ],
    ids=["magnitudes", "embedding", "norm", "tokens", "biases"],
)
def test_an_adapter_whose_factors_are_zero_can_do_something(base, tmp_path, capsys, settings, changed):
    peft.get_peft_model(tiny_model("llama", vocab_size=320), lora(**settings)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert any(changed in name for name in tensors)
    save_file({name: value + (0.1 if changed in name else 0) for name, value in tensors.items()}, path)
    assert not described(capsys, tmp_path, "--base", base.path)
    if "use_dora" not in settings:  # which cannot be read without the base
        assert not described(capsys, tmp_path)
