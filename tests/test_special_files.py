"""Pipes, devices and absurdly large files in place of small ones: an error that says so, and nobody waits."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import main
from probe_bases import chat_base
from shelf_adapters import TASKS, write_adapter

import jcrosslora as jcl
from jcrosslora.errors import AdapterError

_SECONDS = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A base, an adapter of it and a shelf of the adapter; they are not changed."""
    folder = tmp_path_factory.mktemp("whole")
    base = chat_base(folder / "base")
    write_adapter(folder / "adapter", base, texts=TASKS["fox"])
    jcl.Shelf(folder / "shelf", base).add(folder / "adapter")
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy, as the current folder."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@contextmanager
def in_time():
    """Fail if the block waits."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"nothing came in {_SECONDS} s"))
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def refused(capsys, *arguments: str) -> str:
    """Run a command that fails, and return its error without the spaces at which it is broken."""
    with in_time(), pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


MOVE = ("transfer", "adapter", "--source", "base", "--target", "base", "--out", "out", "--no-cache")
GENERATE = ("generate", "Hello", "--base", "base", "--adapter", "adapter")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("base/config.json", ("inspect", "base")),
        ("base/model.safetensors", ("inspect", "base")),
        ("base/tokenizer.json", GENERATE),
        ("base/tokenizer_config.json", GENERATE),
        ("base/chat_template.jinja", GENERATE),
        ("prompts.txt", (*MOVE, "--method", "distill", "--prompts", "prompts.txt")),
        ("recipe.toml", ("transfer", "--recipe", "recipe.toml")),
        ("plan.toml", ("batch", "plan.toml")),
        ("template.jinja", (*GENERATE, "--template", "template.jinja")),
        ("task.jsonl", ("evaluate", "--base", "base", "--data", "task.jsonl")),
        ("adapter/transfer_report.json", ("report", "adapter")),
        ("samples.txt", ("shelf", "add", "shelf", "adapter", "--prompts", "samples.txt")),
        ("shelf/segments/000001.json", ("shelf", "list", "shelf")),
    ],
)
@pytest.mark.parametrize("make", [pipe, device])
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused(place, capsys, name, command, make):
    make(place / name)
    error = refused(capsys, *command)
    assert "not a regular file" in error
    assert Path(name).name in error


@pytest.mark.parametrize("name", ["composition.json", "composition.safetensors"])
def test_a_pipe_in_a_composition_is_refused(place, name):
    jcl.compose("base", ["adapter"], "gated").save(place / "composed")
    (facts := place / "composed" / "composition.json").write_text(facts.read_text().replace("digests", "other"))
    pipe(place / "composed" / name)
    with in_time(), pytest.raises(AdapterError, match="not a regular file"):
        jcl.load_composition(place / "composed", "base")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("command", ["inspect", "check"])
def test_an_adapter_of_a_pipe_is_no_adapter(place, capsys, name, command):
    pipe(place / "adapter" / name)
    assert f"no {name} here" in refused(capsys, command, "adapter")


@pytest.mark.parametrize("name", ["README.md", "transfer_report.json", "chat_template.jinja"])
def test_a_pipe_beside_an_adapter_is_not_read(place, capsys, name):
    pipe(place / "adapter" / name)
    with in_time():
        main(["inspect", "adapter"])
    assert "LoRA" in capsys.readouterr().out


def test_a_pipe_beside_the_index_of_a_shelf_is_made_again(place, capsys):
    pipe(place / "shelf" / "text.safetensors")
    with in_time():
        main(["shelf", "search", "shelf", TASKS["fox"][0]])
    assert "adapter" in capsys.readouterr().out
    assert (place / "shelf" / "text.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("base/config.json", ("inspect", "base")),
        ("adapter/adapter_config.json", ("check", "adapter")),
        ("recipe.toml", ("transfer", "--recipe", "recipe.toml")),
        ("shelf/shelf.json", ("shelf", "list", "shelf")),
    ],
)
def test_a_small_file_of_a_terabyte_is_refused(place, capsys, name, command):
    huge(place / name)
    error = refused(capsys, *command)
    assert "1099512 MB, and at most 134 MB of such a file" in error
    assert Path(name).name in error


def test_a_link_to_a_regular_file_is_followed(place, capsys):
    config = place / "adapter" / "adapter_config.json"
    config.rename(place / "elsewhere.json")
    config.symlink_to(place / "elsewhere.json")
    main(["inspect", "adapter"])
    assert "LoRA" in capsys.readouterr().out
    assert json.loads(config.read_text())["peft_type"] == "LORA"
