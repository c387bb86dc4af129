"""Lines of results: those in the repository can be read, and the page is made of them."""

import dataclasses
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import leaderboard
import page_figures
from result_lines import FOLDER, STATED, Figure, ResultLine, Stated, StatedLine, append, read_lines, versions

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


# The tables of README.md and docs/results.md

PAGE = """# Results

## Words

| on the target | nats | lift | note |
|---|---|---|---|
| `distill` | 0.500 | **0.82** [0.72, 0.94], sd 0.02: 0.80, 0.84 | 31% of 200, with 7 seeds |
"""
JOBS = """## Whole jobs

| SNIPS | nats a character | lift | right | chrF | ended |
|---|---|---|---|---|---|
| Gemma | 0.500 [0.400, 0.600] | | 0.50 | | |
| `distill`, 200 prompts | 0.70 | **0.50** [0.40, 0.60] | 0.80 [0.70, 0.90] | | |
"""


def stated(**changes):
    lift = Stated(0.82, 0.72, 0.94, 0.02, [Stated(0.8), Stated(0.84)])
    figures = {"nll_per_char": Stated(0.5), "lift": lift, "exact": Stated(0.31)}
    where = {"section": "Words", "rows": ["`distill`"], "source": "A", "target": "B", "task": "words", "split": "test"}
    more = {"examples": 200, "seeds": [0, 1], "part": "moved", "method": "distill", "prompts": 0, "figures": figures}
    return StatedLine(**where | more | {"note": None, "versions": None, "commit": None} | changes)


def test_a_row_has_the_figures_of_the_lines_that_name_it():
    assert page_figures.unknown(PAGE, [], [stated()]) == []
    assert page_figures.unused([PAGE], [stated()]) == []
    assert page_figures.unused([PAGE], [stated(rows=["`distill`", "gone"])]) == ["Words, gone"]


@pytest.mark.parametrize("old", ["0.500", "0.82", "0.72", "sd 0.02", "0.84", "31%"])
def test_a_figure_that_no_line_has_is_named(old):
    new = old.replace(old[-1] if old[-1] != "%" else "1%", "9" if old[-1] != "%" else "9%")
    (fault,) = page_figures.unknown(PAGE.replace(old, new), [], [stated()])
    assert fault == f"Words, `distill`: no line has {new.removeprefix('sd ')}"


def test_a_row_that_no_line_names_is_named():
    for changes in ({"section": "Other"}, {"rows": ["`random`"]}):
        (fault,) = page_figures.unknown(PAGE, [], [stated(**changes)])
        assert fault.startswith("Words, `distill`: no line has 0.500, 0.82")


def test_a_figure_once_in_the_lines_is_once_in_the_row():
    (fault,) = page_figures.unknown(PAGE.replace("0.72", "0.82"), [], [stated()])
    assert fault.endswith("no line has 0.82")


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ("0.500 [0.400", "0.501 [0.400", "0.501, 0.400, 0.600"),
        ("**0.50** [0.40, 0.60]", "**0.50** [0.40, 0.61]", "0.50, 0.40, 0.61"),
        ("0.80 [0.70", "0.90 [0.80", "0.90, 0.80, 0.90"),
        ("`distill`, 200", "`distill`, 100", "0.70, 0.50, 0.40, 0.60, 0.80, 0.70, 0.90"),
    ],
)
def test_the_rows_of_jobs_are_those_of_whole_lines(old, new, missing):
    lines = [line(task="snips", source="Smollm2 A", **more) for more in ({}, {"method": "random"})]
    assert page_figures.unknown(JOBS, [line(task="snips", source="Gemma B")], []) != []
    assert page_figures.unknown(JOBS, lines, []) == []
    (fault,) = page_figures.unknown(JOBS.replace(old, new), lines, [])
    assert fault.endswith(f"no line has {missing}")


def test_a_row_that_names_a_seed_is_of_its_lines():
    lines = [line(task="snips", source="Smollm2 A", seed=seed) for seed in (0, 1)]
    page = JOBS.replace("`distill`, 200 prompts", "`distill`, 200 prompts, seed 1")
    assert page != JOBS
    assert page_figures.unknown(page, lines, []) == []
    (fault,) = page_figures.unknown(page, lines[:1], [])
    assert "`distill`, 200 prompts, seed 1: no line has" in fault
    assert page_figures.unknown(JOBS, lines[1:], []) != []


def test_the_pages_state_no_figure_that_no_line_has():
    lines = [one for path in sorted(FOLDER.glob("*.jsonl")) for one in read_lines(path)]
    known = [one for path in sorted(STATED.glob("*.jsonl")) for one in read_lines(path, StatedLine)]
    texts = [page.read_text(encoding="utf-8") for page in page_figures.PAGES]
    assert all(list(page_figures.rows_of(text)) for text in texts)
    assert [fault for text in texts for fault in page_figures.unknown(text, lines, known)] == []
    assert page_figures.unused(texts, known) == []
