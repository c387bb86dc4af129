"""The report page: its numbers are those of the files, it needs nothing else, and damaged input is one clear error."""

import builtins
import io
import itertools
import json
import re
import shlex
from html import unescape
from pathlib import Path

import browser
import html_pages
import numpy as np
import pytest
from command_line import main
from full_set import full_except
from probe_bases import write_move
from rich.console import Console
from tiny_bases import open_pair, random_adapter

import jcrosslora as jcl
from jcrosslora.decoder import Written
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Answers, Scores, answers_json, scores_json
from jcrosslora.report import REPORT, print_report, published, read_report
from jcrosslora.report.page import (
    Roles,
    answers_section,
    find_contents,
    gain_share,
    headline,
    parse_evaluation,
    report_page,
)
from jcrosslora.report.page.contents import Contents
from jcrosslora.text import Completion, Message

pytest.importorskip("matplotlib")  # the extra plot
HOSTILE = "<script>alert('&')</script>\x1b[2J $x$"
NAMES = "/home/me/base", "/home/me/moved", "/home/me/trained", "/home/me/random"
TITLES = "without adapter", "moved adapter", "trained adapter", "random adapter"
ROLES = Roles(trained="trained", random="random")


class Page(html_pages.Page):
    """A page with pictures, whose tags may close themselves."""

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def answers_of(shares, nll=(0.9, 0.3, 0.2, 0.9)):
    """40 examples under four models; each answers a share of them right, and the likelihoods differ a little."""
    examples = tuple(Completion((Message("user", f"{HOSTILE} {at}"),), f"right {at}") for at in range(40))
    written = tuple(
        tuple(Written(one.answer if at < 40 * share else f"{HOSTILE} no", 3, True) for at, one in enumerate(examples))
        for share in shares
    )
    spread = np.random.default_rng(0).uniform(0.9, 1.1, 40) * [len(one.answer) for one in examples]
    return Answers(NAMES[: len(shares)], examples, written, np.outer(nll[: len(shares)], spread), 9)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    source, target = open_pair(tmp_path_factory.mktemp("pair"))
    return jcl.transfer(random_adapter(source), source, target, "pad-truncate", cache=False)


@pytest.fixture(scope="module")
def moved(result, tmp_path_factory):
    """A folder as `jcrosslora transfer` writes it, with the curve and the texts of a fit."""
    folder = result.save(tmp_path_factory.mktemp("adapters") / "moved")
    report = folder / "transfer_report.json"
    data = json.loads(report.read_text())
    data |= {"curve": [[0, 1.75], [80, 0.4321], [160, 0.25], [160, 0.1234]], "wrote_prompts": True}
    data |= {"fit": {"note": f"set by hand {HOSTILE}"}, "examples": [], "warnings": [f"careful {HOSTILE}"]}
    report.write_text(json.dumps(data))
    lines = [{"prompt": f"text {at}, ", "completion": "its end"} for at in range(30)]
    lines[0] = {"messages": [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}]}
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "answers.json"
    path.write_text(json.dumps(answers_json(answers_of((0, 0.75, 1, 0)), ["a kind of tensor"], show=20)))
    return path


@pytest.fixture(scope="module")
def page(moved, answers):
    return report_page(find_contents(moved, answers, ROLES))


def saved(folder, name, **changes):
    """Write a report with changed fields to a folder of its own."""
    folder.mkdir(exist_ok=True)
    data = json.loads((name / "transfer_report.json").read_text())
    (folder / "transfer_report.json").write_text(json.dumps(data | changes))
    return folder


# What it shows


def test_every_figure_is_in_the_picture_and_in_the_table_as_the_file_has_it(page, answers):
    texts = Page(page).texts
    for model, title in zip(json.loads(answers.read_text())["models"], TITLES, strict=True):
        assert title in texts
        for figure, in_picture in (("exact", True), ("nll_per_char", True), ("ended", False)):
            one, digits = model[figure], 3
            shown = f"{one['value']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"
            assert texts.count(shown) >= 1 + in_picture, (title, figure)
    assert sum(text in ("better", "worse") for text in texts) >= 4


def test_the_verdict_counts_right_answers_and_says_what_a_trained_adapter_gains(moved, answers):
    found = headline(find_contents(moved, answers, ROLES))
    assert (found.tone, found.word) == ("good", "It works")
    counted, likely = found.reasons
    assert "of 40: 0 without an adapter, 30 with the moved adapter, 40 with an adapter trained" in counted
    assert f"{(0.9 - 0.3) / (0.9 - 0.2):.0%} of what a trained adapter gains" in likely


@pytest.mark.parametrize(
    ("shares", "nll", "word"),
    [
        ((0, 0.25, 1), (0.9, 0.3, 0.2), "It works in part"),  # a trained adapter gains far more
        ((0.5, 0.5, 1), (0.9, 0.3, 0.2), "It works in part"),  # more likely, not more often right
        ((0.5, 0.5, 1), (0.9, 0.9, 0.2), "No effect seen"),
        ((0.5, 0.1, 1), (0.9, 1.5, 0.2), "It harms"),
        ((0.5, 0.1, 1), (0.9, 0.3, 0.2), "Mixed"),
    ],
)
def test_the_verdict_follows_the_figures(moved, tmp_path, shares, nll, word):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers_json(answers_of(shares, nll))))
    contents = find_contents(moved, path, Roles(trained="trained"))
    assert headline(contents).word == word
    if shares[0] == shares[1]:
        assert gain_share(contents.evaluation, "exact") == 0


def test_the_examples_are_ten_with_the_answers_of_base_moved_and_trained(page):
    texts = Page(page).texts
    assert [sum(text.strip() == head for text in texts) for head in ("prompt", "before", "after")] == [10, 10, 10]
    assert sum(text.startswith("right ") and text != "right answer " for text in texts) > 10
    assert texts.count("exact") == 18  # 8 of the moved adapter's and 10 of the trained one's


def test_the_curve_and_the_texts_are_those_of_the_report(page, moved):
    texts = Page(page).texts
    assert {"1.75", "0.123", "the same texts again"} <= set(texts)
    report = json.loads((moved / "transfer_report.json").read_text())
    assert "asked\nanswered" in texts
    assert "text 27, its end" in texts
    assert report["recipe_toml"].strip() in texts
    assert report["target"]["name"] in "".join(texts)


def test_the_axis_of_a_curve_has_each_number_once(moved, tmp_path):
    folder = saved(tmp_path / "repeated", moved, curve=[[0, 1.1], [82, 0.3], [82, 0.25], [82, 0.24], [82, 0.24]])
    page = report_page(find_contents(folder))
    axis = re.search(r'"curve-matplotlib.axis_1".*?"curve-matplotlib.axis_2"', page, re.DOTALL)[0]
    assert re.findall(r">([\d,]+)</text>", axis) == ["0", "1", "2", "3", "4"]
    assert "the fit, which used 82 texts" in axis


def test_texts_of_the_fit_are_whole_and_others_backticks_stay(moved, tmp_path):
    text = f"ask `me` {HOSTILE} " * 40
    page = report_page(find_contents(saved(tmp_path / "long", moved, examples=[text])))
    assert text.replace("\x1b", "\\x1b") in Page(page).texts


def test_what_a_map_left_behind_is_in_the_verdict(moved, tmp_path):
    left = [{"source": "model.layers.7.mlp.up_proj", "share": 0.375}]
    folder = saved(tmp_path / "left", moved, unmapped_sources=left, fit=None)
    said = "held 37.5% of the original update, which was left behind"
    assert said in report_page(find_contents(folder))
    assert "left behind" not in report_page(find_contents(moved))


def evaluated(folder, shares, nll=(0.9, 0.3, 0.2, 0.9), **changes):
    """Write the output of an evaluation to a folder."""
    found = answers_json(answers_of(shares, nll), show=2, **changes)
    (folder / "answers.json").write_text(json.dumps(found))
    return folder / "answers.json"


def test_the_share_of_a_trained_adapters_gain_has_its_interval(moved, tmp_path):
    answers = answers_of((0, 0.5, 1, 0))
    contents = find_contents(moved, evaluated(tmp_path, (0, 0.5, 1, 0), trained=NAMES[2]))
    assert [model.part for model in contents.evaluation.models] == ["base", "moved", "trained", "other"]
    lift = answers.lift("exact", 1, 2)
    told = f"{lift.value:.0%} [{lift.low:.0%}, {lift.high:.0%}] of what a trained adapter gains"
    assert 0 < lift.low < lift.value < lift.high < 1
    assert told in headline(contents).reasons[0]
    assert f"{lift.value:.2f} [{lift.low:.2f}, {lift.high:.2f}]" in Page(report_page(contents)).texts


def test_a_share_of_another_adapters_gain_is_not_shown(moved, tmp_path):
    path = evaluated(tmp_path, (0, 0.5, 1, 0.9), trained=NAMES[2])
    contents = find_contents(moved, path, Roles(trained="random"))
    assert all(one.lift is None for model in contents.evaluation.models for one in model.figures.values())
    assert " [" not in headline(contents).reasons[0]


def test_a_loss_is_not_told_as_a_share_of_a_gain(moved, tmp_path):
    contents = find_contents(moved, evaluated(tmp_path, (0, 0, 1), (0.9, 4, 0.2), trained=NAMES[2]))
    found = headline(contents)
    assert found.word == "It harms"
    assert "brings 0% [0%, 0%] of what" in found.reasons[0]
    assert "%" not in found.reasons[1]


def test_a_gain_that_a_random_adapter_has_as_well_is_no_success(moved, tmp_path):
    path = evaluated(tmp_path, (0, 0.5, 1, 0.45), (0.9, 0.3, 0.2, 0.3))
    assert headline(find_contents(moved, path, ROLES)).word == "No better than random"
    assert headline(find_contents(moved, path, Roles(trained="trained", moved="moved"))).word == "It works"


def test_long_answers_of_many_adapters_are_cut_for_the_page_to_stay_small(tmp_path):
    data = json.loads(evaluated(tmp_path, (0, 1)).read_text())
    base, one = data["models"]
    data["models"] = [base, *(one | {"name": f"adapter {place}"} for place in range(60))]
    written = [{"name": "", "text": "<&" * 5000, "ended": True, "exact": False}] * 61
    data["answers"] = [{"prompt": "&" * 10**5, "right": ["&" * 10**5], "written": written}] * 10
    content = json.dumps(data).encode()
    assert len(answers_section(parse_evaluation(content, "answers.json"))) < 1_900_000
    data["answers"] = [{"prompt": "p" * 3999, "right": ["r"], "written": written[:2]}]
    data["models"] = data["models"][:2]
    assert "p" * 3999 in answers_section(parse_evaluation(json.dumps(data).encode(), "answers.json"))


@pytest.mark.parametrize("kept", [(), ("value", "low", "high")])
def test_without_figures_or_differences_nothing_is_said_of_the_effect(moved, tmp_path, kept):
    data = json.loads(evaluated(tmp_path, (0, 1, 1)).read_text())
    for model in data["models"]:
        for name, figure in list(model.items()):
            if isinstance(figure, dict):
                model[name] = {part: figure[part] for part in kept}
                if not kept:
                    del model[name]
    (tmp_path / "answers.json").write_text(json.dumps(data))
    contents = find_contents(moved, tmp_path / "answers.json", Roles(trained="trained"))
    assert (headline(contents).tone, headline(contents).word) == ("open", "Not known")
    assert "Not known." in report_page(contents)


def test_where_no_answer_is_exact_the_likeness_decides(moved, tmp_path):
    data = json.loads(evaluated(tmp_path, (0, 0, 0)).read_text())
    values = (40.0, 55.0, 58.0)
    for model, value in zip(data["models"], values, strict=True):
        change = value - values[0]
        model["chrf"] = {"value": value, "low": value - 2, "high": value + 2}
        model["chrf"]["minus_base"] = {"value": change, "low": change - 2, "high": change + 2}
    (tmp_path / "answers.json").write_text(json.dumps(data))
    found = headline(find_contents(moved, tmp_path / "answers.json", Roles(trained="trained")))
    assert found.word == "It works"
    assert "40.0 without an adapter, 55.0 with the moved adapter, 58.0 with an adapter trained" in found.reasons[0]
    assert "83% of what a trained adapter gains" in found.reasons[0]


@pytest.mark.parametrize(("right", "word"), [((0.2, 0.05, 0.35), "It works"), ((-0.3, -0.45, -0.15), "Mixed")])
def test_right_answers_decide_even_if_training_does_not_change_their_number(right, word):
    def figure(value, difference=None):
        ends = dict(zip(("value", "low", "high"), (value, value - 0.1, value + 0.1), strict=True))
        return ends if difference is None else ends | {"minus_base": dict(zip(ends, difference, strict=True))}

    models = [
        {"name": "base", "exact": figure(0.5), "chrf": figure(50)},
        {"name": "moved", "exact": figure(0.5 + right[0], right), "chrf": figure(58, (8, 3, 13))},
        {"name": "tuned", "exact": figure(0.55, (0.05, -0.05, 0.15)), "chrf": figure(60, (10, 5, 15))},
    ]
    models[1]["nll_per_char"] = models[2]["nll_per_char"] = figure(0.8, (-0.2, -0.3, -0.1))
    models[0]["nll_per_char"] = figure(1.0)
    data = {"examples": 40, "models": models, "not_scored": [], "trained": "tuned"}
    found = parse_evaluation(json.dumps(data).encode(), "file").with_parts(Roles(), "moved")
    assert headline(Contents("moved", None, found)).word == word


def test_a_few_examples_decide_nothing(moved, tmp_path):
    path = evaluated(tmp_path, (0, 1))
    data = json.loads(path.read_text())
    for count, word in ((8, "It works"), (7, "Too few examples")):
        path.write_text(json.dumps(data | {"examples": count}))
        assert headline(find_contents(moved, path, Roles())).word == word


def test_an_adapter_is_found_by_the_last_part_of_its_path_and_a_guess_is_told(moved, tmp_path):
    data = json.loads(evaluated(tmp_path, (0, 1, 1)).read_text())
    for model, name in zip(data["models"][1:], ("out/moved", "runs/trained"), strict=True):  # folders elsewhere
        model["name"] = name
    (tmp_path / "answers.json").write_text(json.dumps(data))
    for said in ("trained", "jobs/trained"):
        contents = find_contents(moved, tmp_path / "answers.json", Roles(trained=said))
        assert [model.part for model in contents.evaluation.models] == ["base", "moved", "trained"]
    assert "is it this one?" not in report_page(contents)
    data["models"][1]["name"] = "another"
    (tmp_path / "answers.json").write_text(json.dumps(data))
    contents = find_contents(moved, tmp_path / "answers.json", Roles(trained="trained"))
    assert "adapter another, the only one that is neither trained nor random: is it this one?" in report_page(contents)


def test_one_of_several_adapters_of_the_same_name_has_to_be_named(moved, tmp_path):
    path = evaluated(tmp_path, (0, 1, 1))
    data = json.loads(path.read_text())
    for model, name in zip(data["models"][1:], ("moved", "moved (2)"), strict=True):  # as `evaluate` numbers them
        model["name"] = name
    path.write_text(json.dumps(data))
    for roles in (Roles(), Roles(moved="runs/moved")):
        with pytest.raises(UsageError, match=r"several evaluated adapters are called 'moved'"):
            find_contents(moved, path, roles)
    for roles in (Roles(moved="moved (2)"), Roles(trained="moved")):
        contents = find_contents(moved, path, roles)
        assert contents.evaluation.of_part("moved").name == "moved (2)"


def test_the_digest_tells_whether_the_answers_are_of_the_adapters_base(moved, tmp_path):
    path = evaluated(tmp_path, (0, 1))
    data = json.loads(path.read_text())
    digest = read_report(moved / REPORT).target.digest
    told = {}
    for given in (None, digest, "sha256:other"):
        path.write_text(json.dumps(data | {"digest": given}))
        told[given] = report_page(find_contents(moved, path))
    assert "are they the same model?" in told[None]
    assert "are they the same model?" not in told[digest] + told["sha256:other"]
    assert [given for given, page in told.items() if "whose weights are not those of" in page] == ["sha256:other"]


def test_questions_with_choices_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    log_probs = rng.uniform(-9, -1, (2, 30, 2))
    log_probs[1, :, 1] = -0.5
    ones = np.ones((30, 2), np.int64)
    scores = Scores(("base", "my adapter"), log_probs, ones, ones, np.ones(30, np.int64))
    (tmp_path / "scores.json").write_text(json.dumps(scores_json(scores)))
    contents = find_contents(tmp_path)
    assert headline(contents).word == "It works"
    text = "".join(Page(report_page(contents)).texts)
    assert "30 with the moved adapter" in text
    assert "share of right choices" in text
    for absent in ("Before and after", "Recipe and versions", "How did the fit go?"):
        assert absent not in text
    assert "jcrosslora report 'my adapter' --answers answers.json" in text


def test_a_result_in_memory_gives_the_same_page_as_its_files(result, tmp_path):
    answers = answers_of((0, 1))
    answers = Answers(("base", result.adapter.info.name), answers.examples, answers.written, answers.nll, 9)
    page = result.html(answers)
    assert "It works" in page
    assert "Before and after, 10 examples" in page
    alone = result.html()
    assert report_page(find_contents(result.save(tmp_path / "moved"))) == alone
    assert "Does it work?" not in alone


def test_the_file_is_the_record_and_old_ones_may_lack_fields(result, tmp_path):
    out = result.save(tmp_path / "moved")
    found = read_report(out / REPORT)
    assert found == published(result.report)
    assert found.to_json() == json.loads((out / REPORT).read_text())
    printed = []
    for one in (found, published(result.report)):
        console = Console(file=io.StringIO(), width=200)
        print_report(one, console, table="module")
        printed.append(console.file.getvalue())
    assert printed[0] == printed[1]
    older = found.to_json()
    for later in ("asked", "tokens", "totals", "rank_before", "truncation"):
        del older[later]
    (out / REPORT).write_text(json.dumps(older))
    assert read_report(out / REPORT).rows == found.rows


# What is left out


def test_what_is_not_there_is_left_out(moved, tmp_path):
    by_map = saved(tmp_path / "map", moved, curve=[], fit=None)
    for folder, has_curve in ((moved, True), (by_map, False)):
        text = "".join(Page(report_page(find_contents(folder))).texts)
        assert ("How did the fit go?" in text) == has_curve
        for title in ("Does it work?", "Before and after,"):
            assert title not in text


def test_the_next_step_comes_first_and_its_commands_work_as_they_are(tmp_path, monkeypatch, capsys):
    write_move(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = "--source source --target target --out moved --method random --no-cache"
    main(["transfer", "adapter", *given.split()])
    main(["report", "moved"])
    steps = commands(Path("moved/report.html").read_text())
    capsys.readouterr()
    Path("task.jsonl").write_text('{"prompt": "Anna lives in", "answer": " Paris"}')  # in the form that the step shows
    for command in steps:
        paste(command, capsys)
    page = Page(Path("moved/report.html").read_text())
    assert "Before and after, one example" in page.texts
    step = page.texts[page.texts.index("Next step") : page.texts.index("Does it work?")]
    assert any("Run it in the folder that holds" in text for text in step)
    assert [" ".join(shlex.split(command)[:2]) for command in steps] == [
        "jcrosslora evaluate",
        "jcrosslora report",
        "jcrosslora generate",
    ]
    assert "/" not in "".join(steps)


def commands(page):
    """The commands of a page, in its order, but those that make the adapter again."""
    found = re.findall(r"<code>([^<]*)</code>(?=<code>|</pre>)", page)
    return [unescape(one) for one in found if "--recipe" not in one]


def paste(command, capsys):
    """Do in this process what a shell does with a command of jcrosslora."""
    command, _, out = command.partition(" > ")
    main(shlex.split(command)[1:])
    printed = capsys.readouterr().out
    if out:
        Path(out).write_text(printed)


def test_names_of_others_do_nothing_in_a_command(moved, tmp_path):
    name = "$(touch made) `x` '; touch made #\x1b\n"
    data = json.loads((moved / "transfer_report.json").read_text())
    folder = saved(tmp_path / "moved", moved, target=data["target"] | {"ref": name, "name": name})
    for command in commands(report_page(find_contents(folder))):
        if command.startswith("jcrosslora"):
            shown = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
            assert shown in shlex.split(command) or " report " in command


def test_an_evaluation_without_answers_and_parts_says_how_to_get_them(tmp_path):
    data = answers_json(answers_of((0, 1, 1)))
    data["models"][1]["name"] = "my\x1b $adapter$"
    (tmp_path / "answers.json").write_text(json.dumps(data))
    page = report_page(find_contents(tmp_path))
    text = "\n".join(Page(page).texts)
    assert "Before and after, " not in text
    assert "\x1b" not in page
    for name in ("my\\x1b $adapter$", "trained"):
        assert text.count(f"\n{name}\n") > 2
    for command in (r"--moved 'my\x1b $adapter$'", "--trained trained", "--show 10"):
        assert command in text


# What it needs


def test_the_page_loads_nothing_runs_nothing_and_escapes_every_text(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "\x1b" not in page
    assert any("<script>alert('&')</script>\\x1b[2J $x$ 0" in text for text in parsed.texts)
    assert not re.search(r"https?:|//\w|@import|@font-face|url\((?!#)", page.replace("default-src", ""))
    assert all(value.startswith("#") for name, value in parsed.attributes if name in ("href", "src"))
    assert "default-src 'none'" in page
    assert "/home" not in page
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    uses = {value for name, value in parsed.attributes if name == "href"} | {
        f"#{one}" for one in re.findall(r"url\(#([^)]*)\)", page)
    }
    assert uses <= {f"#{one}" for one in ids}
    assert len(page.encode()) < 2_000_000


def test_commands_and_names_are_code(result):
    page = result.html()
    assert "for other ways see <code>jcrosslora methods</code>" in page
    assert "Method <code>pad-truncate</code>" in page
    assert "`" not in "".join(Page(page).texts)


@pytest.mark.full
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_nothing_is_cut_off(page, result, tmp_path, width, theme):
    for name, text in (("measured", page), ("moved", result.html())):
        (tmp_path / f"{name}.html").write_text(text)
        found = browser.see(tmp_path / f"{name}.html", width, theme, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert found["inner"] == width
        assert found["width"] <= width
        assert found["cut"] == []
        assert (found["dark"], found["background"] == "rgb(255, 255, 255)") == (theme == "dark", theme == "light")
        assert len(found["axes"]) >= 2
        for axis in found["axes"]:
            shown = [label["text"] for label in axis]
            assert len(set(shown)) == len(shown)
            assert not any(overlap(one["box"], other["box"]) for one, other in itertools.pairwise(axis))


def overlap(one, other):
    """Whether two boxes of left, top, right and bottom do."""
    return all(min(one[at + 2], other[at + 2]) - max(one[at], other[at]) > 1 for at in (0, 1))


def test_the_page_is_light_dark_and_for_paper(page):
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    defined = set(re.findall(r"(--\w+):", page))
    assert set(re.findall(r"var\((--\w+)\)", page)) <= defined
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    # Nothing in a picture keeps the colour that it has in light when the page is dark.
    assert not re.search(r"#(?!000000|ffffff)[0-9a-f]{6}\b", pictures)


@pytest.mark.parametrize("form", full_except(["html", "svg", "pdf", "png"], ["html", "svg"]))
def test_the_same_files_give_the_same_bytes(moved, answers, tmp_path, form, capsys, monkeypatch):
    found = []
    for place in range(2):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(10**9 * (1 + place)))
        out = tmp_path / f"{place}.{form}"
        main(["report", str(moved), "--answers", str(answers), "--trained", "trained", "--out", str(out)])
        found.append(out.read_bytes())
    assert found[0] == found[1]
    assert found[0].startswith({"html": b"<!doc", "svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}[form])
    assert "written: " in capsys.readouterr().out


def test_without_a_name_the_page_lies_in_the_folder(moved, answers):
    main(["report", str(moved), "--answers", str(answers)])
    (moved / "report.html").unlink()


def test_without_matplotlib_the_extra_is_named(moved, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(moved), "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert "pip install 'jcrosslora[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Errors


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 1}, "has schema 1, expected 4: move the adapter again"),
        ({"schema": None}, "has schema None"),
        ({"verdict": None}, r"is damaged .*verdict"),
        ({"layers": [10**9]}, r"is damaged .*layers"),
        ({"unmapped_sources": [{"source": "lm_head", "share": 0.1}]}, r"is damaged .*unmapped_sources"),
        ({"rows": [{"target": "lm_head", "source": "", "role": "q_proj", "energy": 1.0}]}, r"is damaged .*rows"),
        ({"curve": [[0, "low"]]}, r"is damaged .*curve"),
        ({"curve": [[0, 1e300], [1, 2.0]]}, r"is damaged .*curve"),
    ],
)
def test_a_damaged_report_or_one_of_another_schema_is_refused(moved, tmp_path, changes, reason):
    with pytest.raises(UsageError, match=reason):
        find_contents(saved(tmp_path / "damaged", moved, **changes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[: len(text) // 2], "is no evaluation, or a damaged one"),
        (lambda text: text.replace('"models"', '"model"'), "is no evaluation"),
        (lambda text: text.replace('"trained"', '"/home/you/moved"'), "names that differ"),
        (lambda text: json.dumps(json.loads(text) | {"models": []}), "expected 1 or more of both"),
        (lambda text: json.dumps(json.loads(text) | {"examples": 0}), "has 0 examples"),
        (lambda text: json.dumps(json.loads(text) | {"models": json.loads(text)["models"][:2]}), "of all 2 models"),
        (lambda text: "NaN", "is no evaluation"),
        (lambda text: re.sub(r'"high": [0-9.]+', '"high": 1e300', text, count=1), "is no evaluation"),
    ],
)
def test_damaged_answers_are_refused(answers, moved, tmp_path, change, reason):
    (tmp_path / "answers.json").write_text(change(answers.read_text()))
    with pytest.raises(UsageError, match=reason):
        find_contents(moved, tmp_path / "answers.json")


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (
            Roles(trained="traind"),
            r"trained adapter 'traind' is not among those evaluated \(did you mean 'trained'\?\)",
        ),
        (Roles(trained="moved", random="moved"), "random adapter 'moved' is the trained adapter already"),
    ],
)
def test_roles_name_adapters_that_were_evaluated(answers, moved, roles, reason):
    with pytest.raises(UsageError, match=reason):
        find_contents(moved, answers, roles)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{empty}"], "holds neither transfer_report.json nor the output"),
        (["{empty}/none"], "is no folder"),
        (["{moved}", "--answers", "{empty}/none.json"], "none.json: cannot be read"),
        (["{moved}", "--trained", "x"], "no adapter was evaluated"),
        (["{moved}", "--out", "{empty}/page"], "does not say what to write"),
        (["{moved}", "--out", "{empty}/page.json", "--format", "html"], "is no name of a page"),
        (["{moved}", "--out", "{empty}/none/page.html"], "cannot be written"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(moved, tmp_path, capsys, arguments, reason):
    before = sorted(moved.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(["report", *(one.format(empty=tmp_path, moved=moved) for one in arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert reason in error
    assert error.count("\n") == 1
    assert sorted(moved.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_several_evaluations_in_a_folder_have_to_be_chosen_from(answers, tmp_path):
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_bytes(answers.read_bytes())
    with pytest.raises(UsageError, match=r"holds several evaluations, one\.json, two\.json: name one by --answers"):
        find_contents(tmp_path)


def test_a_damaged_line_of_completions_is_named(moved, tmp_path):
    folder = saved(tmp_path / "texts", moved)
    (folder / "completions.jsonl").write_text('{"prompt": "a", "completion": 3}\n')
    with pytest.raises(UsageError, match=r"completions.jsonl:1: is damaged"):
        find_contents(folder)
