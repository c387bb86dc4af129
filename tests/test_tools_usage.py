"""Tools that are given what they cannot use say so in a line."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fuzz_readers.py", "--only", "PDF"], "--only 'PDF' is no reader; the readers are "),
        (["sparse_base.py", "."], ". or its adapter exists already"),
        (["sparse_base.py", "new", "--heads", "33"], "33 heads and 32 key heads do not divide a width of 4096"),
        (["bench_decoder.py", "none", "--rows", "0"], "bench_decoder: --tokens, --rows, --texts and --repeats"),
        (["bench_decoder.py", "none"], "bench_decoder: none"),
        (["measure_memory.py", "none", "none", "none"], "measure_memory: the transfer failed with 2"),
        (["measure_memory.py", "none", "none", "none", "--colour", "red"], "colour"),
    ],
)
def test_what_a_tool_cannot_use_is_named(given, message, tmp_path):
    command = [sys.executable, str(TOOLS / given[0]), *given[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
