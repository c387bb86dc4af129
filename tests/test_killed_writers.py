"""Commands that are killed while they write, and given again: nothing hidden stays, and the result is right."""

import os
import signal
import subprocess
import sys

import pytest
from command_line import main
from full_set import full_except
from probe_bases import chat_base
from safetensors.numpy import load_file
from shelf_adapters import write_adapter

import jcrosslora as jcl
from jcrosslora.utils.files import atomic_folder

KILLED = """
import os, sys
from pathlib import Path
name, wanted, *arguments = sys.argv[1:]
real = getattr(Path, name)
def killed(path, *rest, **more):
    if wanted in str(path):
        os.kill(os.getpid(), 9)
    return real(path, *rest, **more)
setattr(Path, name, killed)
from jcrosslora.cli.main import main
main(arguments)
"""


def kill(call: str, wanted: str, *arguments: object) -> None:
    """Run a command in a process that is killed where it calls a method of a path that contains `wanted`."""
    command = [sys.executable, "-c", KILLED, call, wanted, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "base")


# Within the file of the weights, before its folder is put in place, and between the two renames of a replacement.
@pytest.mark.parametrize(
    ("call", "wanted"),
    full_except(
        [("write_bytes", "adapter_model"), ("rename", "out"), ("rename", ".tmp/new")], [("rename", ".tmp/new")]
    ),
)
def test_an_export_that_was_killed_leaves_nothing_when_it_is_given_again(base, tmp_path, call, wanted):
    first, second = write_adapter(tmp_path / "first", base), write_adapter(tmp_path / "second", base, seed=1)
    folder = tmp_path / "outputs"
    main(["export", str(first), "--out", str(folder / "out")])
    command = ["export", str(second), "--out", str(folder / "out"), "--overwrite"]
    kill(call, wanted, *command)
    assert any(name.startswith(".") for name in os.listdir(folder))
    main(command)
    assert os.listdir(folder) == ["out"]
    found, wanted_tensors = (load_file(at / "adapter_model.safetensors") for at in (folder / "out", second))
    assert all((found[name] == wanted_tensors[name]).all() for name in found.keys() | wanted_tensors.keys())


def test_the_output_that_a_killed_export_had_moved_aside_is_not_replaced_unasked(base, tmp_path, capsys):
    adapter, out = write_adapter(tmp_path / "adapter", base), tmp_path / "outputs" / "out"
    main(["export", str(adapter), "--out", str(out)])
    kill("rename", ".tmp/new", "export", adapter, "--out", out, "--overwrite")
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--out", str(out)])
    assert "exists already" in capsys.readouterr().err
    assert jcl.load_adapter(out).modules
    assert os.listdir(out.parent) == ["out"]


def test_an_addition_to_a_shelf_that_was_killed_leaves_nothing_when_it_is_given_again(base, tmp_path):
    command = ["shelf", "add", str(tmp_path / "shelf"), str(write_adapter(tmp_path / "one", base)), "--base"]
    command += [str(base.path), "--encoder", "none"]
    kill("replace", "shelf.json", *command)
    kill("replace", "000001.json", *command)
    main(command)
    assert sorted(os.listdir(tmp_path / "shelf")) == ["segments", "shelf.json", "text.safetensors"]
    assert [name for name in os.listdir(tmp_path / "shelf" / "segments") if name.startswith(".")] == []
    assert jcl.Shelf(tmp_path / "shelf").names == ("one",)


def test_what_a_live_process_writes_to_is_left_alone(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    writer = "from jcrosslora.utils.files import atomic_folder\nwith atomic_folder({!r}):\n print(flush=True), input()"
    command = [sys.executable, "-c", writer.format(str(tmp_path / "out"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as live:
        assert live.stdout is not None
        live.stdout.readline()
        main(["export", str(adapter), "--out", str(tmp_path / "out")])
        hidden = [name for name in os.listdir(tmp_path) if name.startswith(".")]
        live.kill()
    assert len(hidden) == 1
    with atomic_folder(tmp_path / "out", overwrite=True):
        assert hidden[0] not in os.listdir(tmp_path)
