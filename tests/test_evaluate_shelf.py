"""`jcrosslora evaluate --shelf`: what a shelf keeps of each adapter's gain, beside the base and the adapter alone."""

import json

import numpy as np
import pytest
from command_line import main
from probe_bases import QUESTIONS, chat_base
from shelf_adapters import TASKS, write_adapter, write_tasks

import jcrosslora as jcl
from jcrosslora.errors import UsageError
from jcrosslora.shelf import ALONE, judge
from jcrosslora.text import Completion

FOX = [*TASKS["fox"][3:6], "Peter and Anna"]  # the last is of no adapter's task


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    base = chat_base(folder / "base")
    jcl.Shelf(folder / "shelf", base).add(write_tasks(folder / "out", base))
    entries = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Anna"}]} for text in FOX
    ]
    (folder / "fox.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shelf(files):
    return jcl.Shelf(files / "shelf")


def test_each_example_is_answered_by_the_adapter_of_its_task(files, shelf):
    examples = [Completion(text, " Anna") for text in FOX]
    found = judge(shelf, examples, "select", ["fox"], max_new_tokens=6)
    assert found.figures.names[1:] == ("shelf (select)", "fox")
    assert found.chosen == {"fox": 3, ALONE: 1}
    base, ours, own = found.figures.nll
    np.testing.assert_allclose(ours, [*own[:3], base[3]], rtol=1e-4)
    assert np.abs(base - own).min() > 0.01
    alone, written, single = ([one.text for one in row] for row in found.figures.written)
    assert written == [*single[:3], alone[3]]
    assert alone != single
    gains = np.mean(base - ours) / np.mean(base - own)
    assert found.kept["fox"] is None or abs(found.kept["fox"].value - gains) < 1e-4


def test_choices_are_scored_as_with_the_adapter_alone(files, tmp_path):
    base = jcl.open_base(files / "base")
    shelf = jcl.Shelf(tmp_path / "shelf", base, encoder="none")
    shelf.add(write_adapter(tmp_path / "own", base, texts=[one.prompt for one in QUESTIONS] + TASKS["boil"]))
    found = judge(shelf, QUESTIONS, "mixture", ["own"])
    assert found.chosen == {"own": len(QUESTIONS)}
    base_row, ours, own = found.figures.log_probs
    np.testing.assert_allclose(ours, own, rtol=1e-4)
    assert np.nanmax(np.abs(base_row - own)) > 0.01


def test_the_command_prints_the_figures_and_what_is_kept(files, capsys):
    flags = ["--shelf", str(files / "shelf"), "--data", str(files / "fox.jsonl"), "--max-new-tokens", "4"]
    main(["evaluate", *flags, "--adapter", "fox", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["models"]][1:] == ["shelf (mixture)", "fox"]
    assert found["shelf"]["chosen"] == {"fox": 3, "the base alone": 1}
    assert set(found["shelf"]["kept"]) == {"fox"}
    main(["evaluate", *flags, "--limit", "2"])
    printed = capsys.readouterr().out
    assert "shelf (mixture)" in printed
    assert printed.endswith("used by the shelf: fox 2\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top", "2"], "give it with --shelf"),
        ([], "no base was given"),
        (["--shelf", "SHELF", "--compose", "ties"], "composition 'ties' is not here"),
        (["--shelf", "SHELF", "--template", "a.jinja"], "give the shelf's base with --base"),
        (["--shelf", "SHELF", "--adapter", "foxes"], "foxes"),
        (["--shelf", "SHELF", "--top", "0"], "expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(files, capsys, flags, message):
    given = [str(files / "shelf") if flag == "SHELF" else flag for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--data", str(files / "fox.jsonl"), *given])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_an_empty_task_is_refused(shelf):
    with pytest.raises(UsageError, match="no prompt was given"):
        judge(shelf, [])
