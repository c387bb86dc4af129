"""The examples run: each script on tiny models, as a user would start it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from probe_bases import CORPUS, write_move
from test_transfer import WIDER
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A source base, a wider target, a twin of the source, and a folder of two adapters."""
    folder = tmp_path_factory.mktemp("examples")
    write_llama(folder / "source", seed=0)
    write_llama(folder / "wide", seed=1, first_token=20, **WIDER)
    write_llama(folder / "twin", seed=3)
    base = jcl.open_base(folder / "source")
    for number in range(2):
        jcl.save_adapter(random_adapter(base, seed=number), folder / "adapters" / f"a{number}", base_name="org/source")
    return folder


def run_example(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.full
def test_move_one_adapter_fits_an_update_between_unrelated_bases(tmp_path, monkeypatch, capsys):
    places = write_move(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(f"{line} {number}" for number in range(8) for line in CORPUS))
    flags = ("--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--completions", 48)
    run_example("move_one_adapter.py", monkeypatch, *places, *flags)
    printed = capsys.readouterr().out
    assert "of the source's" in printed
    assert "written by the source with its adapter" in printed
    assert jcl.load_adapter(tmp_path / "out").modules


def test_move_a_folder_runs_a_plan_and_does_nothing_twice(files, tmp_path, monkeypatch, capsys):
    arguments = (files / "adapters", files / "source", files / "wide", files / "twin")
    settings = ("--out", tmp_path / "out", "--method", "pad-truncate")
    for status in ("done", "kept"):
        run_example("move_a_folder.py", monkeypatch, *arguments, *settings)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(status)]
        assert len(lines) == 4
    assert len(list((tmp_path / "out" / "adapters").glob("a*"))) == 4


@pytest.mark.full
def test_write_a_method_is_used_from_python_and_by_the_command(files, tmp_path, monkeypatch, capsys):
    places = (files / "adapters" / "a0", files / "source", files / "twin")
    run_example("write_a_method.py", monkeypatch, *places)
    assert capsys.readouterr().out.count("kept ") == 2
    command = [sys.executable, "-m", "jcrosslora", "transfer", str(places[0]), "--source", str(places[1])]
    command += ["--target", str(places[2]), "--out", str(tmp_path / "out"), "--method", "write_a_method:OutputSubspace"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(jcl.__file__).parent.parent), *sys.path])}
    done = subprocess.run(
        [*command, "--svd-rank", "9", "--strength", "0.5"],
        check=False,
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "out" / "transfer_report.json").read_text())["recipe"]
    assert recipe["method"] == "write_a_method:OutputSubspace"
    assert recipe["settings"] == {"svd_rank": 9, "strength": 0.5}
