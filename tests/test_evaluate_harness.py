"""The model class for lm-evaluation-harness against the harness's own torch model, and against our scorer."""

import dataclasses
import functools
import json
import socket

import numpy as np
import pytest
from command_line import main
from harness_models import (
    PROMPT,
    TaskManager,
    adapter_of,
    get_model,
    lm_eval,
    requests,
    torch_lm,
    write_tiny,
    written_tokens,
)
from real_models import real_model

from jcrosslora.adapter import TokenUpdate, save_adapter
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import AdapterError, CheckpointError, UsageError
from jcrosslora.evaluate import read_task, score
from jcrosslora.evaluate.harness import JCrossLoRALM
from jcrosslora.evaluate.harness_tasks import Tasks

SAME = {"atol": 1e-4, "rtol": 1e-5}
LENGTH = 16
PAIRS = [
    (PROMPT, " the sun"),
    (PROMPT, " a star in"),
    (PROMPT + "  ", "the sun"),  # the spaces are the continuation's
    (PROMPT + " the moon\n", "a"),
    ("", "the sun"),
    ("", "<s>the sun"),
    ("<s>the sun", " the"),
    ("é 日本", "日 the"),
    ("the moon, " * 9, "the moon"),  # too long
]
QUESTIONS = [
    {"question": "which of these is it?", "choices": ["the sun", "a star in the river", "a stone"], "answer": 0},
    {"question": "is it é 日本 or the moon?", "choices": ["日本語", "él"], "answer": 1},
    {"question": "is it the moon or a star?", "choices": ["the", "the sun", "x", "a star"], "answer": 3},
]

REAL_QUESTIONS = [
    {"question": question, "choices": choices.split("; "), "answer": answer}
    for question, choices, answer in (
        ("Which of these is a planet?", "the Sun; Mars; the Moon; a comet", 1),
        ("What do plants take in from the air?", "carbon dioxide; helium; sand; salt", 0),
        ("At which temperature does water boil?", "0 degrees; 20 degrees; 50 degrees; 100 degrees Celsius", 3),
        ("Which animal lays eggs?", "a dog; a horse; a hen", 2),
        ("What is needed to see an object?", "light; sound; heat; a magnet", 0),
        ("Which of these is a liquid at room temperature?", "iron; water; oxygen; salt", 1),
        ("What pulls a falling stone to the ground?", "gravity; friction; the wind; electricity; magnetism", 0),
        ("Which part of a plant takes up water?", "the flower; the leaf; the roots; the seed", 2),
        ("What does the heart do?", "digests food; thinks; breathes; pumps blood through the body", 3),
        ("Which of these conducts electricity best?", "copper wire; wood; glass; rubber", 0),
    )
]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def both(request, tmp_path_factory):
    """Our model and the harness's, of a base with an adapter; the second tokenizer puts bos in front."""
    folder = write_tiny(tmp_path_factory.mktemp("both"), request.param)
    ours = JCrossLoRALM(folder, adapter_of(folder), max_length=LENGTH, batch_tokens=1)
    return ours, torch_lm(folder, adapter_of(folder), max_length=LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("folder"), "byte-level")


def test_log_likelihoods_are_those_of_the_harness(both):
    ours, theirs = both
    found, wanted = (lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for lm in both)
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], **SAME)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    # The harness's model has no tokens for a context of spaces alone; they are the continuation's in ours.
    spaces = ours.loglikelihood(requests("loglikelihood", [(" ", "the sun"), ("", " the sun")]), disable_tqdm=True)
    assert spaces[0] == pytest.approx(spaces[1])
    assert (ours.prefix_token_id, ours.eot_token_id, ours.max_gen_toks) == (1, 2, 256)
    assert (theirs.prefix_token_id, theirs.eot_token_id, theirs.max_gen_toks) == (1, 2, 256)


def test_a_continuation_is_greedy_when_every_token_is_the_likeliest(both):
    ours, theirs = both
    context = ours.tok_encode(PROMPT)[:8]
    written = written_tokens(theirs, context, 6)
    others = [[*written[:place], (written[place] + 1) % 330, *written[place + 1 :]] for place in (0, 3, 5)]
    asked = [(("", ""), context, each) for each in (written, written[:1], *others)]
    found, wanted = (lm._loglikelihood_tokens(asked, disable_tqdm=True) for lm in both)
    assert [greedy for _, greedy in found] == [True, True, False, False, False]
    assert [greedy for _, greedy in wanted] == [True, True, False, False, False]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], **SAME)


def test_long_texts_are_scored_in_windows_and_without_bos(both):
    ours, theirs = both
    asked = requests("loglikelihood_rolling", ["é 日", "the moon, a star or a wet stone in the river " * 2])
    assert len(ours.tok_encode(asked[1].args[0])) > LENGTH
    theirs.add_bos_token = False
    wanted = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    theirs.add_bos_token = None
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked, disable_tqdm=True), wanted, **SAME)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", [""]), disable_tqdm=True) == [0]


def test_the_size_of_a_batch_does_not_matter(folder):
    texts = [(f"Question: {each['question']}\nAnswer:", f" {each['choices'][0]}") for each in QUESTIONS]
    asked = requests("loglikelihood", texts)
    lms = [JCrossLoRALM(folder, adapter_of(folder), batch_tokens=size) for size in (1, 4096)]
    one, other = (lm.loglikelihood(asked, disable_tqdm=True) for lm in lms)
    np.testing.assert_allclose([value for value, _ in one], [value for value, _ in other], **SAME)


def write_tasks(folder, lines):
    """A task of questions and one of text to write, as YAML files."""
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"data_files": {"test": str(folder / "task.jsonl")}, "cache_dir": str(folder / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    shared["doc_to_text"] = "Question: {{question}}\nAnswer:"
    asked = {
        "task": "tiny_questions",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    written = {
        "task": "tiny_texts",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (asked, written):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(shared | task))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model, manager, tasks, **settings):
    settings = {"bootstrap_iters": 0, "log_samples": True} | settings
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, **settings)


def check_against_our_scores(found, scores):
    """Log-likelihoods, accuracy and accuracy by length of the harness are ours."""
    for sample in found["samples"]["tiny_questions"]:
        values = [float(value) for value, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(values, scores.log_probs[-1, sample["doc_id"], : len(values)], **SAME)
    figures = found["results"]["tiny_questions"]
    assert figures["acc,none"] == pytest.approx(scores.accuracy()[-1])
    assert figures["acc_norm,none"] == pytest.approx(scores.accuracy_norm()[-1])


def test_a_local_task_runs_without_network_and_agrees_with_our_scorer(folder, tmp_path, monkeypatch):
    def refuse(*_):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    manager = write_tasks(tmp_path, QUESTIONS)
    saved = save_adapter(adapter_of(folder), tmp_path / "adapter", base_name="tiny")
    settings = {"base": str(folder), "adapter": str(saved), "batch_tokens": 50}
    found = evaluated("jcrosslora", manager, ["tiny_questions", "tiny_texts"], model_args=settings, batch_size=1)
    check_against_our_scores(found, score(folder, tmp_path / "task.jsonl", [saved]))
    assert found["results"]["tiny_texts"]["exact_match,none"] == 0
    assert found["config"]["adapter"]
    assert get_model("jcrosslora") is JCrossLoRALM


def test_the_command_judges_base_and_adapters_by_tasks_as_the_harness_does(folder, tmp_path, capsys):
    manager = write_tasks(tmp_path, QUESTIONS)
    saved = save_adapter(adapter_of(folder), tmp_path / "adapter", base_name="tiny")
    names = ["tiny_questions", "tiny_texts"]
    command = ["evaluate", "--base", str(folder), "--adapter", str(saved), "--tasks", "tiny_q*,tiny_texts"]
    command += ["--include-path", str(tmp_path), "--limit", "2", "--num-fewshot", "1"]
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    settings = {"limit": 2, "num_fewshot": 1, "bootstrap_iters": 100}
    both = [evaluated(JCrossLoRALM(folder, one), manager, names, **settings) for one in (None, saved)]
    figures = {(one["task"], one["metric"]): one for one in found["tasks"]}
    wanted = [("tiny_questions", "acc"), ("tiny_questions", "acc_norm"), ("tiny_texts", "exact_match")]
    assert list(figures) == wanted
    for (task, metric), figure in figures.items():
        assert (figure["examples"], figure["shots"]) == (2, 1)
        for model, one in zip(figure["models"], both, strict=True):
            figures_there = one["results"][task]
            assert model["value"] == figures_there[f"{metric},none"]
            assert model["stderr"] == pytest.approx(figures_there[f"{metric}_stderr,none"])
    assert [model["name"] for model in figures[wanted[0]]["models"]] == [folder.name, "adapter"]
    assert found["digest"] == open_base(folder).digest()
    capsys.readouterr()
    main(command)
    printed = capsys.readouterr()
    assert "Tokenizing" not in printed.err  # a bar of the harness's own
    row = next(line.split() for line in printed.out.splitlines() if "acc_norm" in line)
    value = figures[wanted[1]]["models"][1]
    assert row == [
        "tiny_questions",
        "2",
        "1",
        "acc_norm",
        *row[4:7],
        f"{value['value']:.3f}",
        "±",
        f"{value['stderr']:.3f}",
    ]


MINE = ["--include-path", "."]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            [*MINE, "--tasks", "tiny_question"],
            "task 'tiny_question' is unknown to lm_eval (did you mean 'tiny_questions'?)",
        ),
        ([*MINE, "--tasks", "tiny_questions"], "task 'tiny_questions' cannot be loaded (FileNotFoundError"),
        (["--tasks", ","], "no task was named"),
        (["--tasks", "tiny_questions", "--include-path", "nowhere"], "include-path nowhere: is no folder"),
        (["--tasks", "task.jsonl"], "task.jsonl is a file: give it with --data"),
    ],
)
def test_tasks_that_cannot_be_run_are_one_line(folder, tmp_path, capsys, monkeypatch, flags, said):
    # lm_eval's own tasks take 10 s to list.
    of_all = functools.partial(write_tasks(tmp_path, QUESTIONS).__class__, include_path=str(tmp_path))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: of_all(include_defaults=False))
    monkeypatch.setattr("jcrosslora.evaluate.harness_tasks.reaches_hub", lambda: True)
    monkeypatch.chdir(tmp_path)
    if "FileNotFound" in said:
        (tmp_path / "task.jsonl").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--base", str(folder), *flags])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error


def test_a_misspelt_task_is_refused_before_lm_eval_lists_its_tasks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--base", str(tmp_path / "not opened"), "--tasks", "arc_*,hellaswagg"])
    assert stopped.value.code == 2
    assert "task 'hellaswagg' is unknown to lm_eval (did you mean 'hellaswag'?)" in capsys.readouterr().err


@pytest.mark.full
def test_every_task_that_lm_eval_lists_is_taken():
    assert len(Tasks(TaskManager().all_tasks).names) > 1000


def test_requests_that_cannot_be_scored_are_refused(both):
    ours, _ = both
    with pytest.raises(UsageError, match="is empty"):
        ours.loglikelihood(requests("loglikelihood", [("", "")]), disable_tqdm=True)
    with pytest.raises(UsageError, match="wanted 1 to 16"):
        ours.loglikelihood(requests("loglikelihood", [(PROMPT, " the moon" * 40)]), disable_tqdm=True)
    with pytest.raises(UsageError, match="the model reads 16"):
        ours.generate_until(requests("generate_until", [(PROMPT, {"max_gen_toks": 16})]), disable_tqdm=True)
    with pytest.raises(UsageError, match="chat templates"):
        ours.apply_chat_template([{"role": "user", "content": "the sun"}])


def test_changes_of_the_embedding_are_logged_as_not_scored(folder, caplog):
    update = TokenUpdate("tied", "tokens", 330, np.array([5]), rows=np.ones((1, 48), np.float32), share=0.25)
    JCrossLoRALM(folder, dataclasses.replace(adapter_of(folder), tokens=(update,)), batch_tokens=1)
    assert "not scored" in caplog.text
    assert "25.0%" in caplog.text


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    adapter = adapter_of(folder)
    next(iter(adapter.modules.values())).b[:] = np.nan
    asked = requests("loglikelihood", PAIRS[:1])
    with pytest.raises(AdapterError, match="not finite"):
        JCrossLoRALM(folder, adapter, batch_tokens=1).loglikelihood(asked, disable_tqdm=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        JCrossLoRALM(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_agrees_with_our_scorer(tmp_path):
    base = open_base(real_model("SmolLM2-135M-Instruct.Q4_1.gguf"))
    manager = write_tasks(tmp_path, REAL_QUESTIONS)
    found = evaluated(JCrossLoRALM(base), manager, ["tiny_questions"])
    scores = score(base, read_task(tmp_path / "task.jsonl"))
    check_against_our_scores(found, scores)
    assert scores.accuracy()[0] > 0.5
