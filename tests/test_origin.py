"""Adapters that are given with another model than their own: what is said, and what is not."""

import dataclasses
import shutil

import numpy as np
import pytest
from command_line import main
from probe_bases import CORPUS, write_move
from safetensors.numpy import load_file, save_file
from tiny_bases import delta, random_adapter

import jcrosslora as jcl

NAMES = [
    ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5 Coder 0.5B Instruct AWQ", "'coder'"),
    ("Qwen/Qwen2.5-0.5B", "Qwen2.5 1.5B", "0.5b and 1.5b"),
    ("google/gemma-3-270m-it", "google/gemma-3-270m", "'instruct'"),
    # Copies of one model: in GGUF, whose own name leaves words out, and by other makers.
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "Smollm2 135M 8k Lc100K Mix1 Ep2", None),
    ("google/gemma-3-270m-it", "Gemma 3 270m", None),
    ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B", None),
    ("/home/me/llama-chat", "meta-llama/Llama-3-8B", None),
]


@pytest.fixture(scope="module")
def move(tmp_path_factory):
    return write_move(tmp_path_factory.mktemp("move"))


@pytest.mark.parametrize(("stated", "name", "evidence"), NAMES)
def test_another_base_than_the_adapter_names_is_warned_about(move, stated, name, evidence):
    _, source, target = move
    adapter = random_adapter(jcl.open_base(source))
    adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, base_name=stated))
    moved = jcl.transfer(adapter, jcl.open_base(source, name=name), target, "pad-truncate", cache=False)
    found = [text for text in moved.report.warnings if "names" in text and "as its base" in text]
    assert len(found) == (evidence is not None)
    assert evidence is None or (evidence in found[0] and f"give --source {stated}" in found[0])


def test_a_card_names_the_source_and_not_what_the_adapter_says(move, tmp_path):
    _, source, target = move
    adapter = random_adapter(jcl.open_base(source))
    adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, base_name="org/model-chat"))
    for name, shown in (("org/model", "| source | org/model |"), ("Model 135M", "| source | org/model-chat |")):
        moved = jcl.transfer(adapter, jcl.open_base(source, name=name), target, "pad-truncate", cache=False)
        out = moved.save(tmp_path / name.replace("/", "-"))
        assert shown in (out / "README.md").read_text()


def test_a_source_that_holds_the_adapter_already_is_warned_about(move, tmp_path):
    _, source, target = move
    base = jcl.open_base(source)
    adapter = random_adapter(base, scale=0.3)
    weights = {name: np.array(base.tensor(name)) for name in base.store.names()}
    for name, factors in adapter.modules.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta(factors)
    merged = jcl.open_base(weights, config=dict(base.config), tokenizer=source)
    warned = []
    for given in (base, merged):
        settings = jcl.methods.Theseus()
        moved = jcl.transfer(adapter, given, target, settings, prompts=CORPUS, effect="never", cache=False)
        warned.append([text for text in moved.report.warnings if "hold the adapter already" in text])
    assert (len(warned[0]), len(warned[1])) == (0, 1)


def test_what_speaks_against_a_source_is_said_before_the_work(move, tmp_path, capsys):
    _, source, target = move
    base = jcl.open_base(source)
    adapter = random_adapter(base, scale=0.3)
    saved = jcl.save_adapter(adapter, tmp_path / "adapter", base_name="tiny")
    merged = jcl.merge(jcl.MergeSettings(str(source), str(saved), str(tmp_path / "merged"))).folder
    command = ["transfer", str(saved), "--source", str(merged), "--target", str(target), "--out", str(tmp_path / "out")]
    command += ["--method", "theseus", "--no-cache", "--effect", "never"]
    main([*command, "--dry-run"])
    said = "the weights of the source seem to hold the adapter already"
    assert f"warning {said}" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "prompts.txt").write_text("\n".join(CORPUS))
    main([*command, "--prompts", str(tmp_path / "prompts.txt")])
    assert f"warning: {said}" in capsys.readouterr().err


def test_a_merged_model_is_no_adapter_and_is_called_what_it_is(move):
    _, source, target = move
    with pytest.raises(jcl.AdapterError, match="is a whole model, perhaps with an adapter merged into it"):
        jcl.transfer(source, source, target, "pad-truncate")


def test_a_target_that_is_the_source_is_called_the_same_model(move):
    adapter, source, _ = move
    verdict = jcl.transfer(adapter, source, source, "copy", cache=False).verdict
    assert verdict.level == "aligned"
    assert verdict.text.startswith(
        "source and target are one and the same base (equal digests): nothing had to be moved"
    )


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora"])
def test_a_target_that_is_nearly_the_source_is_called_so(move, method):
    adapter, source, _ = move
    base = jcl.open_base(source)
    rng = np.random.default_rng(0)
    tensors = {name: np.array(base.tensor(name)) for name in base.store.names()}
    tensors = {name: one * (1 + 0.01 * rng.standard_normal(one.shape, np.float32)) for name, one in tensors.items()}
    near = jcl.open_base(tensors, config=dict(base.config), tokenizer=source)
    verdict = jcl.transfer(adapter, source, near, method, cache=False).verdict
    assert verdict.level == "aligned"
    assert verdict.text.startswith("the two bases are nearly identical (weight cosine 1.000)")


@pytest.fixture(scope="module")
def written(move, tmp_path_factory):
    """An adapter that records its base, that base, and another of its shapes."""
    adapter, source, target = move
    folder = tmp_path_factory.mktemp("written")
    jcl.transfer(adapter, source, target, "pad-truncate").save(folder / "moved")
    shutil.copytree(target, folder / "other")
    tensors = load_file(folder / "other" / "model.safetensors")
    save_file({name: 2 * one for name, one in tensors.items()}, folder / "other" / "model.safetensors")
    return folder / "moved", target, folder / "other"


@pytest.mark.parametrize("profile", ["peft", "mlx", "gguf"])
def test_the_digest_that_a_file_records_decides_and_not_names(move, written, tmp_path, profile):
    _, own, other = written
    out = jcl.transfer(move[0], move[1], own, "pad-truncate").save(tmp_path / "moved", profile=profile)
    for given, warned in ((own, 0), (other, 1)):
        base = jcl.open_base(given, name="Another 7B chat")
        adapter = jcl.load_adapter(out, base)
        stated = dataclasses.replace(adapter.info, base_name="org/Some-1B")
        adapter = dataclasses.replace(adapter, info=stated)
        warnings = jcl.transfer(adapter, base, move[1], "pad-truncate").report.warnings
        assert not [text for text in warnings if "as its base" in text]
        found = [text for text in warnings if "whose digest is another" in text]
        assert len(found) == warned
        assert all("was written for org/Some-1B (sha256:" in text for text in found)


@pytest.mark.parametrize("command", ["evaluate", "generate", "export", "merge"])
def test_every_command_warns_of_a_base_that_is_not_the_recorded_one(written, tmp_path, capsys, command):
    adapter, own, other = written
    (tmp_path / "data.jsonl").write_text('{"prompt": "Water", "answer": " boils"}\n')
    for base in (own, other):
        out = ["--out", str(tmp_path / base.name)]
        main(
            {
                "evaluate": ["evaluate", "--data", str(tmp_path / "data.jsonl"), "--limit", "1"],
                "generate": ["generate", "Water", "--max-new-tokens", "1"],
                "export": ["export", str(adapter), *out],
                "merge": ["merge", str(base), str(adapter), *out],
            }[command]
            + ([] if command == "merge" else ["--base", str(base)])
            + (["--adapter", str(adapter)] if command in ("evaluate", "generate") else [])
        )
        printed = capsys.readouterr()
        said = [line for line in (printed.out + printed.err).splitlines() if line.startswith("warning: ")]
        assert len(said) == (base == other)
        assert all("the adapter is used on it as it is" in line for line in said)


def test_a_batch_warns_of_a_source_that_is_not_the_recorded_base(move, written, tmp_path, capsys):
    adapter, own, other = written
    plan = f'[bases]\nsource = "{move[1]}"\nown = "{own}"\nother = "{other}"\n'
    plan += f'[adapters]\nown = ["{adapter}"]\nother = ["{adapter}"]\n'
    moves = '[[moves]]\nfrom = "{0}"\nto = ["source"]\nmethods = ["pad-truncate"]\nlabel = "{0}"\n'
    (tmp_path / "plan.toml").write_text(f'out = "out"\n{plan}{moves.format("own")}{moves.format("other")}')
    main(["batch", str(tmp_path / "plan.toml")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("is used on it as it is")]
    assert len(said) == 1
    assert "other" in said[0]


def test_a_wrong_base_is_refused_before_weights_are_read(move, tmp_path, capsys, monkeypatch):
    adapter, source, target = move

    def read(*_):
        pytest.fail("weights were read")

    monkeypatch.setattr("jcrosslora.checkpoint.safetensors.ShardedStore.tensor", read)
    monkeypatch.setattr("jcrosslora.checkpoint.safetensors.ShardedStore.sha256s", read)
    command = ["transfer", str(adapter), "--source", str(target), "--target", str(source), "--out", str(tmp_path / "o")]
    for flags in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *flags])
        assert stopped.value.code == 2
        assert "give the base it was trained on" in capsys.readouterr().err
