"""The lift table: its statistics by hand, what is kept between runs, tasks, the merged base, and a whole tiny run."""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from probe_bases import QUESTIONS, write_base
from rich.console import Console
from tiny_bases import random_adapter

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import compare_methods
import fetch_tasks
import lift
import lift_scores
import lift_table
import lift_tasks
import lift_work
import templates
import written_task

import jcrosslora as jcl
from jcrosslora.adapter import save_adapter
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import Generator, load_model
from jcrosslora.distill import TEMPLATES
from jcrosslora.evaluate import Scores, lift_recovered
from jcrosslora.text import Completion
from jcrosslora.training import TrainingSettings


def figures(seed: int, count: int = 200):
    """NLL of a base, of two seeds' trained adapters, which gain 1, and of two moved ones, which gain 0.5 and 0.3."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(2, 4, count)
    noise = rng.normal(0, 0.2, (4, count))
    return base, base - 1 + noise[:2], base - np.array([[0.5], [0.3]]) + noise[2:]


# Statistics


def test_lift_of_one_seed_is_that_of_the_package():
    base, trained, moved = figures(0)
    found, wanted = lift_table.lift(base, moved[:1], trained[:1]), lift_recovered(base, moved[0], trained[0])
    assert found is not None
    assert found.deviation is None
    np.testing.assert_allclose(list(vars(found.interval).values()), list(vars(wanted).values()), rtol=1e-12)


def test_lift_is_the_mean_of_the_seeds_ratios_with_a_spread():
    base, trained, moved = figures(1)
    found = lift_table.lift(base, moved, trained)
    ratios = [(base.mean() - moved[s].mean()) / (base.mean() - trained[s].mean()) for s in range(2)]
    assert found is not None
    assert found.interval.value == pytest.approx(np.mean(ratios))
    assert found.deviation == pytest.approx(abs(ratios[0] - ratios[1]) / np.sqrt(2))
    assert found.interval.low < found.interval.value < found.interval.high
    # Pairing: the noise of 2 seeds leaves an interval far below that of the base's own spread over questions.
    assert found.interval.high - found.interval.low < 0.1


@pytest.mark.full
def test_the_interval_of_lift_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(100):
        found = lift_table.lift(*(figures(seed)[i] for i in (0, 2, 1)), draws=400)
        assert found is not None
        inside += not found.interval.excludes(0.4)
    assert inside >= 88


def test_no_lift_where_training_gained_nothing():
    base, _, moved = figures(2)
    assert lift_table.lift(base, moved, np.stack([base + 0.0, base - 1])) is None
    # Half of a loss is no half of a gain.
    assert lift_table.lift(base, np.stack([base + 0.5, base - 1]), np.stack([base + 1.0, base - 1])) is None


def sheet_of(accuracy: np.ndarray):
    base, trained, moved = figures(3, accuracy.size)
    plain = np.tile([1.0, 1.0, 1.0, 0.0], accuracy.size // 4)
    rows = {
        name: {"nll_pooled": nll, "nll_per_char": nll, "accuracy": np.broadcast_to(right, nll.shape)}
        for name, nll, right in (
            (lift_table.BASE, np.stack([base, base]), plain),
            (lift_table.ORACLE, trained, plain),
            ("theseus", moved, accuracy),
        )
    }
    return lift_table.make_sheet("task", rows, {"copy|x": "shapes differ"}, ["accuracy"])


@pytest.mark.full
def test_the_table_flags_accuracy_below_the_base_and_lists_what_is_not_defined():
    worse = sheet_of(np.tile([1.0, 0.0, 0.0, 0.0], 50))
    theseus = next(row for row in worse.rows if row[0] == "theseus")
    assert theseus[-1] == "accuracy BELOW BASE"
    assert theseus[2].startswith("0.4")
    assert " sd 0." in theseus[2]
    assert theseus[5].startswith("-0.500 [-0.5")
    assert worse.rows[1][2].startswith("1.000 [1.000, 1.000]")
    assert worse.rows[-1] == ("copy|x", *["-"] * 5, "not defined")
    assert worse.notes == ["copy|x is not defined: shapes differ"]
    assert {len(row) for row in worse.rows} == {len(worse.header)}
    same = sheet_of(np.tile([1.0, 1.0, 1.0, 0.0], 50))
    assert same.rows[2][-1] == ""


def test_markdown_has_the_command_on_top_and_bars_escaped(tmp_path):
    path = tmp_path / "new" / "table.md"
    lift_table.write_markdown(path, [sheet_of(np.ones(200))], "python lift.py --x")
    text = path.read_text()
    assert text.startswith("Made by\n\n```sh\npython lift.py --x\n```\n")
    assert "| copy\\|x | - |" in text
    assert text.endswith("copy|x is not defined: shapes differ\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    assert [entry.name for entry in path.parent.iterdir()] == ["table.md"]


# What is kept


def test_rows_that_are_behind_are_scored_first():
    step = lift_scores._PART
    assert lift_scores.next_group({"base": 0, "a": 0}, 10) == (0, 10, ["base", "a"])
    assert lift_scores.next_group({"base": step, "a": 7}, 3 * step) == (7, step, ["a"])
    assert lift_scores.next_group({"base": step, "a": 0}, 3 * step) == (0, step, ["a"])
    assert lift_scores.next_group({"base": step, "a": step}, 3 * step) == (step, 2 * step, ["base", "a"])
    assert lift_scores.next_group({"base": 20, "a": 12}, 12) is None


def test_arrays_are_read_back_only_with_the_same_digests(tmp_path):
    path = tmp_path / "scores" / "row.npz"
    assert lift_scores.read_arrays(path, "this") == {}
    lift_scores.write_arrays(path, "this", {"tokens": np.arange(3)})
    assert lift_scores.read_arrays(path, "this")["tokens"].tolist() == [0, 1, 2]
    assert lift_scores.read_arrays(path, "that") == {}
    assert [entry.name for entry in path.parent.iterdir()] == ["row.npz"]
    whole = path.read_bytes()
    for damaged in (b"PK broken", whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(jcl.UsageError, match=r"row\.npz: cannot be read .* remove it"):
            lift_scores.read_arrays(path, "this")


@pytest.mark.full
def test_scoring_continues_where_it_stopped(folders, tmp_path, monkeypatch):
    adapter = save_adapter(random_adapter(jcl.open_base(folders[0]), scale=0.02), tmp_path / "adapter")
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(lift_scores, "_PART", 2)

    def score(base, questions, adapters, **rest):
        if len(calls) == 1:
            calls.append((0, 0))
            raise KeyboardInterrupt
        calls.append((QUESTIONS.index(questions[0]), len(adapters)))
        tokens = np.zeros((len(questions), max(len(one.choices) for one in questions)), np.int64)
        for row, question in zip(tokens, questions, strict=True):
            row[: len(question.choices)] = [len(choice) for choice in question.choices]
        log_probs = np.stack([-1.0 * tokens, *[-2.0 * tokens] * len(adapters)])
        return Scores.of(["x"] * (len(adapters) + 1), questions, np.where(tokens > 0, log_probs, np.nan), tokens)

    def figures(adapters, limit=None):
        return lift_scores.Scorer(str(folders[0]), QUESTIONS, tmp_path / "scores").figures(adapters, limit)

    monkeypatch.setattr(lift_scores, "score", score)
    with pytest.raises(KeyboardInterrupt):
        figures({"oracle": adapter})
    found = figures({"oracle": adapter, "late": adapter})
    # The late one catches up, then all run together; the base is there anyway.
    assert calls == [(0, 1), (0, 0), (0, 1), (2, 2)]
    assert found["base"]["nll_per_char"].tolist() == [1, 1, 1, 1]
    assert found["late"]["nll_per_char"].tolist() == found["oracle"]["nll_per_char"].tolist() == [2, 2, 2, 2]
    assert figures({"oracle": adapter}, limit=3)["oracle"]["accuracy"].shape == (3,)
    assert len(calls) == 4
    # Another adapter under the same name is scored anew.
    other = save_adapter(random_adapter(jcl.open_base(folders[0]), seed=1, scale=0.02), tmp_path / "other")
    figures({"oracle": other}, limit=2)
    assert calls[4:] == [(0, 1)]


@pytest.fixture
def dora(folders, tmp_path):
    """An adapter that is no update without its base."""
    base, path = jcl.open_base(folders[0]), tmp_path / "dora"
    save_adapter(random_adapter(base, rank=2, scale=0.02, roles=("q_proj",)), path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_B" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        magnitudes = 1.1 * np.linalg.norm(base.weight(name), axis=1)
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = magnitudes.astype(np.float32)
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.full
def test_adapters_are_read_with_their_base(folders, dora, tmp_path, monkeypatch, capsys):
    found = lift_scores.Scorer(str(folders[0]), QUESTIONS, tmp_path / "scores").figures({"oracle": dora}, 1)
    assert found["oracle"]["nll_per_char"] != found["base"]["nll_per_char"]
    monkeypatch.setattr(
        templates, "write_pilot", lambda *_: [Completion("Q: Who?\nA:", " Anna", origin=TEMPLATES[1].name)] * 2
    )
    wanted = argparse.Namespace(base=str(folders[0]), adapter=[str(dora)], each=1, seed=0)
    templates.run(wanted)
    assert "Q:" in capsys.readouterr().out
    monkeypatch.setattr(templates, "write_pilot", lambda *_: [])
    with pytest.raises(jcl.MethodError, match="wrote no completions: give a larger --each than 1"):
        templates.run(wanted)


# Tasks and rows


@pytest.fixture
def task_files(tmp_path):
    paths = tmp_path / "small_train.jsonl", tmp_path / "small_test.jsonl"
    for path in paths:
        fetch_tasks.write_lines(path, [dataclasses.asdict(question) for question in QUESTIONS])
    return paths


def test_300_questions_of_a_long_train_file_are_left(task_files):
    path = task_files[0].with_name("long_train.jsonl")
    fetch_tasks.write_lines(path, [dataclasses.asdict(question) for question in QUESTIONS * 500])
    firsts = [lift_tasks.load_task(path, task_files[1], first=first, written=False).first for first in (1600, 1900)]
    assert firsts == [1600, 1700]


def test_a_quarter_of_the_train_file_is_left(task_files):
    task = lift_tasks.load_task(*task_files, first=1200, written=False)
    assert (task.name, len(task.examples)) == ("small", 3)
    assert task.prompts(1) == ["Question: What jumps?\nAnswer:"]
    assert task.questions("test", 1) == QUESTIONS
    assert task.questions("train-rest", 0) == QUESTIONS[3:]
    with pytest.raises(jcl.UsageError, match="use up its 4 train questions"):
        task.questions("train-rest", 1)
    with pytest.raises(jcl.UsageError, match="has 1 train questions behind the first 3, 2 prompts expected"):
        task.prompts(2)
    with pytest.raises(jcl.UsageError, match="first 0"):
        lift_tasks.load_task(*task_files, first=0, written=False)


def test_a_changed_text_file_makes_another_row(tmp_path):
    path = tmp_path / "news.txt"
    path.write_text("One.")
    row = lift_tasks.parse_row("theseus", file=path)
    first = row.slug
    assert first == row.slug
    path.write_text("Two.")
    assert row.slug != first
    assert row.slug.startswith("theseus-on-news-")


def test_rows():
    row = lift_tasks.parse_row("cross-lora:svd_rank=64,calibrate=none,depth=by-name", 200)
    assert row.settings == {"method": "cross-lora", "svd_rank": 64, "calibrate": "none", "depth": "by-name"}
    assert row.name == "cross-lora:svd_rank=64,calibrate=none,depth=by-name, 200 prompts"
    assert row.slug == "cross-lora-svd_rank=64-calibrate=none-depth=by-name-200-prompts"
    texted = lift_tasks.parse_row("theseus:whitening=0.2", file=Path("some/news.txt"))
    assert (texted.name, texted.text) == ("theseus:whitening=0.2, on news", Path("some/news.txt"))
    assert lift_tasks.parse_row("theseus") == lift_tasks.Row("theseus", {"method": "theseus"})
    for bad in ("theseus:seed=1", "theseus:whitening", "theseus:speed=2"):
        with pytest.raises(jcl.UsageError, match=f"--method {bad}: expected KEY=VALUE"):
            lift_tasks.parse_row(bad)
    assert lift_tasks.parse_row("copy:scale=2,out_rank=auto").settings == {"method": "copy", "scale": 2.0} | {
        "out_rank": "auto"
    }
    for bad, wanted in (("cross-lora:svd_rank=many", "svd_rank to 'many'"), ("copy:calibrate=1", "calibrate to 1")):
        with pytest.raises(jcl.UsageError, match=f"--method {bad} sets {wanted}; it must be"):
            lift_tasks.parse_row(bad)
    with pytest.raises(jcl.MethodError, match="'theseuss' is unknown"):
        lift_tasks.parse_row("theseuss:whitening=0.2")
    with pytest.raises(jcl.UsageError, match="method theseus has no setting svd_rank; its settings are whitening"):
        lift_tasks.parse_row("theseus:svd_rank=64")


def test_a_written_example_is_json_and_matched_as_a_whole():
    example = written_task.written_example(QUESTIONS[0])
    assert example.prompt.endswith("Question: Where does Water boil?\n1. in Köln\n2. at 100 degrees\n3. Anna\nReply:")
    assert json.loads(example.choices[example.answer]) == {"option": 2, "text": "at 100 degrees"}
    assert written_task.matches(' {"option": 2, "text": "at 100 degrees"} and more', example)
    assert not written_task.matches('{"option": 1, "text": "at 100 degrees"}', example)


@pytest.mark.parametrize("key", ["question", "question_stem"])
def test_hub_records_become_questions(key):
    record = {"id": "x", key: "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert fetch_tasks.convert(record, "here") == {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    for change in ({"answerKey": "C"}, {"choices": ["a", "b"]}, {"choices": None}):
        with pytest.raises(jcl.UsageError, match="here: is no question of ARC or OpenBookQA"):
            fetch_tasks.convert(record | change, "here")


def test_parquet_needs_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(jcl.UsageError, match="pip install pyarrow"):
        fetch_tasks.read_parquet("file.parquet")


# Bases


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny bases of different widths and tokenizers."""
    root = tmp_path_factory.mktemp("bases")
    small = write_base(root / "small", 60, bos=True, eos=1, layers=2)
    return small, write_base(root / "wide", 90, layers=2, hidden=64, seed=1)


def test_exact_match_compares_the_generated_text(folders, monkeypatch):
    tokenizer, base = load_tokenizer(jcl.open_base(folders[0])), jcl.open_base(folders[0])
    questions = [written_task.written_example(question) for question in QUESTIONS[:3]]
    prompts = [tokenizer.encode(question.prompt).ids.tolist() for question in questions]

    def written(generator, rows, length, temperature, key, *, shape):
        assert [row.tolist() for row in rows] == prompts
        assert temperature == 0
        # The right reply and more; nothing, as the model stops at once; the right reply of another question.
        texts = [f" {questions[0].choices[0]} And", "", f" {questions[0].choices[0]}"]
        found = [tokenizer.encode(text, special=False).ids for text in texts]
        assert length >= max(map(len, found)) - 4
        return found

    monkeypatch.setattr(Generator, "continue_tokens", written)
    model = load_model(base)
    found = written_task.exact_matches(base, questions, None, model, tokenizer)
    assert found.tolist() == [1, 0, 0]


def test_a_trained_adapter_of_other_settings_is_refused(folders, tmp_path):
    made = {**dataclasses.asdict(TrainingSettings(seed=3)), "task": "small", "first": 3}
    header = {"jcrosslora.training": json.dumps({**made, "task": "small_train.jsonl"})}
    path = save_adapter(random_adapter(jcl.open_base(folders[0])), tmp_path / "adapter", metadata=header)
    lift_work.check_same(path, made)
    with pytest.raises(jcl.UsageError, match="was trained with steps 160, 320 is asked for"):
        lift_work.check_same(path, {**made, "steps": 320})
    plain = save_adapter(random_adapter(jcl.open_base(folders[0])), tmp_path / "plain")
    lift_work.check_same(plain, made)
    file = plain / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(jcl.UsageError, match=r"adapter_model.safetensors: cannot be read .*: remove its folder"):
        lift_work.check_same(plain, made)
    file.unlink()
    lift_work.check_same(plain, made)


@pytest.mark.full
def test_a_moved_adapter_of_another_trained_one_is_refused(folders, task_files, tmp_path):
    bases, task = [jcl.open_base(folder) for folder in folders], lift_tasks.load_task(*task_files, 3, written=False)
    work = lift_work.Work(tmp_path, TrainingSettings(), Console())
    pair, row = lift_work.Pair(*(lift_work.Base.of(str(folder)) for folder in folders)), lift_tasks.parse_row("random")
    trained = tmp_path / "trained" / "small--small--seed0"
    save_adapter(random_adapter(bases[0], rank=2), trained)
    moved = work.moved(task, pair, row, 0)
    assert work.moved(task, pair, row, 0) == moved
    save_adapter(random_adapter(bases[0], rank=2, seed=1), trained, overwrite=True)
    with pytest.raises(jcl.UsageError, match=f"{moved}: was not moved from what lies in {trained} now: remove it"):
        work.moved(task, pair, row, 0)
    (moved / "transfer_report.json").unlink()
    assert work.moved(task, pair, row, 0) == moved


# All of it


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--pair"),
        (["--pair", "a", "b"], "--task or --written"),
        (["--pair", "x/a", "y/a"], "same last part"),
        (["--pair", "a", "b", "--prompts", "3"], "expected together"),
        (["--pair", "a", "b", "--texted", "theseus"], "expected together"),
        (["--pair", "a", "b", "--seeds", "1", "1"], "different numbers"),
        (["--pair", "a", "b", "--method", "copy", "--method", "copy"], "given twice"),
        (["--pair", "a", "b", "--limit", "0"], "1 or more"),
        (["--pair", "a", "b", "--lineage", "here/train_train"], "another task"),
    ],
)
def test_arguments_are_checked_before_any_training(given, message):
    task = [] if "--task or" in message else ["--task", "train", "test"]
    with pytest.raises(jcl.UsageError, match=message):
        lift.check(lift.parse(["--work", "w", *given, *task]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "copy", "--method", "coppy"], "'coppy' is unknown"),
        (["--method", "copy", "--method", "copy"], "given twice"),
        (["--method", "copy", "--seeds", "0"], "--seeds 0 is out of range"),
        (["--method", "copy", "--limit", "-1"], "--limit -1 is out of range"),
    ],
)
def test_arguments_of_a_comparison_are_checked_first(given, message):
    paths = ["--adapter", "a", "--source", "s", "--target", "t", "--task", "x.jsonl"]
    with pytest.raises(jcl.JCrossLoRAError, match=message):
        compare_methods.run(compare_methods.parse([*paths, *given]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pair", "{small}", "none"], "none: no such folder"),
        (["--text", "news.txt", "--texted", "theseus"], "news.txt: cannot be read"),
        (["--prompts", "2", "--prompted", "theseus"], "has 1 train questions behind the first 3, 2 prompts expected"),
        (["--prompts", "1", "--prompted", "theseus", "--split", "train-rest"], "use up its 4 train questions"),
    ],
)
def test_unreadable_files_are_refused_before_training(folders, task_files, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(lift_work, "train_lora", lambda *_, **__: pytest.fail("training began"))
    usual = ["--pair", *map(str, folders), "--task", *map(str, task_files), "--method", "pad-truncate"]
    given = usual + [part.format(small=folders[0]) for part in given]
    with pytest.raises(jcl.JCrossLoRAError, match=message):
        lift.run(lift.parse(["--work", str(tmp_path), *given]))


def test_questions_too_long_for_the_target_are_refused_by_number_before_training(
    folders, task_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(lift_work, "train_lora", lambda *_, **__: pytest.fail("training began"))
    short = shutil.copytree(folders[1], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    questions = [dataclasses.asdict(question) for question in QUESTIONS * 300]
    questions[401]["question"] = "Who? " * 64
    fetch_tasks.write_lines(task_files[1], questions)
    given = ["--pair", str(folders[0]), str(short), "--task", *map(str, task_files), "--method", "pad-truncate"]
    with pytest.raises(jcl.UsageError, match=r"question 402 \(.*short reads 64 at most"):
        lift.run(lift.parse(["--work", str(tmp_path), *given]))


def test_all_methods_and_auto_are_the_default():
    given = ["--prompts", "9", "--prompted", "theseus", "--text", "news.txt", "--texted", "distill"]
    rows = lift.rows_of(lift.parse(["--work", "w", *given]))
    assert {row.name for row in rows} == {*jcl.methods.METHODS, "auto", "theseus, 9 prompts", "distill, on news"}


@pytest.mark.full
def test_a_run_from_adapters_trained_elsewhere(folders, task_files, tmp_path, monkeypatch, capsys):
    for folder in folders:
        adapter = random_adapter(jcl.open_base(folder), rank=2, scale=0.02)
        save_adapter(adapter, tmp_path / "work" / "trained" / f"small--{folder.name}--seed0")
    texts = tmp_path / "news.txt"
    texts.write_text("Nothing jumps here today.\nThe fox is brown, and so is the dog.\n")
    given = ["--pair", *map(str, folders), "--seeds", "0", "--task", *map(str, task_files)]
    given += ["--text", str(texts), "--texted", "theseus"]
    first = run_twice([*given, "--method", "pad-truncate", "--method", "copy"], tmp_path, monkeypatch)
    assert "small: small to wide, 4 test questions, 3 trained on, seeds [0]" in first
    assert "| copy | - | - | - | - | - | - | - | not defined |" in first
    assert "copy is not defined: method copy needs equal shapes" in first
    shown = capsys.readouterr().out
    assert "pad-truncate, seed 0: moved in" in shown
    assert "theseus, on news, seed 0: moved in" in shown


@pytest.mark.slow
def test_a_run_with_written_answers_prompts_and_a_further_trained_version(folders, task_files, tmp_path, monkeypatch):
    other = task_files[0].with_name("other_train.jsonl")
    other.write_bytes(task_files[0].read_bytes())
    given = ["--pair", *map(str, folders), "--seeds", "0", "1", "--steps", "30", "--rate", "0.02"]
    given += ["--task", *map(str, task_files), "--written", *map(str, task_files), "--method", "pad-truncate"]
    given += ["--prompts", "1", "--prompted", "theseus", "--lineage", str(other), "--lineage-steps", "4"]
    monkeypatch.setattr(lift, "LINEAGE_ROWS", ("copy",))
    text = run_twice(given, tmp_path, monkeypatch)
    titles = [line for line in text.splitlines() if "seeds [0, 1]" in line]
    assert [title.split(",")[0] for title in titles] == [
        "small: small to wide",
        "small_written: small to wide",
        "small: small to small--other_train",
        "small_written: small to small--other_train",
    ]
    assert "| theseus, 1 prompts | " in text
    assert "exact match" in text


@pytest.mark.slow
def test_a_run_with_a_version_that_was_trained_in_all_weights(folders, task_files, tmp_path, monkeypatch):
    other = task_files[0].with_name("other_train.jsonl")
    other.write_bytes(task_files[0].read_bytes())
    given = ["--pair", *map(str, folders), "--seeds", "0", "--steps", "10", "--task", *map(str, task_files)]
    given += ["--method", "pad-truncate", "--lineage", str(other), "--lineage-dense", "--lineage-steps", "2"]
    monkeypatch.setattr(lift, "LINEAGE_ROWS", ("copy", "interpolated-copy"))
    text = run_twice(given, tmp_path, monkeypatch)
    assert "small: small to small--other_train--dense, " in text
    assert "| interpolated-copy | " in text


def run_twice(given, folder, monkeypatch) -> str:
    """The Markdown of a run, the same as that of a second one, which trains, moves and scores nothing."""
    table = folder / "table.md"
    given = ["--work", str(folder / "work"), "--markdown", str(table), "--rank", "2", *given]
    lift.run(lift.parse(given))
    first = table.read_text()
    for module, names in ((lift_work, ("train_lora", "train_dense")), (lift_scores, ("score", "exact_matches"))):
        for name in names:
            monkeypatch.setattr(module, name, None)
    lift.run(lift.parse(given))
    assert table.read_text() == first
    return first
