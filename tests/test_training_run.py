"""Training: the loss is what `evaluate` scores, it falls, and a run that was stopped ends with the same numbers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import main
from full_disk import fill_disk
from probe_bases import QUESTIONS, write_base
from rich.console import Console

from jcrosslora.adapter import load_adapter
from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.cli.adapters import Train
from jcrosslora.decoder import load_model
from jcrosslora.errors import CheckpointError, OutputError, UsageError
from jcrosslora.evaluate import score
from jcrosslora.training import Plan, TrainingSettings, encode, first_factors, loss_and_gradient, train_lora
from jcrosslora.training import batches as training_batches
from jcrosslora.training.start import to_adapter

SETTINGS = TrainingSettings(steps=6, batch=3, rate=2e-2, rank=3, alpha=6.0, dtype="float32", seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_base(write_base(tmp_path_factory.mktemp("base"), 60, bos=True, layers=2))


@pytest.fixture(scope="module")
def undisturbed(base):
    return train_lora(base, QUESTIONS, SETTINGS)


def same(one, other) -> bool:
    return one.modules.keys() == other.modules.keys() and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def stop_behind(monkeypatch, steps: int) -> list[int]:
    """Interrupt training in front of the update that follows so many; returns the steps that were made."""
    made, real = [], training_batches.update

    def update(settings, state, gradient):
        if len(made) == steps:
            raise KeyboardInterrupt
        made.append(int(state.step))
        return real(settings, state, gradient)

    monkeypatch.setattr(training_batches, "update", update)
    return made


def test_the_loss_is_what_evaluate_scores_and_falls(base, undisturbed):
    found = score(base, QUESTIONS[:3], [undisturbed])
    right = np.arange(3), found.answers
    by_token = -found.log_probs[:, *right].sum(axis=1) / found.tokens[right].sum()
    assert by_token[1] < 0.9 * by_token[0]
    # Before training the loss is the base's, since B is zero.
    batch = Plan([encode(load_tokenizer(base), one) for one in QUESTIONS[:3]], 3, 1, 0).batch(0)
    loss, _ = loss_and_gradient(load_model(base), first_factors(base, SETTINGS), batch, 2.0)
    np.testing.assert_allclose(loss, by_token[0], rtol=1e-5)


def test_a_loss_on_all_tokens_is_that_of_transformers(base):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    read = encode(load_tokenizer(base), QUESTIONS[0], "all")
    loss, _ = loss_and_gradient(load_model(base), first_factors(base, SETTINGS), Plan([read], 1, 1, 0).batch(0), 2.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    ids = torch.tensor(read.ids[None], dtype=torch.int64)
    with torch.no_grad():
        wanted = float(model(ids, labels=ids).loss)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    answers = train_lora(base, QUESTIONS, SETTINGS)
    whole = train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, loss="all"))
    assert not same(whole, answers)


def test_settings_are_checked_first(base):
    with pytest.raises(UsageError, match="rank 0"):
        train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, rank=0))


def test_first_factors_are_those_of_peft(base):
    factors = first_factors(base, SETTINGS)
    for role, one in factors.roles.items():
        assert not np.asarray(one.b).any()
        bound = one.a.shape[-1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        a = np.asarray(one.a)
        assert 0.95 * bound < np.abs(a).max() <= bound, role
        np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.15)
    other = first_factors(base, dataclasses.replace(SETTINGS, seed=2))
    assert not np.array_equal(other.roles["q_proj"].a, factors.roles["q_proj"].a)


def test_the_adapter_has_the_scale_inside_b(base):
    factors = jax.tree.map(lambda leaf: leaf + 0.5, first_factors(base, SETTINGS))
    adapter = to_adapter(factors, 2.0, base)
    assert len(adapter.modules) == 14
    assert adapter.info.base_name == Path(base.name).name
    one = adapter.modules["model.layers.1.mlp.up_proj"]
    np.testing.assert_array_equal(one.b, 2.0 * np.asarray(factors.roles["up_proj"].b[1]))
    np.testing.assert_array_equal(one.a, factors.roles["up_proj"].a[1])


def test_a_stopped_run_continues_to_the_same_numbers(base, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "states"
    with monkeypatch.context() as patch:
        stop_behind(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder, every=2)
    assert {path.name for path in folder.iterdir()} == {"2", "4"}
    made = stop_behind(monkeypatch, 99)
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    assert same(train_lora(base, QUESTIONS, SETTINGS, checkpoints=moved, every=2), undisturbed)
    assert made == [4, 5]
    # Once more: all steps are made, so nothing is left to do.
    assert same(train_lora(base, QUESTIONS, SETTINGS, checkpoints=moved), undisturbed)
    assert made == [4, 5]


def test_checkpoints_do_not_change_the_numbers_and_seeds_do(base, undisturbed, tmp_path):
    kept = train_lora(base, QUESTIONS, SETTINGS, checkpoints=tmp_path / "states", every=1)
    assert same(kept, undisturbed)
    assert {path.name for path in (tmp_path / "states").iterdir()} == {"5", "6"}
    assert not same(train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, seed=2)), undisturbed)


@pytest.fixture(scope="module")
def states(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "states"
    train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder, every=3)
    return folder


@pytest.mark.parametrize(
    ("change", "came"),
    [
        ({"seed": 5}, "seed was 1 there and is 5 here"),
        ({"rate": 1e-4}, r"rate was 0\.02 there and is 0\.0001 here"),
        ({"rank": 4}, "rank was 3 there"),
        ({"steps": 9}, "steps was 6 there"),
        ({"modules": ("q_proj",)}, "modules was"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' there"),
    ],
)
def test_states_of_other_settings_are_refused(base, states, change, came):
    with pytest.raises(UsageError, match=f"{states}: checkpoints of another run \\({came}"):
        train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, **change), checkpoints=states)


def test_states_from_before_there_were_optimizers_go_on(base, states, undisturbed, tmp_path):
    folder = shutil.copytree(states, tmp_path / "old")
    for path in folder.rglob("run/metadata"):
        run = json.loads(path.read_text())
        assert run.pop("optimizer") == "adamw"
        path.write_text(json.dumps(run))
    assert same(train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder), undisturbed)
    with pytest.raises(UsageError, match="optimizer was 'adamw' there and is 'lora-rite' here"):
        train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, optimizer="lora-rite"), checkpoints=folder)


def test_states_do_not_name_their_folder(base, tmp_path):
    folder = tmp_path / "telling"
    train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, steps=1), checkpoints=folder, every=1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert (folder / "1" / "state" / "_METADATA") in files
    assert not [path for path in files if b"telling" in path.read_bytes()]


def test_states_of_other_examples_or_another_base_are_refused(base, states, tmp_path):
    with pytest.raises(UsageError, match="another run \\(examples was"):
        train_lora(base, QUESTIONS[:3], SETTINGS, checkpoints=states)
    other = open_base(write_base(tmp_path / "other", 60, bos=True, layers=2, seed=7))
    with pytest.raises(UsageError, match="another run \\(base was"):
        train_lora(other, QUESTIONS, SETTINGS, checkpoints=states)


def test_unfinished_checkpoints_are_ignored(base, states, undisturbed, tmp_path):
    folder = shutil.copytree(states, tmp_path / "states")
    shutil.rmtree(folder / "6")
    left = folder / "6.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", left)
    assert same(train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder), undisturbed)
    assert {path.name for path in folder.iterdir()} == {"3", "6"}


def damage(folder: Path, how: str) -> None:
    if how == "no state":
        shutil.rmtree(folder / "6" / "state")
    elif how == "no run":
        shutil.rmtree(folder / "6" / "run")
    else:
        for path in (path for path in (folder / "6" / how).rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["no state", "no run", "state", "run"])
def test_a_damaged_state_is_named(base, states, tmp_path, how):
    folder = shutil.copytree(states, tmp_path / "states")
    damage(folder, how)
    with pytest.raises(CheckpointError, match="not a readable checkpoint") as caught:
        train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder)
    assert str(caught.value).startswith(f"{folder / '6'}: ")
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_state_is_noticed(base, states, tmp_path):
    folder = shutil.copytree(states, tmp_path / "states")
    path = max((path for path in (folder / "6").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # Which of the two notices first, our digests or the decompressor of Orbax, is up to where the bit is.
    with pytest.raises(CheckpointError, match="not a readable checkpoint") as caught:
        train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder)
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_the_checkpoint_folder_is_refused(base, tmp_path):
    (tmp_path / "states").write_text("mine")
    with pytest.raises(UsageError, match="states: is a file"):
        train_lora(base, QUESTIONS, SETTINGS, checkpoints=tmp_path / "states")
    assert (tmp_path / "states").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run(base):
    with pytest.raises(UsageError, match=r"loss is (nan|inf) at step 1: lower the rate"):
        train_lora(base, QUESTIONS, dataclasses.replace(SETTINGS, rate=1e30))


@pytest.mark.parametrize(("questions", "every"), [([], 1), (QUESTIONS, 0)])
def test_no_examples_or_no_checkpoint_interval_are_refused(base, questions, every):
    with pytest.raises(UsageError, match="expected 1 or more"):
        train_lora(base, questions, SETTINGS, every=every)


def test_the_command_trains_from_a_file_and_writes_a_folder(base, tmp_path, capsys):
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "Water and", "answer": "light"}\n{"prompt": "Anna and", "answer": "Peter"}\n')
    settings = {"steps": 2, "batch": 2, "rank": 2, "modules": ("q_proj", "o_proj")}
    command = Train(base=base.ref, data=data, out=tmp_path / "out", **settings)
    command.run(Console(width=200))
    assert capsys.readouterr().out == f"written: {tmp_path / 'out'}\n"
    adapter = load_adapter(tmp_path / "out")
    assert sorted({name.rpartition(".")[2] for name in adapter.modules}) == ["o_proj", "q_proj"]
    assert {factors.rank for factors in adapter.modules.values()} == {2}
    assert all(np.asarray(factors.b).any() for factors in adapter.modules.values())
    with pytest.raises(OutputError, match="out: exists already"):
        command.run(Console())
    with pytest.raises(UsageError, match="limit 0 is out of range"):
        dataclasses.replace(command, out=tmp_path / "other", limit=0).run(Console())
    assert same(train_lora(base.ref, data, TrainingSettings(**settings)), adapter)


@pytest.mark.parametrize("states", ["a/states", "a"])
def test_checkpoints_in_the_folder_of_the_adapter_are_refused(base, tmp_path, states):
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "Water and", "answer": "light"}\n')
    with pytest.raises(UsageError, match="give a folder outside of it"):
        Train(base=base.ref, data=data, out=tmp_path / "a", checkpoints=tmp_path / states).run(Console())
    assert not (tmp_path / "a").exists()


def test_a_folder_for_checkpoints_with_something_else_in_it_is_refused(base, tmp_path):
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "Water and", "answer": "light"}\n')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "numbers" / "7").mkdir(parents=True)
    for name, reason in (("file", "is a file"), ("numbers", "holds '7'"), (base.path, "holds 'model.safe")):
        with pytest.raises((OutputError, UsageError), match=reason):
            Train(base=base.ref, data=data, out=tmp_path / "a", checkpoints=tmp_path / name).run(Console())
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "a").exists()


def test_a_state_that_was_half_removed_does_not_block_a_newer_one(base, undisturbed, tmp_path):
    folder = tmp_path / "states"
    train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder, every=2)
    first, _ = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    (first / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(first / "state")
    assert same(train_lora(base, QUESTIONS, SETTINGS, checkpoints=folder), undisturbed)


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_training_says_what_it_left(base, tmp_path, capsys, monkeypatch, kept):
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "Water and", "answer": "light"}\n')
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "notes.txt").write_text("")
    stop_behind(monkeypatch, 21 if kept else 19)  # there is a checkpoint every 20 steps
    states = ["--checkpoints", str(tmp_path / "states")]
    with pytest.raises(SystemExit) as stopped:
        main(["train", base.ref, "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "22", *states])
    assert stopped.value.code == 130
    said = "goes on from there" if kept else "interrupted; nothing was written"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kept", [True, False])
def test_a_full_disk_ends_a_training_with_one_line_that_names_the_newest_state(
    base, tmp_path, capsys, monkeypatch, kept
):
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "Water and", "answer": "light"}\n')
    fill_disk(monkeypatch, after=kept)
    states = ["--checkpoints", str(tmp_path / "states")]
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "train",
                base.ref,
                "--data",
                str(data),
                "--out",
                str(tmp_path / "out"),
                "--steps",
                "42",
                "--quiet",
                *states,
            ]
        )
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    advice = "free space: step 20 is kept in states, and the same" if kept else "choose another folder, or free space"
    assert f"{tmp_path / 'states'}: cannot be written (No space left on device): {advice}" in line
    assert [path.name for path in (tmp_path / "states").iterdir()] == (["20"] if kept else [])
    assert not (tmp_path / "out").exists()
