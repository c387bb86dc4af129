"""Fetch ARC-Easy, ARC-Challenge and OpenBookQA from the hub and write them as task files.

    python experiments/fetch_tasks.py --out data [--task arc_easy ...]

Writes TASK_train.jsonl and TASK_test.jsonl with {"question", "choices", "answer"} on each line, which `jcrosslora
evaluate` and `experiments/lift.py` read. Needs pyarrow (pip install pyarrow), because the hub holds parquet files.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jcrosslora as jcl
from jcrosslora.utils.files import write_whole

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Place:
    """The place of a task on the hub: a dataset and the folder of its parquet files."""

    dataset: str
    folder: str

    def file(self, split: str) -> str:
        """Name the file of a split; all splits have one part."""
        return f"{self.folder}/{split}-00000-of-00001.parquet"


PLACES = {
    "arc_easy": Place("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": Place("allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": Place("allenai/openbookqa", "main"),
}


def convert(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Convert a record to a question of a task file: the answer as an index into the choices instead of a label.

    Args:
        record: of ARC ("question") or OpenBookQA ("question_stem"), with {"text", "label"} as choices.
        place: of the record, for errors.

    Raises:
        UsageError: a record of another form.
    """
    try:
        question = record["question"] if "question" in record else record["question_stem"]
        texts, labels = (list(record["choices"][key]) for key in ("text", "label"))
        answer = labels.index(record["answerKey"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        msg = f"{place}: is no question of ARC or OpenBookQA ({reason}): the format of the dataset has changed"
        raise jcl.UsageError(msg) from error
    return {"question": question, "choices": texts, "answer": answer}


def read_parquet(path: str) -> list[dict[str, Any]]:
    """Read the records of a parquet file.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise jcl.UsageError("reading parquet files needs the pyarrow package: pip install pyarrow") from error
    return parquet.read_table(path).to_pylist()


def fetch(place: Place, split: str) -> list[dict[str, Any]]:
    """Fetch the questions of a split, from the hub or its cache.

    Raises:
        UsageError: it cannot be fetched, or has another format than expected.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = place.file(split)
    try:
        path = hf_hub_download(repo_id=place.dataset, filename=name, repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{place.dataset}/{name}: cannot be fetched ({reason}): check the connection to huggingface.co"
        raise jcl.UsageError(msg) from error
    records = enumerate(read_parquet(path))
    return [convert(record, f"{place.dataset}/{name}, record {number}") for number, record in records]


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, renamed into place so that there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the task files")
    parser.add_argument("--task", action="append", choices=sorted(PLACES), help="default: all")
    arguments = parser.parse_args()
    try:
        for task in arguments.task or PLACES:
            for split in SPLITS:
                path = arguments.out / f"{task}_{split}.jsonl"
                entries = fetch(PLACES[task], split)
                write_lines(path, entries)
                print(f"written: {path} ({len(entries)} questions)")
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"fetch_tasks: {error}")


if __name__ == "__main__":
    main()
