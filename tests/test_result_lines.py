"""Lines of results: those in the repository can be read, and the page is made of them."""

import dataclasses
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import leaderboard
from result_lines import FOLDER, Figure, ResultLine, append, read_lines, versions

import jcrosslora as jcl
from jcrosslora.evaluate import Interval


def line(**changes):
    figures = {
        name: Figure(*(Interval(value, value - 0.1, value + 0.1) for value in (0.5, 0.9, moved, lift)))
        for name, moved, lift in (("nll_per_char", 0.7, 0.5), ("exact", 0.8, 0.75))
    }
    own = {"source": "A", "target": "B", "task": "intents", "split": "test", "examples": 10, "seed": 0}
    more = {"training_steps": 5, "method": "distill", "prompts": 200, "figures": figures}
    return ResultLine(**own | more | {"versions": dict(versions()), "commit": "abc"} | changes)


def test_lines_are_read_as_they_were_written(tmp_path):
    lines = [line(), line(seed=1, method="random")]
    append(tmp_path / "lines.jsonl", lines[:1])
    append(tmp_path / "lines.jsonl", lines[1:])
    assert read_lines(tmp_path / "lines.jsonl") == lines


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"task": 1}'])
def test_what_is_no_line_is_named(tmp_path, text):
    append(tmp_path / "lines.jsonl", [line()])
    with (tmp_path / "lines.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
    with pytest.raises(jcl.UsageError, match=r"lines\.jsonl, line 2: is not a result"):
        read_lines(tmp_path / "lines.jsonl")


def test_unknown_fields_are_refused(tmp_path):
    entry = msgspec.to_builtins(line()) | {"machine": "mine"}
    (tmp_path / "lines.jsonl").write_bytes(msgspec.json.encode(entry))
    with pytest.raises(jcl.UsageError, match="machine"):
        read_lines(tmp_path / "lines.jsonl")


def test_the_best_stands_first_in_each_task():
    low = line(method="low")
    for figure in low.figures.values():
        figure.lift = dataclasses.replace(figure.lift, value=0.1)
    rows = leaderboard.page([low, line(task="words"), line()]).splitlines()[-3:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["intents", "intents", "words"]
    assert ["`low`" in row for row in rows] == [False, True, False]
    assert "0.50 [0.40, 0.60] | exact | 0.5 | 0.8 | 0.9 |" in rows[0]


def test_the_job_is_the_first_figure_that_training_brings():
    chosen = line()
    chosen.figures["chrf"] = chosen.figures["exact"]
    chosen.figures["exact"] = Figure(*(Interval(0.0, 0.0, 0.0),) * 3, None)
    assert "| chrf |" in leaderboard.page([chosen])


def test_only_test_examples_stand_on_the_page():
    with pytest.raises(jcl.UsageError, match="test examples alone"):
        leaderboard.page([line(split="train")])


def test_the_page_is_that_of_the_lines_in_the_repository():
    lines = [one for path in sorted(FOLDER.glob("*.jsonl")) for one in read_lines(path)]
    assert lines
    assert leaderboard.PAGE.read_text(encoding="utf-8") == leaderboard.page(lines)
