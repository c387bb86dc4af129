"""The verdict on a fit follows its measurement: levels by the answers that it reproduces, numbers in every output."""

import io
import json
import math
import shlex

import msgspec
import pytest
from command_line import main
from probe_bases import CORPUS, write_move
from rich.console import Console

import jcrosslora as jcl
from jcrosslora.distill.facts import FitFacts
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.report import complete, print_report, published
from jcrosslora.report.documents import model_card
from jcrosslora.report.fit import fit_sentences, fit_verdict, interval
from jcrosslora.report.page import find_contents, headline
from jcrosslora.report.page.next_steps import first_steps, next_steps, where
from jcrosslora.report.record import Verdict

DISTILL = jcl.methods.Distill
COUNTS = {"answers": 200, "given": 200, "answered": 200, "planned": 200, "usual": 200}
MEASURED = {"steps": 7, "divergence_before": 1.5, "divergence": 0.25}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("move")
    adapter, source, target = write_move(folder)
    (folder / "prompts.txt").write_text("\n".join(f"{line} {n}" for n in range(8) for line in CORPUS), encoding="utf-8")
    return {"adapter": adapter, "source": source, "target": target, "prompts": folder / "prompts.txt"}


@pytest.fixture(scope="module")
def result(places):
    method = DISTILL(completions=48, passes=1, fit_rank=2, answer_tokens=4)
    given = {name: places[name] for name in ("adapter", "source", "target")}
    return jcl.transfer(*given.values(), method, prompts=places["prompts"], effect="never", cache=False)


def with_facts(result, **facts):
    """The report of a transfer, as if its fit had other facts."""
    found = msgspec.structs.replace(result.report, fit=FitFacts(**COUNTS | MEASURED | facts))
    return complete(found, DISTILL())


def level(agreed, held_out, **facts):
    return fit_verdict(FitFacts(held_out=held_out, agreed=agreed, **COUNTS | facts)).level


@pytest.mark.parametrize(("agreed", "held_out"), [(0, 6), (3, 6), (15, 30), (20, 20), (0, 0)])
def test_the_interval_solves_wilsons_equation(agreed, held_out):
    """Both ends are one standard error, of a share that lies there, away from the share that was seen."""
    for end in interval(agreed, held_out):
        assert abs(agreed - held_out * end) == pytest.approx(math.sqrt(held_out * end * (1 - end)), abs=1e-9)


@pytest.mark.parametrize(
    ("agreed", "held_out", "wanted"),
    [
        *((0, 6, "unusable"), (3, 6, "partly"), (15, 30, "works"), (15, 20, "works"), (1, 20, "unusable")),
        *((4, 20, "partly"), (0, 5, "unknown"), (5, 5, "unknown"), (0, 0, "unknown")),
    ],
)
def test_the_level_depends_on_how_many_answers_are_reproduced_and_of_how_many(agreed, held_out, wanted):
    assert level(agreed, held_out) == wanted
    text = fit_verdict(FitFacts(held_out=held_out, agreed=agreed, **COUNTS)).text
    assert (f"{agreed} of the source's {held_out} held-out answers" in text) == (held_out > 0)
    assert ("no prompt was held out" in text) == (held_out == 0)


def test_answers_to_prompts_that_the_source_made_up_never_show_that_a_fit_from_zero_works():
    own = {"given": 0, "answered": 0, "written": 200}
    assert level(20, 20, **own) == "partly"
    assert level(20, 20, **own, on_top=True) == "works"
    assert level(0, 20, **own) == "unusable"
    assert level(20, 20, given=0, examples=50) == "works"


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"done": 0.4}, "let the fit end (it was stopped after 40%)"),
        ({"planned": 40, "usual": 300, "given": 20}, "leave out --completions (40 were asked for, the default is 300)"),
        ({"planned": 40, "usual": 300, "given": 20}, "give more prompts (there were 20, and up to 1,000 are used)"),
        ({"given": 0, "written": 200}, "give prompts of the adapter's task with --prompts"),
        ({}, "see whether the source answers well with the adapter"),
    ],
)
def test_a_poor_fit_is_told_what_would_help(result, facts, told):
    poor = with_facts(result, agreed=0, held_out=20, **facts)
    assert poor.verdict.text.startswith("it is probably unusable: it reproduces 0 of the source's 20 ")
    assert told in poor.verdict.text
    lines = "\n".join(first_steps(published(poor), "moved", "target", "portable"))
    assert told in lines
    for absent in ("peft", "evaluate", "generate"):
        assert absent not in lines
    assert ("Write prompts of the adapter's task" in lines) == (facts.get("given", 200) < 200)
    assert "--recipe moved/recipe.toml" in lines
    assert ("--completions 300" in lines) == ("planned" in facts)


def test_a_move_of_maps_without_effect_is_told_what_would_help(result):
    """`auto` took a method of the weights alone."""
    verdict = Verdict("chance", "at chance level")
    useless = msgspec.structs.replace(result.report, fit=None, choice="it was the only one", verdict=verdict)
    lines = "\n".join(first_steps(published(useless), "moved", "target", "portable"))
    assert "What would help: an update that is fitted to answers of the source." in lines
    assert "--prompts prompts.txt" in lines


def test_a_poor_fit_is_run_again_by_the_command_that_is_shown(result, places, tmp_path, capsys):
    """It keeps the settings of the first move, and takes more prompts."""
    assert result.report.verdict.level == "unusable"
    folder = result.save(tmp_path / "moved")
    lines = list(first_steps(published(result.report), str(folder), str(places["target"]), "portable"))
    command = next(line for line in lines if line.lstrip().startswith("jcrosslora transfer"))
    (tmp_path / "prompts.txt").write_text(places["prompts"].read_text(encoding="utf-8"))
    words = shlex.split(command)[1:]
    named = {"--source": places["source"], "--out": tmp_path / "again", "--prompts": tmp_path / "prompts.txt"}
    for flag, place in named.items():
        words[words.index(flag) + 1] = str(place)
    words[1] = str(places["adapter"])
    main([*words, "--dry-run", "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert planned["method"] == result.report.recipe.method
    assert planned["rank"] == result.report.recipe.settings["fit_rank"]


def test_the_numbers_of_a_fit_add_up(result, places):
    fit = result.report.fit
    prompts = set(places["prompts"].read_text(encoding="utf-8").splitlines())
    assert (fit.given, fit.answered, fit.labelled, fit.written) == (len(prompts), fit.answers, 0, 0)
    assert (fit.planned, fit.usual, fit.answers) == (48, 300, len(result.texts))
    assert (fit.done, fit.on_top, fit.devices) == (1.0, False, 1)
    assert fit.held_out == DistillSettings().held_of(fit.answers, prompted=True)
    assert fit.steps >= -(-(fit.answers - fit.held_out) // 4)  # one pass, in batches of at most four
    curve = [divergence for _, divergence in result.report.curve]
    assert (fit.divergence_before, fit.divergence) == (curve[0], min(curve))
    some = FitFacts(answers=40, answer_tokens=9, ended=0, cut=32, given=20, answered=20, written=13)
    assert list(fit_sentences(some)) == [
        "the source wrote 40 answers of at most 9 tokens (0 ended, 32 were cut where they are complete) to 33 prompts: "
        "20 given and 13 that a base wrote like them"
    ]


def test_every_output_has_both_numbers(result):
    report = with_facts(result, agreed=15, held_out=20, agreed_before=1)
    assert report.verdict.level == "works"
    console = Console(file=io.StringIO(), width=500)
    print_report(report, console)
    shown = "the target writes 15 of the source's 20 answers (1 of 20 before the fit)"
    assert shown in console.file.getvalue()
    assert shown in model_card(published(report))
    assert "it reproduces 15 of the source's 20 held-out answers" in repr(report)
    assert "15 of 20 answers" in report._repr_html_()
    stored = report.to_json()["fit"]
    assert (stored["agreed"], stored["held_out"], stored["agreed_before"]) == (15, 20, 1)


@pytest.mark.parametrize(
    ("agreed", "tone", "word"),
    [(15, "good", "Probably works"), (4, "mixed", "Works in part"), (0, "bad", "Probably unusable")],
)
def test_the_page_follows_the_level(result, tmp_path, agreed, tone, word):
    report = published(with_facts(result, agreed=agreed, held_out=20, given=20))
    (tmp_path / "transfer_report.json").write_text(json.dumps(report.to_json()))
    contents = find_contents(tmp_path)
    found, first = headline(contents), next(next_steps(contents))
    assert (found.tone, found.word) == (tone, word)
    assert f"{agreed} of the source's 20" in found.reasons[0]
    assert ("--prompts prompts.txt" in first.commands[0]) == (tone == "bad")
    assert f"`{tmp_path.name}`" in where(contents, first)  # also where the command reads its recipe alone


def test_no_example_of_another_task_is_printed(result):
    """The answers of an example would be wrong for nearly every adapter."""
    report = published(with_facts(result, agreed=15, held_out=20))
    lines = "\n".join(first_steps(report, "moved", "target", "portable"))
    assert 'task.jsonl, one a line, as {"prompt": "...", "answer": "..."}' in lines
    assert "bees" not in lines + model_card(report)


def test_the_command_fails_on_a_fit_that_reproduces_nothing(places, tmp_path, capsys):
    """Steps of a rate that changes no answer: the verdict says so, and what to do."""
    given = [places["adapter"], "--source", places["source"], "--target", places["target"], "--effect", "never"]
    flags = ["--method", "distill", "--prompts", places["prompts"], "--completions", "48", "--passes", "1"]
    flags += ["--answer-tokens", "4", "--fit-rank", "1", "--rate", "1e-7", "--end", "never", "--held-out", "0.4"]
    command = ["transfer", *map(str, [*given, *flags, "--out", tmp_path / "moved"]), "--fail-on", "no-effect"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 3
    found, printed = json.loads((tmp_path / "moved" / "transfer_report.json").read_text()), capsys.readouterr().out
    assert (found["fit"]["agreed"], found["fit"]["held_out"], found["verdict"]["level"]) == (0, 19, "unusable")
    assert "it is probably unusable: it reproduces 0 of the source's 19 held-out answers" in " ".join(printed.split())
    assert "What would help: leave out --completions" in printed
