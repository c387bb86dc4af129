"""Task files that cannot be read as questions are refused with file and line; figures, intervals and the table."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from jcrosslora.errors import UsageError
from jcrosslora.evaluate import (
    FIGURES,
    Interval,
    Question,
    Scores,
    intervals,
    lift_recovered,
    print_scores,
    read_task,
    word_of,
)

GOOD = {"question": "Which?", "choices": ["a", "bc"], "answer": 1}


def test_a_task_is_read_line_by_line(tmp_path):
    path = tmp_path / "task.jsonl"
    other = {"answer": 0, "choices": ["é"], "question": "日本?", "id": 7}
    path.write_text(f"{json.dumps(GOOD)}\r\n\n{json.dumps(other, ensure_ascii=False)}", encoding="utf-8")
    assert read_task(path) == [Question("Which?", ("a", "bc"), 1), Question("日本?", ("é",), 0)]
    assert read_task(str(path))[0].prompt == "Question: Which?\nAnswer:"
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert len(read_task(path)) == 2


@pytest.mark.parametrize(
    ("line", "came"),
    [
        (b"{", "is not UTF-8 JSON"),
        (b'{"question": "\xff"}', "is not UTF-8 JSON"),
        (b"[" * 100_000, "is not UTF-8 JSON"),
        (b"[1]", "is of type list"),
        (b"null", "is of type NoneType"),
        (b'{"choices": ["a"], "answer": 0}', "has no 'question'"),
        (b'{"question": "q", "answer": 0}', "has no 'choices'"),
        (b'{"question": "q", "choices": ["a"]}', "has no 'answer'"),
        (json.dumps(GOOD | {"question": 3}).encode(), "has the question 3"),
        (json.dumps(GOOD | {"question": " "}).encode(), "has the question ' '"),
        (b'{"question": "\\ud800", "choices": ["a"], "answer": 0}', "has the question '\\ud800'"),
        (json.dumps(GOOD | {"choices": []}).encode(), "has the choices []"),
        (json.dumps(GOOD | {"choices": "ab"}).encode(), "has the choices 'ab'"),
        (json.dumps(GOOD | {"choices": ["a", None]}).encode(), "has the choices ['a', None]"),
        (json.dumps(GOOD | {"choices": ["a", ""]}).encode(), "has the choices ['a', '']"),
        (json.dumps(GOOD | {"answer": 2}).encode(), "has the answer 2 for 2 choices"),
        (json.dumps(GOOD | {"answer": -1}).encode(), "has the answer -1 for 2 choices"),
        (json.dumps(GOOD | {"answer": True}).encode(), "has the answer True"),
        (json.dumps(GOOD | {"answer": "B"}).encode(), "has the answer 'B'"),
        (json.dumps(GOOD | {"answer": 1.0}).encode(), "has the answer 1.0"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, came):
    path = tmp_path / "task.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UsageError) as caught:
        read_task(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: {came}")
    assert "expected {" in message
    assert "\n" not in message


def test_files_without_questions_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_task(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UsageError, match="holds no question"):
        read_task(tmp_path / "empty.jsonl")


def scores(log_probs, names=("base", "one")):
    questions = [Question("q", ("aaaa", "b"), 0), Question("q", ("a", "bb", "cccc"), 2)]
    return Scores.of(names, questions, np.array(log_probs), np.array([[2, 1, 0], [1, 1, 2]]))


def test_figures_equal_those_computed_by_hand():
    nan = math.nan
    found = scores([[[-4.0, -2.0, nan], [-1.0, -1.5, -2.0]], [[-1.0, -2.0, nan], [-3.0, -2.0, -1.0]]])
    assert found.characters.tolist() == [[4, 1, 0], [1, 2, 4]]
    assert found.answers.tolist() == [0, 2]
    assert found.by_question("accuracy").tolist() == [[0, 0], [1, 1]]
    assert found.by_question("accuracy_norm").tolist() == [[1, 1], [1, 1]]
    assert found.by_question("nll_per_char").tolist() == [[1.0, 0.5], [0.25, 0.25]]
    assert found.accuracy().tolist() == [0, 1]
    assert found.accuracy_norm().tolist() == [1, 1]
    assert found.nll_per_char().tolist() == [0.75, 0.25]
    # 4 + 2 nats, then 1 + 1, over 4 + 4 characters.
    assert found.nll_pooled().tolist() == [0.75, 0.25]
    with pytest.raises(UsageError, match="perplexity"):
        found.by_question("perplexity")


def test_pooled_nats_weigh_answers_by_their_length():
    questions = [Question("q", ("a", "bbb"), 1), Question("q", ("a", "bb"), 0)]
    found = Scores.of(("base",), questions, np.array([[[-1.0, -6.0], [-1.0, -5.0]]]), np.ones((2, 2), int))
    assert found.nll_per_char().tolist() == [(2 + 1) / 2]
    assert found.nll_pooled().tolist() == [(6 + 1) / (3 + 1)]


def test_a_pooled_figure_that_is_the_same_for_all_answers_has_no_spread():
    lengths = np.arange(5, 305, 5)
    log_probs = np.full((2, 60, 2), -1.0)
    log_probs[:, :, 0] = np.array([[-0.5], [-0.4]]) * lengths
    questions = [Question("q", ("x" * int(length), "y"), 0) for length in lengths]
    found = Scores.of(["base", "adapter"], questions, log_probs, np.ones((60, 2), int))
    for interval, wanted in zip(found.bootstrap("nll_pooled"), (0.5, 0.4), strict=True):
        np.testing.assert_allclose([interval.value, interval.low, interval.high], wanted)
    (_, change) = found.differences("nll_pooled")
    np.testing.assert_allclose([change.value, change.low, change.high], -0.1)


def test_the_interval_of_a_share_is_binomial():
    # The resampled mean of n zeros and ones is exactly binomial(n, p) / n.
    values = np.zeros((1, 400))
    values[0, :120] = 1
    (found,) = intervals(values, draws=20_000)
    deviation = math.sqrt(0.3 * 0.7 / 400)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - 1.96 * deviation, abs=0.003)
    assert found.high == pytest.approx(0.3 + 1.96 * deviation, abs=0.003)


def test_the_interval_of_a_mean_is_normal_and_follows_the_seed():
    values = np.random.default_rng(3).normal(5.0, 2.0, (2, 500))
    found = intervals(values, draws=20_000)
    for row, each in zip(values, found, strict=True):
        half = 1.96 * row.std() / math.sqrt(500)
        assert each.value == pytest.approx(row.mean())
        assert each.high - each.value == pytest.approx(half, rel=0.06)
        assert each.value - each.low == pytest.approx(half, rel=0.06)
    assert intervals(values, draws=500) == intervals(values, draws=500)
    assert intervals(values, draws=500) != intervals(values, draws=500, seed=1)


def test_differences_are_paired():
    # The same noise in both models: the difference is known far better than either.
    noise = np.random.default_rng(0).normal(0, 5, 200)
    log_probs = np.stack([noise - 1.0, noise - 1.0 + 0.5])[:, :, None]
    questions = [Question("q", ("a",), 0)] * 200
    found = Scores.of(("base", "one"), questions, log_probs, np.ones((200, 1), int))
    own, other = found.bootstrap("nll_per_char", draws=1000)
    same, difference = found.differences("nll_per_char", draws=1000)
    assert own.high - own.low > 1
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert difference.high - difference.low < 1e-9
    assert difference.value == pytest.approx(-0.5)
    assert other.value - own.value == pytest.approx(-0.5)


@pytest.mark.parametrize(("values", "draws"), [(np.zeros((1, 0)), 9), (np.zeros(3), 9), (np.zeros((1, 3)), 0)])
def test_a_bootstrap_of_nothing_is_refused(values, draws):
    with pytest.raises(UsageError, match="expected finite values"):
        intervals(values, draws=draws)


def test_lift_of_exact_shares():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.4, 0.6, 300)
    gain = rng.uniform(0.05, 0.15, 300)
    found = lift_recovered(base, base - 0.4 * gain, base - gain)
    # Every resample gives the same share.
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.4, 0.4))
    noisy = lift_recovered(base, base - 0.4 * gain + rng.normal(0, 0.05, 300), base - gain)
    assert noisy.low < 0.4 < noisy.high
    # The share's deviation: that of the noise's mean over the mean gain.
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * 0.05 / math.sqrt(300) / gain.mean(), rel=0.15)


def test_lift_without_a_gain_is_refused():
    rng = np.random.default_rng(2)
    base = rng.normal(0.5, 0.1, 100)
    with pytest.raises(UsageError, match="an interval above 0"):
        lift_recovered(base, base - 0.1, base + rng.normal(0, 0.1, 100))
    with pytest.raises(UsageError, match="an interval above 0"):  # a loss, which has no share either
        lift_recovered(base, base + 0.1, base + 0.2)
    with pytest.raises(UsageError, match="the same questions"):
        lift_recovered(base, base[:50], base)


def test_resamples_without_any_gain_have_no_share():
    base, trained = np.ones(10), np.r_[np.zeros(4), np.ones(6)]  # right answers count as 0; in 0.6% of draws none is
    found = lift_recovered(base, trained, trained)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_the_lift_of_scores_is_that_of_their_figures():
    log_probs = [[[nll, -9.0, -9.0], [-9.0, -9.0, nll]] for nll in (-4.0, -2.5, -1.0)]
    found = scores(log_probs, names=("base", "moved", "trained"))
    for figure in ("nll_per_char", "nll_pooled"):
        assert found.lift(figure, 1, 2) == lift_recovered(*found.by_question(figure))
    with pytest.raises(UsageError, match="model 3 of 3"):
        found.lift("nll_pooled", 1, 3)


def test_differences_are_named_better_worse_or_none():
    assert word_of("accuracy", Interval(0.1, 0.05, 0.2), 8) == "better"
    assert word_of("accuracy", Interval(-0.1, -0.2, -0.05), 8) == "worse"
    assert word_of("nll_per_char", Interval(-0.1, -0.2, -0.05), 8) == "better"
    assert word_of("nll_per_char", Interval(0.1, 0.05, 0.2), 8) == "worse"
    assert word_of("nll_per_char", Interval(0.1, -0.05, 0.2), 8) == "unclear"
    assert word_of("accuracy", Interval(0.1, 0.0, 0.2), 8) == "unclear"
    assert word_of("accuracy", Interval(0.1, 0.05, 0.2), 7) == "unclear"


def test_the_table_shows_every_figure_in_80_columns():
    found = scores([[[-4.0, -2.0, -9.0], [-1.0, -1.5, -2.0]]] * 2, names=("org/base[1]", "folder/[red]x"))
    console = Console(width=80, record=True, file=io.StringIO())
    print_scores(found, console)
    text = console.export_text()
    for wanted in ("org/base[1]", "folder/[red]x", "2 questions", "nats per character", "unclear"):
        assert wanted in text
    for figure in FIGURES:
        value = found.bootstrap(figure)[1]
        assert f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]" in text
    assert max(map(len, text.splitlines())) <= 80
