"""The line that shows progress: its words, how often it comes, and that nothing stays on a terminal."""

import io
import time

import pytest

from jcrosslora.utils.progress import Display


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def display(clock):
    return Display(clock, tick=None)


def test_a_log_line_comes_every_30_seconds_at_most(display, clock, capsys):
    with display.track(288, "write texts", "texts") as shown:
        for _ in range(10):
            clock.now += 10
            shown.update(12)
    assert capsys.readouterr().err == (
        "jcrosslora: write texts, 36 of 288 texts, about 4 min left\n"
        "jcrosslora: write texts, 72 of 288 texts, about 3 min left\n"
        "jcrosslora: write texts, 108 of 288 texts, about 2 min left\n"
    )


def test_short_work_writes_no_log_line(display, clock, capsys):
    with display.track(2, "effect", "passes") as shown:
        clock.now += 29
        shown.update()
    assert capsys.readouterr().err == ""


def test_the_time_taken_is_shown_until_the_time_left_is_known(display, clock):
    with display.track(3, "jobs", "jobs"):
        clock.now += 42
        assert display.line(clock.now) == "jobs, 0 of 3 jobs, 42 s so far"


def test_steps_inside_a_step_know_better_what_is_left_of_it(display, clock):
    with display.steps({"move": 120, "compare": 60}) as plan:
        plan.begin("move")
        with display.steps({"write completions": 200, "fit": 100}) as inner:
            assert display.line(clock.now).endswith("begin, about 3 min left")  # as long as they usually take
            inner.begin("write completions")
            with display.track(100, "write completions", "texts") as shown:
                clock.now += 120
                shown.update(40)
                # 180 s for the other 60 texts, and at this pace 150 s for the fit; the move takes 3.75 times as long as
                # usual, and what comes behind it probably does so too.
                line = "step 1 of 2: move, step 1 of 2: write completions, 40 of 100 texts, about 9 min left"
                assert display.line(clock.now) == line
        with display.steps({"write completions": None}) as inner:
            inner.begin("write completions")
            assert display.line(clock.now).endswith("write completions, about 60 s left")


def test_steps_are_numbered_and_scaled_by_the_pace_of_those_before(display, clock):
    with display.steps({"align": 20, "write completions": 100, "fit": 60}) as plan:
        plan.begin("align")
        assert display.line(clock.now) == "step 1 of 3: align, about 3 min left"
        clock.now += 10  # half of what it usually takes
        plan.begin("write completions")
        assert display.line(clock.now) == "step 2 of 3: write completions, about 80 s left"
        with display.track(300, "write completions") as shown:
            clock.now += 40
            shown.update(150)
            assert display.line(clock.now) == "step 2 of 3: write completions, 150 of 300, about 2 min left"


def test_a_step_of_unknown_time_shows_the_time_taken(display, clock):
    with display.steps({"align": None, "fit": None}) as plan:
        plan.begin("fit")
        clock.now += 100
        assert display.line(clock.now) == "step 2 of 2: fit, 2 min so far"


def test_what_runs_inside_something_else_stands_on_the_same_line(display, clock):
    with display.track(4, "jobs", "jobs", done=1), display.steps({"align": 20}) as plan:
        plan.begin("align")
        with display.track(2, "train", "steps") as shown:
            shown.note = "loss 1.250"
            line = display.line(clock.now)
    assert line == "jobs, 1 of 4 jobs, step 1 of 1: align, train, 0 of 2 steps, loss 1.250, 0 s so far"


def test_bytes_are_shown_in_megabytes_and_hours_in_hours(display, clock):
    with display.track(8_000_000_000, "merge", "B") as shown:
        clock.now += 600
        shown.update(400_000_000)
        assert display.line(clock.now) == "merge, 400 of 8,000 MB, about 3 h 10 min left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_that_is_cleared_in_the_end(clock, monkeypatch):
    terminal = Terminal()
    display = Display(clock, tick=None, stream=terminal)
    monkeypatch.setenv("COLUMNS", "30")
    for _ in display.each(["a", "b"], "activations", "batches"):
        clock.now += 5
    written = terminal.getvalue()
    assert "\n" not in written
    assert written.split("\r\x1b[K") == [
        "",
        "activations, 0 of 2 batches, ",
        "activations, 1 of 2 batches, ",
        "activations, 2 of 2 batches, ",
        "",
    ]


def test_nothing_is_shown_where_it_is_not_asked_for(display, clock, capsys):
    display.on = False
    with display.track(3, "x") as shown, display.steps({"a": 1}) as plan:
        clock.now += 100
        plan.begin("a")
        shown.update()
    assert shown.done == 1
    assert capsys.readouterr().err == ""


def test_work_that_reports_nothing_is_still_shown(capsys):
    with Display(tick=0.01, log_every=0.05).track(1, "compile"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert set(lines) == {"jcrosslora: compile, 0 of 1, 0 s so far"}


def test_an_error_takes_its_work_off_the_display(display, clock):
    with pytest.raises(RuntimeError), display.track(1, "first"):
        raise RuntimeError
    with display.track(1, "second"):
        assert display.line(clock.now).startswith("second")


def test_a_step_begins_when_work_of_its_name_reports_itself(display, clock):
    with display.steps({"align": 20, "write completions": 100, "measure the effect": 10}):
        with display.track(300, "write completions", "texts"):
            assert display.line(clock.now) == "step 2 of 3: write completions, 0 of 300 texts, about 2 min left"
            clock.now += 100
        display.begin("measure the effect")
        display.begin("align")  # is over
        with display.track(12, "write", "texts"):
            assert display.line(clock.now) == "step 3 of 3: measure the effect, write, 0 of 12 texts, about 10 s left"


def test_a_line_in_front_of_every_step_gives_the_time_left_at_the_pace_of_those_before(display, clock):
    lines = []
    with display.steps({"fetch": 30, "move": 60, "score": 120}, unpaced=["fetch"], announce=lines.append) as plan:
        for name, seconds in (("fetch", 300), ("move", 120), ("score", 0)):
            plan.begin(name)
            clock.now += seconds
    assert lines == [
        "step 1 of 3: fetch (about 4 min left in all)",
        "step 2 of 3: move (about 3 min left in all)",  # a download tells nothing of the machine
        "step 3 of 3: score (about 4 min left in all)",  # the second step took twice its time
    ]


def test_a_step_of_unknown_time_is_announced_without_it(display):
    lines = []
    with display.steps({"align": None}, announce=lines.append) as plan:
        plan.begin("align")
    assert lines == ["step 1 of 1: align"]


def test_steps_inside_an_announced_step_have_the_line_to_themselves(display, clock):
    with display.steps({"move": 90}, announce=lambda _: None) as outer:
        outer.begin("move")
        with display.steps({"align": 20, "fit": 60}), display.track(3, "fit"):
            assert display.line(clock.now) == "step 1 of 1, step 2 of 2: fit, 0 of 3, about 60 s left"


def test_work_that_is_not_needed_is_passed_over_and_has_no_pace(display, clock):
    with display.track(100, "write", "texts") as shown:
        clock.now += 20
        shown.update(20)
        shown.skip_to(60)
        assert display.line(clock.now) == "write, 60 of 100 texts, about 40 s left"
        clock.now += 40
        shown.update(41)
        shown.skip_to(97)
        assert display.line(clock.now) == "write, 100 of 100 texts, 60 s so far"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "about 10 s"), (41, "about 50 s"), (79, "about 80 s"), (90, "about 2 min")]
)
def test_times_to_wait_are_round(display, seconds, words):
    with display.steps({"align": seconds}) as plan:
        plan.begin("align")
        assert display.line(display.clock()) == f"step 1 of 1: align, {words} left"


def test_a_line_for_the_user_is_not_written_behind_the_progress_line(clock):
    terminal = Terminal()
    display = Display(clock, tick=None, stream=terminal)
    with display.steps({"align": 1}, announce=lambda line: print(line, file=terminal)) as plan:
        plan.begin("align")
    clear = "\r\x1b[K"
    assert terminal.getvalue() == f"{clear}begin, 0 s so far{clear}step 1 of 1: align (about 10 s left in all)\n{clear}"


@pytest.mark.parametrize(("took", "left"), [(50, "about 50 s"), (1, "about 30 s"), (10_000, "about 7 min")])
def test_an_earlier_step_scales_the_later_ones_by_a_factor_of_four_at_most(display, clock, took, left):
    with display.steps({"align": 100, "fit": 100}) as plan:
        plan.begin("align")
        clock.now += took
        plan.begin("fit")
        assert display.line(clock.now) == f"step 2 of 2: fit, {left} left"
