"""Answers as people see them: a table in 80 columns, examples side by side, a page of its own, and the command."""

import io
import json

import numpy as np
import pytest
from command_line import main
from html_pages import Page
from probe_bases import write_base
from rich.console import Console
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.decoder import Written
from jcrosslora.evaluate import Answers, answers_page, print_answers
from jcrosslora.evaluate.output import TITLES
from jcrosslora.text import Completion, Message
from jcrosslora.training import read_examples
from jcrosslora.utils.picking import from_start

HOSTILE = "<script>alert('&')</script>\x1b[2J[red]"


@pytest.fixture(scope="module")
def answers():
    """40 examples under three models: the second answers right and ends, the third right and is cut off."""
    examples = tuple(
        Completion((Message("user", f"{HOSTILE} {place}"),), f'{{"a": {place}}}', references=('{"b": 1}',))
        for place in range(40)
    )
    right = [one.answer for one in examples]
    written = (
        tuple(Written(HOSTILE, 3, True) for _ in right),
        tuple(Written(text.replace(" ", ""), 3, True) for text in right),
        tuple(Written(text, 3, False) for text in right),
    )
    nll = np.random.default_rng(0).uniform(1, 400, (3, 40))
    return Answers(("/home/me/base[1]", "/home/me/[red]moved", "/home/me/trained"), examples, written, nll, 20)


def printed(answers, width=80, **settings):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    print_answers(answers, console, **settings)
    return console.export_text()


# Text


def test_the_table_fits_80_columns_and_shows_every_figure(answers):
    lines = printed(answers).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert lines[0] == "40 examples, answers of at most 20 tokens, 95% intervals"
    for figure in answers.figures:
        (value, *_), digits = answers.bootstrap(figure), 1 if figure == "chrf" else 3
        shown = f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
        rows = [line for line in lines if line.startswith(TITLES[figure])]
        # One line each: nothing is folded, for nats of two digits either.
        assert len(rows) == 3
        assert shown in rows[0]
    assert [line.split()[-1] for line in lines if line.startswith("equal JSON")][1:] == ["better", "unclear"]
    assert "/home/me/[red]moved" in lines


def test_examples_are_shown_with_marks_and_without_control_characters(answers):
    text = printed(answers, show=2)
    assert "example 1\n" in text
    assert "example 21\n" in text
    assert "\x1b" not in text
    assert "\\x1b[2J[red]" in text
    for wanted in ('{"a":20}  [equal JSON]', '{"a": 20}  [not ended]', "right answer", '{"b": 1}', "[red]moved"):
        assert wanted in text
    assert from_start(answers.examples, 0) == ()
    assert from_start(range(40), 3) == (0, 13, 26)
    assert from_start(range(40), 99) == tuple(range(40))


def test_answers_that_never_end_are_explained():
    cut = (Written("a", 3, False),)
    found = Answers(("base",), (Completion("p", " a"),), (cut,), np.ones((1, 1)), 3)
    assert "No answer ended, so exact match" in printed(found, 160)
    assert "1 example, answers of at most 3 tokens" in printed(found)


# Page


def test_every_text_of_the_page_is_escaped(answers):
    page = Page(answers_page(answers))
    assert "script" not in page.tags
    assert any(HOSTILE.replace("\x1b", "\\x1b") == text for text in page.texts)
    assert "\x1b" not in answers_page(answers)


def test_the_page_loads_nothing_and_is_light_or_dark(answers):
    page = answers_page(answers)
    names = {name for name, _ in Page(page).attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "style", "data-title"}
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert "color-scheme: light dark" in page


def test_the_page_shows_all_answers_side_by_side_and_no_folder(answers):
    page = answers_page(answers)
    texts = Page(page).texts
    assert [texts.count(head) for head in ("prompt", "right answer")] == [1, 1]
    # In the figures and above the answers.
    assert [texts.count(name) for name in ("base", "[red]moved", "trained")] == [2, 2, 2]
    assert (texts.count("equal JSON"), texts.count("not ended")) == (3 + 40, 40)
    assert texts.count('{"a": 7}') == 2
    assert "/home" not in page


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_base(folder / "base", 60, eos=1, layers=1)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    base = jcl.open_base(folder / "base")
    for seed, name in enumerate(("moved", "trained")):
        jcl.save_adapter(random_adapter(base, seed=seed, scale=0.3), folder / name, base_name="org/base")
    turns = [{"role": "user", "content": "Who is Anna?"}, {"role": "assistant", "content": '{"friend": "Peter"}'}]
    lines = [{"messages": turns, "references": ["{}"]}] * 3
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "plain.jsonl").write_text('{"prompt": "Anna and", "answer": "Peter"}\n' * 3)
    (folder / "choices.jsonl").write_text('{"question": "Who?", "choices": ["Anna", "Peter"], "answer": 1}\n')
    return folder


def command(files, task, *flags):
    adapters = [str(files / name) for name in ("moved", "trained")]
    return ["evaluate", "--base", str(files / "base"), "--data", str(files / task), "--adapter", *adapters, *flags]


def test_conversations_are_answered_as_text_and_as_a_page(files, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("old")
    main(command(files, "chat.jsonl", "--max-new-tokens", "5", "--show", "1", "--html", str(page)))
    text = capsys.readouterr().out
    for wanted in ("3 examples, answers of at most 5 tokens", "equal JSON", "exact match", "Who is Anna?", "written: "):
        assert wanted in text
    assert Page(page.read_text(encoding="utf-8")).texts.count("Who is Anna?") == 3


def test_plain_prompts_are_answered_as_json(files, capsys):
    main(command(files, "plain.jsonl", "--json", "--limit", "2", "--show", "1", "--max-new-tokens", "5"))
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["max_new_tokens"], found["not_scored"]) == (2, 5, [])
    base, moved, _ = found["models"]
    assert "json" not in base
    for figure in ("exact", "ended", "nll_per_char"):
        assert set(base[figure]) == {"value", "low", "high"}
        assert set(moved[figure]["minus_base"]) == {"value", "low", "high"}
    (shown,) = found["answers"]
    assert (shown["example"], shown["prompt"], shown["right"]) == (1, "Anna and", ["Peter"])
    assert [set(one) for one in shown["written"]] == [{"name", "text", "ended", "exact"}] * 3


def test_a_trained_adapter_gives_the_shares_of_its_gain(files, capsys):
    base = jcl.open_base(files / "base")
    examples = read_examples(files / "plain.jsonl")
    settings = jcl.TrainingSettings(steps=8, rank=2, rate=1e-2, batch=3)
    if not (files / "taught").exists():
        jcl.save_adapter(jcl.train_lora(base, examples, settings), files / "taught", base_name="org/base")
    flags = "--trained", str(files / "taught"), "--max-new-tokens", "5"
    main(command(files, "plain.jsonl", *flags, "--json"))
    found = json.loads(capsys.readouterr().out)
    assert found["trained"] == found["models"][-1]["name"] == "taught"
    nll = [model["nll_per_char"] for model in found["models"]]
    assert ["lift" in one for one in nll] == [False, True, True, False]
    share = (nll[0]["value"] - nll[1]["value"]) / (nll[0]["value"] - nll[3]["value"])
    assert nll[1]["lift"]["value"] == pytest.approx(share)
    main(command(files, "plain.jsonl", *flags))
    (line,) = [
        one for one in capsys.readouterr().out.splitlines() if "moved, share of the trained adapter's gain" in one
    ]
    assert f"nll_per_char {share:.2f} [" in line


@pytest.mark.parametrize(
    ("task", "flags", "reason"),
    [
        ("choices.jsonl", ("--show", "1"), "questions with choices, which are not answered in writing"),
        ("choices.jsonl", ("--html", "page.html"), "questions with choices"),
        ("plain.jsonl", ("--html", "plain.jsonl"), "no name of a page"),
        ("plain.jsonl", ("--html", "none/page.html"), "a folder that exists"),
        ("plain.jsonl", ("--limit", "0"), "limit 0"),
        ("plain.jsonl", ("--show", "-1"), "show -1"),
        ("plain.jsonl", ("--max-new-tokens", "0"), "max-new-tokens 0"),
        ("bad.jsonl", (), "bad.jsonl:2: "),
        ("other.jsonl", (), 'expected {"messages"'),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(files, task, flags, reason, capsys, monkeypatch):
    monkeypatch.chdir(files)
    (files / "bad.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "p"}\n')
    (files / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(command(files, task, *flags))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
