"""The model for lm_eval against lm_eval's own torch model and against our scorer, and `evaluate --tasks`."""

import dataclasses
import importlib
import json
import runpy
import shutil
import socket
import subprocess
import sys

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
from probe_bases import write_base
from real_models import real_model

from jcrosslora.adapter import TokenUpdate, save_adapter
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import AdapterError, CheckpointError, UsageError
from jcrosslora.evaluate import read_task, score
from jcrosslora.evaluate.harness import Generation, JCrossLoRALM, read_generation

MODULE = "jcrosslora.evaluate.harness"
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
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id) == (1, 2)
    assert Generation().length == theirs.max_gen_toks


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


@pytest.mark.parametrize(
    ("tasks", "folder_of_tasks", "said"),
    [
        ("tiny_question", ".", "task 'tiny_question' is unknown to lm_eval (did you mean 'tiny_questions'?)"),
        ("tiny_questions", ".", "task 'tiny_questions' cannot be loaded (FileNotFoundError"),
        (",", ".", "task '' is unknown to lm_eval"),
        ("tiny_questions", "nowhere", "include-path nowhere: expected the folder of your task files"),
    ],
)
def test_tasks_that_cannot_be_run_are_one_line(folder, tmp_path, capsys, monkeypatch, tasks, folder_of_tasks, said):
    # lm_eval's own tasks take 10 s to list.
    monkeypatch.setattr(f"{MODULE}.TaskManager", lambda **given: TaskManager(**given | {"include_defaults": False}))
    monkeypatch.setattr(f"{MODULE}.reaches_hub", lambda: True)
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path, QUESTIONS)
    (tmp_path / "task.jsonl").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--base", str(folder), "--tasks", tasks, "--include-path", folder_of_tasks])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error


def test_requests_that_cannot_be_scored_are_refused(both):
    ours, _ = both
    with pytest.raises(UsageError, match="has 0 tokens; expected 1 to 16"):
        ours.loglikelihood(requests("loglikelihood", [(PROMPT, "")]), disable_tqdm=True)
    with pytest.raises(UsageError, match="expected 1 to 16"):
        ours.loglikelihood(requests("loglikelihood", [(PROMPT, " the moon" * 40)]), disable_tqdm=True)
    with pytest.raises(UsageError, match="expected less than the max_length, 16"):
        ours.generate_until(requests("generate_until", [(PROMPT, {"max_gen_toks": 16})]), disable_tqdm=True)


def test_chat_templates_are_refused(both, tmp_path):
    manager = write_tasks(tmp_path, QUESTIONS)
    with pytest.raises(UsageError, match="chat templates"):
        evaluated(both[0], manager, ["tiny_questions"], apply_chat_template=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"sead": 1}, "has no setting sead"),
        ({"seed": 1 << 32}, "seed 4294967296"),
        ({"max_length": 0}, "max_length is 0"),
        ({"prefix_token_id": 330}, "prefix_token_id is 330; expected 0 to 329"),
    ],
)
def test_settings_of_the_model_are_checked(folder, settings, said):
    with pytest.raises(UsageError, match=said):
        JCrossLoRALM(folder, **settings)


def test_changes_of_the_embedding_are_logged_as_not_scored(folder, caplog):
    update = TokenUpdate("tied", "tokens", 330, np.array([5]), rows=np.ones((1, 48), np.float32), share=0.25)
    JCrossLoRALM(folder, dataclasses.replace(adapter_of(folder), tokens=(update,)), batch_tokens=1)
    assert "not scored" in caplog.text
    assert "25.0%" in caplog.text


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    adapter = adapter_of(folder)
    next(iter(adapter.modules.values())).b[:] = 3e38
    asked = requests("loglikelihood", PAIRS[:1])
    with pytest.raises(AdapterError, match="not finite"):
        JCrossLoRALM(folder, adapter, batch_tokens=1).loglikelihood(asked, disable_tqdm=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        JCrossLoRALM(tmp_path / "none")


def test_generation_ends_at_stop_strings_as_in_the_harness(folder):
    ours, theirs = JCrossLoRALM(folder, adapter_of(folder)), torch_lm(folder, adapter_of(folder))
    length = {"max_gen_toks": 40, "do_sample": False}
    (text,) = theirs.generate_until(requests("generate_until", [(PROMPT, length)]), disable_tqdm=True)
    readable = [text[start : start + size] for size in (1, 2) for start in range(0, len(text) - 1, 3)]
    stops = [[stop] for stop in dict.fromkeys(readable) if "\ufffd" not in stop]
    assert len(stops) > 5
    asked = [(PROMPT, length | {"until": until}) for until in [*stops, [], stops[3] + stops[0], ["nowhere"]]]
    asked += [("the star", {"max_gen_toks": 40, "until": stops[0]}), ("", {"max_gen_toks": 40, "until": stops[1]})]
    # The harness's model cannot write without a prompt: it gets the bos that ours puts there.
    given = [(context or "<s>", options) for context, options in asked]
    found = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == theirs.generate_until(requests("generate_until", given), disable_tqdm=True)
    assert len(set(map(len, found))) > 5


def test_generation_ends_at_eos_and_at_names_of_special_tokens(folder, tmp_path):
    theirs = torch_lm(folder, adapter_of(folder))
    written = written_tokens(theirs, theirs.tok_encode(PROMPT), 40)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {index: name for name, index in tokenizer["model"]["vocab"].items()}
    place = next(place for place, token in enumerate(written) if place and names[token] in "!#$%&{|}~^@VZXNMF")
    wanted = theirs.tokenizer.decode(written[:place])
    changed = shutil.copytree(folder, tmp_path / "eos")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"eos_token_id": written[place]}))
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40})])
    assert JCrossLoRALM(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True) == [wanted]
    # The same token as a special one, which the text would not show.
    name = names[written[place]]
    special = {"id": written[place], "content": name, "special": True, "normalized": False}
    sides = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(special | sides)
    marked = shutil.copytree(folder, tmp_path / "special")
    (marked / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40, "until": [name]})])
    assert JCrossLoRALM(marked, adapter_of(folder)).generate_until(asked, disable_tqdm=True) == [wanted]


def test_generation_goes_on_after_a_turn_that_the_files_do_not_state_as_an_end(folder, tmp_path):
    theirs = torch_lm(folder, adapter_of(folder))
    written = written_tokens(theirs, theirs.tok_encode(PROMPT), 40)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {index: name for name, index in tokenizer["model"]["vocab"].items()}
    turn = next(token for token in written[1:] if names[token] in "!#$%&{|}~^@VZXNMF")
    end = {"id": turn, "content": "<|im_end|>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append(end | {"single_word": False, "lstrip": False, "rstrip": False})
    tokenizer["model"]["vocab"]["<|im_end|>"] = tokenizer["model"]["vocab"].pop(names[turn])
    changed = shutil.copytree(folder, tmp_path / "turns")
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40})])
    (text,) = JCrossLoRALM(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    assert [text] == torch_lm(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    (changed / "generation_config.json").write_text(json.dumps({"eos_token_id": turn}))
    (ended,) = JCrossLoRALM(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    assert [ended] == torch_lm(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    assert len(ended) < len(text)


def test_sampled_texts_follow_the_seed(folder):
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40, "do_sample": True, "temperature": 1.0})] * 2)
    lms = [JCrossLoRALM(folder, adapter_of(folder), seed=seed, batch_tokens=1) for seed in (0, 0, 1)]
    one, again, other = (lm.generate_until(asked, disable_tqdm=True) for lm in lms)
    assert one == again
    assert len({*one, *other}) == 4


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Generation((), 256, 0.0)),
        ({"until": "\n", "max_gen_toks": 5}, Generation(("\n",), 5, 0.0)),
        ({"until": ["a", "", "b"], "max_new_tokens": 7, "max_tokens": 9}, Generation(("a", "b"), 7, 0.0)),
        ({"until": None, "max_gen_toks": None, "max_tokens": 9}, Generation((), 9, 0.0)),
        ({"do_sample": False, "temperature": 0.7}, Generation((), 256, 0.0)),
        ({"do_sample": True, "temperature": 1}, Generation((), 256, 1.0)),
        ({"temperature": 0.5}, Generation((), 256, 0.5)),
        ({"do_sample": False, "top_p": 0.9, "top_k": 50, "num_beams": 1}, Generation()),
        ({"temperature": 0.5, "top_p": 1.0, "top_k": 0}, Generation((), 256, 0.5)),
    ],
)
def test_settings_are_read_as_the_harness_reads_them(given, wanted):
    assert read_generation(given) == wanted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_gen_toks": 0}, "{'max_gen_toks': 0}: expected 1 token or more"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "could not convert string to float: 'hot'"),
        ({"do_sample": True}, "above 0 with do_sample"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "top_p is 0.9"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 50}, "top_k is 50"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
    ],
)
def test_settings_that_are_not_supported_are_named(given, named):
    with pytest.raises(UsageError, match="generation setting") as caught:
        read_generation(given)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "neither --data nor --tasks was given"),
        (["--data", "a.jsonl", "--tasks", "arc_easy"], "both --data and --tasks were given"),
        (["--tasks", "arc_easy", "--show", "3"], "--show is not for --tasks"),
        (["--data", "a.jsonl", "--num-fewshot", "3"], "--num-fewshot is not for --data"),
        (["--tasks", "arc_easy", "--num-fewshot", "-1"], "num-fewshot -1 is out of range"),
        (["--tasks", "arc_easy", "--limit", "0"], "limit 0 is out of range"),
        (["--task", "arc_easy"], "--task is unknown (did you mean --data?)"),
        (["--tasks", "arc_easy"], "no base was given"),
    ],
)
def test_a_file_and_names_of_tasks_are_alternatives(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *flags])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error


@pytest.fixture
def without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, MODULE)


def test_without_lm_eval_the_extra_is_named(without_lm_eval, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"pip install 'jcrosslora\[eval\]'"):
        importlib.import_module(MODULE)
    write_base(tmp_path / "base", 60)
    flags = ["--base", str(tmp_path / "base"), "--tasks", "arc_easy"]
    for run in (lambda: runpy.run_module(MODULE, run_name="__main__"), lambda: main(["evaluate", *flags])):
        with pytest.raises(SystemExit) as stopped:
            run()
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1)
        assert error.startswith("jcrosslora: ")
        assert "pip install 'jcrosslora[eval]'" in error


def test_the_package_does_not_import_lm_eval():
    lines = (
        "import jcrosslora.cli.evaluate, jcrosslora.evaluate, sys; print({'lm_eval', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.slow  # lm_eval lists its tasks
def test_the_command_of_lm_eval_has_our_model(folder, tmp_path):
    write_tasks(tmp_path, QUESTIONS)
    command = [sys.executable, "-m", MODULE, "run", "--model", "jcrosslora", "--tasks", "tiny_questions"]
    command += ["--include_path", str(tmp_path), "--limit", "1", "--model_args"]
    found = subprocess.run([*command, f"base={folder}"], capture_output=True, text=True, check=True)
    assert "|tiny_questions|" in found.stdout
    refused = subprocess.run([*command, f"base={tmp_path / 'none'}"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("jcrosslora: ")


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_agrees_with_our_scorer(tmp_path):
    base = open_base(real_model("SmolLM2-135M-Instruct.Q4_1.gguf"))
    manager = write_tasks(tmp_path, REAL_QUESTIONS)
    found = evaluated(JCrossLoRALM(base), manager, ["tiny_questions"])
    scores = score(base, read_task(tmp_path / "task.jsonl"))
    check_against_our_scores(found, scores)
    assert scores.accuracy()[0] > 0.5
