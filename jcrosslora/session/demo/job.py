"""Describe the demo's job: answer science questions in JSON. Training, scoring and the printed answers share this."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path

from jcrosslora.evaluate import Question, read_task

SOURCE_ADAPTER = "smollm2_json_answers"
TARGET_ADAPTER = "gemma3_json_answers"
_QUESTIONS = "science_questions.jsonl"


def shipped(name: str) -> AbstractContextManager[Path]:
    """Open a file or folder of the package's data, such as the adapter `SOURCE_ADAPTER`."""
    return as_file(files("jcrosslora") / "data" / name)


def demo_questions() -> list[Question]:
    """Return the package's own science questions, which no shipped adapter was trained on, with JSON as choices."""
    with shipped(_QUESTIONS) as path:
        return in_json(read_task(path))


def in_json(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with every choice as the JSON that the job asks for.

    A choice ends with a line break, so that training teaches where an answer ends.
    """
    return [
        dataclasses.replace(question, choices=tuple(f"{json_answer(choice)}\n" for choice in question.choices))
        for question in questions
    ]


def json_answer(text: str) -> str:
    """Return the JSON object of an answer, on one line."""
    return json.dumps({"answer": text.rstrip(" .")}, ensure_ascii=False)


def is_json_answer(written: str) -> bool:
    """Tell whether a written line is one JSON object of the form `{"answer": text}`."""
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and list(found) == ["answer"] and isinstance(found["answer"], str)
