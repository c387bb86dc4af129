"""Tools that are given what they cannot use say so in a line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sparse_base.py", "."], ". or its adapter exists already"),
        (["sparse_base.py", "new", "--heads", "33"], "33 heads and 32 key heads do not divide a width of 4096"),
        (["bench_decoder.py", "none", "--rows", "0"], "bench_decoder: --tokens, --rows, --texts and --repeats"),
        (["bench_decoder.py", "none"], "bench_decoder: none"),
        (["bench_batch.py", "--jobs", "50", "10"], "--pairs must be at least 1, and no more than any number of --jobs"),
        (["measure_memory.py", "none", "none", "none"], "measure_memory: the transfer failed with 2"),
        (["measure_memory.py", "none", "none", "none", "--colour", "red"], "colour"),
    ],
)
def test_what_a_tool_cannot_use_is_named(given, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOLS / given[0]), run_name="__main__")
    assert left.value.code
    said = f"{capfd.readouterr().err}{left.value.code}"
    assert message in said
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir())


def test_a_reader_that_does_not_exist_is_named(tmp_path):
    # In a process of its own: what it does next is to hear all that a process does, for good, and to limit its memory.
    command = [sys.executable, str(TOOLS / "fuzz_readers.py"), "--only", "PDF"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode
    assert "--only 'PDF' is no reader; the readers are " in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
