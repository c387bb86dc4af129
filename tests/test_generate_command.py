"""`jcrosslora generate` and the object behind it: who answers which prompt, what is written, what is refused."""

import io
import json

import jax
import numpy as np
import pytest
from command_line import main
from probe_bases import chat_base, write_base
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.decoder import Generator
from jcrosslora.text import Message
from jcrosslora.utils.texts import visible

PROMPTS = ["Water boils at", "Anna and", "The quick brown fox jumps over the lazy dog. A dog"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    base = jcl.open_base(write_base(folder / "base", 60, layers=2))
    for number in range(2):
        adapter = random_adapter(base, seed=number, scale=0.1)
        jcl.save_adapter(adapter, folder / f"a{number}", base_name="base")
    write_llama(folder / "other", layers=1, hidden=24)
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "other")), folder / "foreign", base_name="other")
    return folder


@pytest.fixture(scope="module")
def composed(files):
    return jcl.compose(files / "base", [files / "a0", files / "a1"], "select")


def alone(composed, number, prompts):
    """What the base writes with one adapter, or with none."""
    adapter = None if number is None else composed.adapters[number]
    generator = Generator.of(composed.base, adapter, model=composed.model, tokenizer=composed.tokenizer)
    return [one.text for one in generator.write(prompts, 6, 0.0, jax.random.key(0))]


def test_each_prompt_of_a_batch_gets_its_own_adapter(composed):
    found = composed.generate(PROMPTS, weights=[[0, 1], [1, 0], [0, 0]], max_new_tokens=6)
    one, two, base = (alone(composed, number, PROMPTS) for number in (1, 0, None))
    assert found == [one[0], two[1], base[2]]
    assert [len(set(texts)) for texts in zip(one, two, base, strict=True)] == [3, 3, 3]


def test_weights_may_be_a_function_of_the_prompts(composed):
    def longest_get_the_second(prompts):
        return np.array([[len(one) <= 20, len(one) > 20] for one in prompts], float)

    found = composed.generate(PROMPTS, weights=longest_get_the_second, max_new_tokens=6)
    assert found == composed.generate(PROMPTS, weights=[[1, 0], [1, 0], [0, 1]], max_new_tokens=6)


def generated(capsys, *arguments):
    main(["generate", "--max-new-tokens", "6", *map(str, arguments)])
    return capsys.readouterr()


def test_the_command_prints_what_the_object_writes(files, composed, capsys, monkeypatch):
    flags = "--base", files / "base", "--adapter", files / "a0", "--adapter", files / "a1", "--compose", "select"
    rows = "--weights", "0,1", "--weights", "1,0"
    wanted = composed.generate(PROMPTS[:2], weights=[[0, 1], [1, 0]], max_new_tokens=6)
    printed = generated(capsys, *flags, *rows, "--json", *PROMPTS[:2])
    assert [one["text"] for one in json.loads(printed.out)] == wanted
    assert printed.err == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS[:2])))
    first, second = map(visible, wanted)
    assert generated(capsys, *flags, *rows, "--prompts", "-").out == (
        f"> {PROMPTS[0]}\n{first}\n\n> {PROMPTS[1]}\n{second}\n"
    )
    (files / "prompts.txt").write_text(PROMPTS[0])
    assert generated(capsys, *flags, "--weights", "0,1", "--prompts", files / "prompts.txt").out == f"{first}\n"


def test_a_gate_that_nobody_trained_is_said(files, capsys):
    flags = "--base", files / "base", "--adapter", files / "a0", "--adapter", files / "a1", "--compose"
    assert "router is not trained" in generated(capsys, *flags, "router", "Anna").err
    assert generated(capsys, *flags, "mixture", "Anna").err == ""


def test_texts_are_asked_in_the_chat_template_of_the_base(tmp_path, capsys):
    base = chat_base(tmp_path / "chat")
    jcl.save_adapter(random_adapter(base, scale=0.05), tmp_path / "a", base_name="base")
    composed = jcl.compose(base, [tmp_path / "a"])
    flags = "--base", tmp_path / "chat", "--adapter", tmp_path / "a"
    asked = composed.generate([[{"role": "user", "content": "Anna"}]], max_new_tokens=6)
    plain = composed.generate(["Anna"], max_new_tokens=6)
    assert asked != plain
    assert asked == composed.generate([(Message("user", "Anna"),)], max_new_tokens=6)
    assert generated(capsys, *flags, "Anna").out == f"{asked[0]}\n"
    assert generated(capsys, *flags, "--chat", "never", "Anna").out == f"{plain[0]}\n"
    for written, said in (({"prompt": "Peter"}, plain), ({"messages": [{"role": "user", "content": "Peter"}]}, asked)):
        (tmp_path / "a" / "completions.jsonl").write_text(json.dumps(written | {"answer": "Anna"}))
        assert generated(capsys, *flags, "Anna").out == f"{said[0]}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "{}/foreign", "x"], "foreign: model.layers.0.mlp.down_proj has A"),
        (["x"], "no adapters to compose"),
        (["--adapter", "{}/a0", "--compose", "mixtures", "x"], "(did you mean 'mixture'?)"),
        (["--adapter", "{}/a0", "--adapter", "{}/a1", "--compose", "select", "x"], "no weights"),
        (["--adapter", "{}/a0", "--weights", "1,2", "x"], "weights have shape [2]: expected [1]"),
        (["--adapter", "{}/a0", "--weights=-1", "x"], "a weight is -1"),
        (["--adapter", "{}/a0", "--weights", "one", "x"], "weights 'one': expected a number"),
        (["--adapter", "{}/a0"], "give texts, or a file with --prompts"),
        (["--adapter", "{}/a0", "--temperature", "-1", "x"], "a temperature from 0 on"),
    ],
)
def test_bad_input_is_one_line(files, capsys, flags, message):
    with pytest.raises(SystemExit) as found:
        main(["generate", "--base", str(files / "base"), *[one.format(files) for one in flags]])
    assert found.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
