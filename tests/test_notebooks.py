"""The notebooks of `examples/`, which `.ci/run` executes, are clean and open on Colab."""

import json
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CI = (EXAMPLES.parent / ".ci" / "run").read_text()


def cells(path, kind):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_holds_no_output(self, path):
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]

    def test_its_badge_opens_it_on_colab(self, path):
        address = "https://colab.research.google.com/github/jcrosslora/jcrosslora/blob/main/examples"
        assert f"]({address}/{path.name})" in cells(path, "markdown")[0]

    def test_its_first_cell_installs_the_package_for_a_gpu(self, path):
        first = cells(path, "code")[0]
        assert re.search(r'ACCELERATOR = "cuda12"  # .*"tpu"', first)
        assert "git+https://github.com/jcrosslora/jcrosslora" in first

    def test_it_is_listed_and_run_in_a_short_form(self, path):
        assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()
        assert path.stem in CI
        assert any("JCROSSLORA_SHORT" in code for code in cells(path, "code"))


def test_the_three_usual_cases_are_there():
    assert {path.stem for path in NOTEBOOKS} == {"newer_version", "quantised_target", "train_move_compare"}
