"""Shares of a trained adapter's gain: their statistics, their tables, and a tiny run that goes on where it stopped."""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from probe_bases import QUESTIONS, write_base

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import fetch_tasks
import gain_table
import gains
import torch_training
from result_lines import GainLine, read_lines

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import load_model
from jcrosslora.evaluate import Interval, answer, lift_recovered, score
from jcrosslora.text import Completion
from jcrosslora.training import Plan, TrainingSettings, encode, read_examples
from jcrosslora.training.batches import answer_loss, rate_at

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def rights(seed: int, shares=(0.1, 0.4, 0.7), seeds=2, items=400):
    """Right answers (S, n) of a base, a moved and a trained adapter, of these shares."""
    rng = np.random.default_rng(seed)
    return [(rng.random((seeds, items)) < share).astype(float) for share in shares]


def line(row, right, seed=0, prompts=0, **changes):
    own = {"source": "A", "target": "B", "task": "intents", "split": "test", "training_steps": 5, "measure": "exact"}
    right = "".join(map(str, right))
    more = {"nll_per_char": [1.0 - int(one) for one in right], "seconds": None, "versions": {}, "commit": "abc"}
    return GainLine(**own | more | {"seed": seed, "row": row, "prompts": prompts, "right": right} | changes)


# Statistics


def test_the_share_of_one_seed_is_that_of_the_package():
    base, moved, trained = rights(0, seeds=1)
    found, wanted = gain_table.share(base, moved, trained), lift_recovered(-base[0], -moved[0], -trained[0])
    assert found is not None
    np.testing.assert_allclose(list(vars(found).values()), list(vars(wanted).values()), atol=0.02)
    assert found.value == pytest.approx(wanted.value)


def test_the_share_is_that_of_means_over_seeds_and_its_interval_is_of_seeds_too():
    base, moved, trained = rights(1)
    found, wide = gain_table.share(base, moved, trained), np.array(moved)
    assert found is not None
    assert found.value == pytest.approx((moved.mean() - base.mean()) / (trained.mean() - base.mean()))
    # The same mean with seeds that differ: the interval over items alone would hardly change.
    wide[0] = np.minimum(1, moved[0] + (np.arange(400) % 3 == 0))
    wide[1] = moved[1] * (np.arange(400) % 3 != 0)
    spread = gain_table.share(base, wide, trained)
    assert spread is not None
    assert spread.high - spread.low > 2 * (found.high - found.low)


def test_no_share_where_training_gained_nothing_sure():
    base, moved, trained = rights(2, (0.3, 0.3, 0.3))
    assert gain_table.share(base, moved, trained) is None


def test_rows_are_compared_on_the_same_items():
    base, moved, _ = rights(3, seeds=1)
    assert gain_table.difference(moved, moved) == Interval(0, 0, 0)
    paired = gain_table.difference(np.maximum(base, moved), base)
    plain = gain_table.difference(moved, base)
    assert paired.high - paired.low < plain.high - plain.low


# Tables


def test_a_table_has_the_rows_of_all_lines_and_the_last_line_counts():
    part = "1100" * 50
    lines = [line("base", "0000" * 50), line("trained", "1111" * 50), line("source", "1000" * 50)]
    lines += [line("answers", "1000" * 50, prompts=200), line("distill", "0000" * 50, prompts=200)]
    lines += [line("distill", part, prompts=200), line("distill", "1111", seed=1, prompts=200)]
    made = gain_table.tables(lines)
    assert made.startswith("INTENTS, 200 items, answers equal to the label:\n")
    row = next(one for one in made.splitlines() if "`distill`" in one)
    assert row.startswith("| A | B | `distill`, 200 prompts | 0.500 [")
    assert "| **0.50** [" in row
    assert row.count("+0.250 [+0.") == 2
    assert row.endswith("| 0 |")
    assert [one.split(" | ")[2] for one in made.splitlines()[4:]][-2:] == [
        "the source with its adapter",
        "trained on the target",
    ]
    with pytest.raises(jcl.UsageError, match="test items alone"):
        gain_table.tables([line("base", "01", split="train")])


def test_the_tables_are_put_between_the_marks():
    page = "before\n" + gain_table.MARKS[0] + "old\n" + gain_table.MARKS[1] + "after\n"
    made = gain_table.filled(page, "| new |\n")
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert gain_table.filled(made, "| new |\n") == made
    with pytest.raises(jcl.UsageError, match="has no lines"):
        gain_table.filled("no marks", "")


def test_the_page_has_the_tables_of_the_lines_in_the_repository():
    lines = [one for path in sorted(gain_table.GAINS.glob("*.jsonl")) for one in read_lines(path, GainLine)]
    page = gain_table.PAGE.read_text(encoding="utf-8")
    assert gain_table.filled(page, gain_table.tables(lines)) == page


# A run


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.setattr(gains, "HELD_BACK", 4)
    folders = [
        write_base(tmp_path / name, 60, eos=1, layers=2, seed=seed) for seed, name in enumerate(("small", "other"))
    ]
    entries = [{"prompt": one.prompt, "answer": one.choices[one.answer]} for one in QUESTIONS * 3]
    for part in ("train", "test"):
        fetch_tasks.write_lines(tmp_path / f"words_{part}.jsonl", entries)
        fetch_tasks.write_lines(tmp_path / f"asked_{part}.jsonl", [dataclasses.asdict(one) for one in QUESTIONS * 3])
    own = {"source": str(folders[0]), "target": str(folders[1]), "data": tmp_path, "work": tmp_path / "work"}
    more = {"task": "words", "seed": 0, "prompts": [2], "method": ["cross-lora"], "control": ["random", "copy"]}
    return argparse.Namespace(**own | more | {"torch": True, "split": "test", "limit": 4, "steps": 25})


@pytest.mark.full
def test_a_run_writes_each_row_once(given, monkeypatch):
    pytest.importorskip("peft")
    settings = TrainingSettings(steps=25, rate=0.02)
    monkeypatch.setattr(gains, "TrainingSettings", lambda **changes: dataclasses.replace(settings, **changes))
    # Adapters of so few steps end few answers.
    said = [Completion(one.prompt, f" {one.choices[0]}") for one in QUESTIONS[:2]]
    monkeypatch.setattr(gains, "greedy_answers", lambda *_: said)
    gains.run(given)
    found = read_lines(given.work / "gains.jsonl", GainLine)
    rows = [(one.row, one.prompts) for one in found]
    wanted = ["base", "source", "trained", "random", "copy", "answers", "answers, torch", "cross-lora"]
    assert [row for row, _ in rows] == wanted
    assert {len(one.right) for one in found} == {4}
    # The judge of tokens finds the answers that are written.
    items = read_examples(given.data / "words_test.jsonl")[:4]
    wrote = answer(given.target, items, [given.work / "trained" / "words--other--seed0"])
    np.testing.assert_allclose(found[2].nll_per_char, wrote.by_example("nll_per_char")[1], rtol=0.05, atol=0.01)
    assert [float(one) for one in found[2].right] == wrote.by_example("exact")[1].tolist()
    monkeypatch.setattr(gains, "made", None)
    monkeypatch.setattr(gains, "score_answers", None)
    gains.run(given)
    assert read_lines(given.work / "gains.jsonl", GainLine) == found


@pytest.mark.full
def test_questions_are_right_where_the_right_choice_is_the_likeliest(given):
    given.task, given.torch, given.prompts, given.control = "asked", False, [], []
    gains.run(given)
    base, _, trained = read_lines(given.work / "gains.jsonl", GainLine)
    assert base.measure == "accuracy"
    adapter = given.work / "trained" / "asked--other--seed0"
    wanted = score(given.target, QUESTIONS, [adapter]).by_question("accuracy")
    assert [[float(one) for one in line.right] for line in (base, trained)] == wanted.tolist()


def test_training_by_peft_has_our_loss_and_our_rates(given):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base, settings = jcl.open_base(given.target), TrainingSettings(steps=40, batch=3)
    plan = Plan([encode(load_tokenizer(base), one) for one in QUESTIONS], 3, 1, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.target, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    found = torch_training._loss(model, plan.batch(0)).item()
    assert found == pytest.approx(float(answer_loss(load_model(base), plan.batch(0))), rel=1e-5)
    rates = [torch_training._rate(settings, step) for step in range(40)]
    np.testing.assert_allclose(rates, [float(np.asarray(rate_at(settings)(step))) for step in range(40)], rtol=1e-5)
