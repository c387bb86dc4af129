"""Labelled examples of the user in a fit: they are taught, and the source answers other prompts."""

import dataclasses
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from command_line import main
from probe_bases import CORPUS, QUESTIONS, write_move

import jcrosslora as jcl
from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.distill import settings as settings_module
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.distillation import examples_of_round
from jcrosslora.distill.settings import ROUND, USUAL
from jcrosslora.evaluate import score
from jcrosslora.evaluate.examples import as_completion
from jcrosslora.maps.method import Plan
from jcrosslora.methods import Auto, Distill
from jcrosslora.session.batch.plan import read_plan, units_of
from jcrosslora.session.job import Job
from jcrosslora.session.session import Session
from jcrosslora.session.settings import TransferOptions
from jcrosslora.session.transfer import given_probes
from jcrosslora.text import Completion

SMALL = Distill(fit_rank=4, passes=4, rate=3e-2, completions=24, answer_tokens=6, compared_tokens=400)
LINES = [{"prompt": one.prompt, "answer": one.choices[one.answer]} for one in QUESTIONS]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return [str(place) for place in write_move(tmp_path_factory.mktemp("move"))]


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "right.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    return path


def loss(base, adapters):
    """Nats a token of the right answers, by the base alone and with each adapter."""
    found = score(jcl.open_base(base), QUESTIONS, adapters)
    answers = np.arange(len(QUESTIONS)), found.answers
    return -found.log_probs[:, *answers].sum(axis=1) / found.tokens[answers].sum()


@pytest.mark.full
def test_right_answers_are_taught_and_the_source_answers_other_prompts(places):
    prompts = [*CORPUS, QUESTIONS[0].prompt]
    moves = [
        jcl.transfer(*places, SMALL, prompts=prompts, examples=examples, effect="never", cache=False)
        for examples in (None, QUESTIONS, LINES)
    ]
    alone, plain, taught, same = loss(places[2], [move.adapter for move in moves])
    assert taught == same
    assert taught < 0.9 * min(alone, plain)
    labelled = tuple(one.prompt for one in QUESTIONS)
    assert any(text.startswith(labelled) for text in moves[0].texts)
    assert not any(text.startswith(labelled) for text in moves[1].texts)
    assert len(moves[1].texts) > len(CORPUS)
    report = moves[1].report
    assert (report.recipe.example_count, report.recipe.examples) == (4, None)
    assert [move.report.fit.examples for move in moves] == [0, 4, 4]


def test_the_command_teaches_a_file_alone_and_records_it(places, right, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--method", "distill", "--completions", "16", "--passes", "1", "--fit-rank", "2", "--answer-tokens", "4"]
    command = ["transfer", places[0], "--source", places[1], "--target", places[2], *given, "--effect", "never"]
    command += ["--examples", str(right), "--out", str(out)]
    main([*command, "--dry-run"])
    assert "labels  4 examples of yours" in capsys.readouterr().out
    main(command)
    found = json.loads((out / "transfer_report.json").read_text())
    assert (found["recipe"]["examples"], found["recipe"]["example_count"]) == ("right.jsonl", 4)
    assert found["recipe"]["prompts"] is None
    assert not found["wrote_prompts"]
    fit = found["fit"]
    assert (fit["answer_tokens"], fit["examples"], fit["labelled"], fit["given"], fit["written"]) == (4, 4, 4, 0, 0)
    assert 'examples = "right.jsonl"' in (out / "recipe.toml").read_text()
    assert str(right) not in "".join(path.read_text() for path in out.glob("*.*") if path.suffix != ".safetensors")


def test_methods_that_fit_to_no_answers_are_refused_and_auto_takes_one_that_does(places, right):
    adapter, source, target = places
    with pytest.raises(jcl.MethodError, match=r"cross-lora cannot use labelled examples.* distill, or leave out --ex"):
        jcl.transfer(adapter, source, target, "cross-lora", examples=right, cache=False)
    session = Session(jcl.open_base(source), jcl.open_base(source))
    request, options = partial(Job, None, Auto()), TransferOptions()
    assert session.resolve(request(options))[0].name == "copy"
    assert session.resolve(request(options, given_probes(None, right)))[0].name == "distilled-copy"


@pytest.mark.parametrize(
    ("lines", "came"),
    [
        (["Who is it?"], r"right.jsonl:1: is 'Who is it\?', expected \{\"messages\""),
        (['{"text": "Who is it?"}'], r'right.jsonl:1: is .*, expected \{"messages"'),
        (
            ['{"prompt": "a", "answer": "b"}', '{"prompt": "c"}'],
            r'right.jsonl:2: is .*, expected \{"prompt": text, "ans',
        ),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "right.jsonl:1: its messages do not end with an answer"),
    ],
)
def test_a_file_without_answers_is_refused_with_its_line(places, tmp_path, lines, came):
    path = tmp_path / "right.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(jcl.UsageError, match=came) as caught:
        jcl.transfer(*places, SMALL, examples=path)
    assert "\n" not in str(caught.value)


def test_lists_that_are_no_examples_are_refused():
    with pytest.raises(jcl.UsageError, match=r"example 1: is .*'What'.*, expected"):
        given_probes(None, [LINES[0], "What"])
    with pytest.raises(jcl.UsageError, match="examples is empty"):
        given_probes(None, [])


def test_another_answer_is_another_digest():
    first, other = ([{"prompt": "p", "answer": answer}] for answer in "ab")
    assert given_probes(["t"], first).digest() != given_probes(["t"], other).digest()
    assert given_probes(["t"], first).digest() != given_probes(["t"]).digest()


def test_an_examples_answer_has_its_own_weight(places):
    tokenizers = tuple(load_tokenizer(jcl.open_base(place)) for place in places[1:])
    plain = as_completion(QUESTIONS[0])
    for item, weight in ((plain, 1.0), (Completion(plain.prompt, plain.answer, taught="answer"), 3.0)):
        (batch,) = make_batches([item], tokenizers, 0.5, example_weight=3.0)
        used = batch.weight > 0
        assert set(batch.weight[used & batch.answer]) == {weight}
        assert set(batch.weight[used & ~batch.answer]) == {0.5}
    with pytest.raises(jcl.UsageError, match=r"example_weight 0\.0"):
        Distill(example_weight=0.0).check()


@pytest.mark.full
def test_where_many_prompts_leave_few_passes_examples_are_used_as_often_as_with_few_prompts(places, monkeypatch):
    few = dataclasses.replace(SMALL, completions=20, answer_tokens=2, passes=None)

    def used(settings):
        """Return how often labelled examples are used in all passes of the fit, and how often other texts are."""
        seen = []

        def spy(items, *given, **named):
            seen.append(items)
            return make_batches(items, *given, **named)

        monkeypatch.setattr("jcrosslora.distill.distillation.make_batches", spy)
        jcl.transfer(*places, settings, prompts=CORPUS, examples=QUESTIONS, effect="never", cache=False)
        passes, counts = settings.course(prompted=True).passes, Counter(seen[0])
        return tuple(
            {passes * counts[item] for item in counts if (item.taught == "answer") is wanted}
            for wanted in (True, False)
        )

    assert used(few)[0] == {8}
    monkeypatch.setattr(settings_module, "_TEXTS", 2 * 20)
    labelled, others = used(few)
    assert labelled == {8}
    assert min(others) == 2
    assert dataclasses.replace(few, passes=2).course(prompted=True).repeats == 1


def test_further_rounds_repeat_all_examples_in_turn():
    examples = [Completion(str(number), "a") for number in range(30)]
    found = [examples_of_round(examples, number, USUAL, {"7"}) for number in range(1, 30)]
    assert {len(one) for one in found} == {-(-29 * ROUND // USUAL)}
    counts = Counter(one.prompt for part in found for one in part)
    assert len(counts) == 29
    assert max(counts.values()) - min(counts.values()) <= 1
    assert examples_of_round([], 1, USUAL) == []


def test_a_plan_finds_examples_from_its_folder_and_aligns_other_ones_apart(tmp_path):
    path = tmp_path / "plan.toml"
    moves = [f'[[moves]]\nfrom = "a"\nto = "b"\nlabel = "{name}"\nexamples = "{name}.jsonl"\n' for name in ("x", "y")]
    bases = 'out = "moved"\n[bases]\na = "org/a"\nb = "org/b"\n[adapters]\na = ["org/adapter"]\n'
    path.write_text(bases + "".join(moves))
    jobs = read_plan(path).jobs
    assert [job.settings.examples for job in jobs] == [str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")]
    assert len(units_of(jobs)) == 2


@pytest.mark.parametrize(
    ("prompts", "examples", "completions", "wanted"),
    [
        (200, 0, None, 200),
        (150, 50, None, 150),
        (199, 0, None, 300),
        (8, 300, None, 300),
        (250, 0, 900, 900),
        (400, 0, 300, 300),
        (400, 0, None, 400),
        (4000, 0, None, 1000),
    ],
)
def test_with_enough_prompts_no_others_are_made_up(prompts, examples, completions, wanted):
    assert Distill(completions=completions).for_prompts(prompts, examples).completions == wanted


def test_an_estimate_of_examples_alone_has_no_search_and_the_passes_of_prompts(places):
    labelled = [{"prompt": f"Question {number}?", "answer": "yes"} for number in range(60)]
    plan = Plan(Distill(), jcl.open_base(places[2]), Adapter({}))
    costs = [Distill().cost(one) for one in (plan, dataclasses.replace(plan, given=given_probes(None, labelled)))]
    alone, labelled = ({name: cost.texts for name, cost in found.items()} for found in costs)
    assert labelled["write completions"] < alone["write completions"]
    steps = [found["fit"].stepped for found in costs]
    assert steps[1] > 2 * steps[0]
