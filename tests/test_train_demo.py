"""The tool that trains the shipped adapters reads the task files of `evaluate`."""

import json

import pytest
import train_demo_adapter
from probe_bases import write_base

import jcrosslora as jcl
from jcrosslora.training import TrainingSettings


def write_task(path, lines):
    # An empty line between any two, and a separator in the text that `str.splitlines` would cut the line at.
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def line(question="Is\u2028it?", answer="yes"):
    return {"question": question, "choices": ["no", answer], "answer": 1}


@pytest.fixture
def kept_back(monkeypatch):
    monkeypatch.setattr(train_demo_adapter, "HELD_BACK", 1)


@pytest.mark.usefixtures("kept_back")
def test_examples_are_the_short_questions_of_the_task_with_answers_in_json(tmp_path):
    lines = [
        line(),
        line("Or?", "in the sun."),
        line(answer="one two three four"),
        line(question="x" * 161),
        line("Last?"),
    ]
    found = train_demo_adapter.examples(write_task(tmp_path / "task.jsonl", lines))
    assert [(one.prompt, one.choices[one.answer]) for one in found] == [
        ("Question: Is\u2028it?\nAnswer:", '{"answer": "yes"}\n'),
        ("Question: Or?\nAnswer:", '{"answer": "in the sun"}\n'),
    ]


def test_a_task_without_short_questions_is_refused(tmp_path):
    task = write_task(tmp_path / "task.jsonl", [line(question="x" * 161)])
    with pytest.raises(jcl.UsageError, match=r"0 questions of at most 160 characters .* more than the 100"):
        train_demo_adapter.examples(task)


@pytest.mark.usefixtures("kept_back")
def test_a_trained_adapter_is_written_in_bfloat16_with_the_name_of_its_base(tmp_path):
    base = jcl.open_base(write_base(tmp_path / "base", 30, layers=2))
    task, out = write_task(tmp_path / "task.jsonl", [line(), line("Or?"), line("Last?")]), tmp_path / "out"
    settings = TrainingSettings(steps=2, batch=2, rank=2, modules=("q_proj",), dtype="float32")
    train_demo_adapter.train(base, task, settings, "owner/base", out, overwrite=False)
    found = jcl.load_adapter(out)
    assert found.info.base_name == "owner/base"
    assert {str(factors.a.dtype) for factors in found.modules.values()} == {"bfloat16"}
    assert len(found.modules) == 2
