"""The tool that trains the shipped adapter reads the same task files as `evaluate`."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import train_demo_adapter


def test_examples_are_those_of_the_task_file(tmp_path):
    path = tmp_path / "task.jsonl"
    # A separator that `str.splitlines` would cut the line at, and an empty line.
    lines = [{"question": question, "choices": ["no", "yes"], "answer": 1} for question in ("Is\u2028it?", "Or?")]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    found = train_demo_adapter.examples(path, lambda text: {"input_ids": list(text)})
    wanted = [(f"Question: {line['question']}\nAnswer:", " yes") for line in lines]
    assert found == [(list(prompt + answer), len(prompt)) for prompt, answer in wanted]
