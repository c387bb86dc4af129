"""Train the two adapters that ship with the package: science questions answered in JSON, on SmolLM2 and on Gemma.

    python tools/train_demo_adapter.py --task arc_easy_train.jsonl

The task is JSONL with question, choices and answer. Questions with long answers are left out; the last 100 others are
kept back. Both adapters have rank 4 on q and v and see the same questions in the same order. The base models come from
PyPI, as for the demo. On 2 cores it takes 1 minute for SmolLM2 and 2 for Gemma; the loss per answer token falls from
about 3 to about 0.6.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.adapter import save_adapter as save_plain
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evaluate import Question, read_task
from jcrosslora.session.demo import GEMMA3, SMOLLM2, SOURCE_ADAPTER, TARGET_ADAPTER, fetch_models, in_json
from jcrosslora.training import TrainingSettings, train_lora

DATA = Path(jcl.__file__).parent / "data"
SETTINGS = TrainingSettings(steps=160, rank=4, alpha=8.0, rate=2e-3, modules=("q_proj", "v_proj"))
# Kept back to choose the settings by.
HELD_BACK = 100
# Answers of a few words fit into the twelve tokens of an answer that the default method reads.
MOST_WORDS, LONGEST_ANSWER, LONGEST_QUESTION = 3, 24, 160


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=Path, required=True, help="JSONL of question, choices, answer")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the two adapter folders")
    parser.add_argument("--models", type=Path, help="folder of the base models; the cache folder if not given")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--overwrite", action="store_true", help="replace adapters that are there")
    return parser.parse_args(given)


def examples(task: Path) -> list[Question]:
    """Return the questions of a task with short answers but the last `HELD_BACK`, the answers in JSON.

    Raises:
        UsageError: the file is no task, or has too few such questions.
    """
    found = [question for question in read_task(task) if _is_short(question)]
    if len(found) <= HELD_BACK:
        short = f"questions of at most {LONGEST_QUESTION} characters with answers of at most {MOST_WORDS} words"
        raise jcl.UsageError(f"{task}: {len(found)} {short}, expected more than the {HELD_BACK} that are kept back")
    return in_json(found[:-HELD_BACK])


def _is_short(question: Question) -> bool:
    answer = question.choices[question.answer]
    short = len(answer.split()) <= MOST_WORDS and len(answer) <= LONGEST_ANSWER
    return short and len(question.question) <= LONGEST_QUESTION


def train(base: BaseModel, task: Path, settings: TrainingSettings, hub_id: str, out: Path, overwrite: bool) -> None:
    """Train an adapter and write it in bfloat16, with the training settings in the file's header."""
    found = examples(task)
    trained = train_lora(base, found, settings)
    modules = {
        name: LoRAFactors(*(np.asarray(x).astype(ml_dtypes.bfloat16) for x in (item.a, item.b)), scale=item.scale)
        for name, item in trained.modules.items()
    }
    made = {**dataclasses.asdict(settings), "task": task.name, "examples": len(found)}
    save_plain(
        Adapter(modules, AdapterInfo(name=out.name, base_name=hub_id)),
        out,
        base_name=hub_id,
        dtype="bfloat16",
        overwrite=overwrite,
        metadata={"jcrosslora.training": json.dumps(made)},
    )
    print(f"written: {out}")


def run(arguments: argparse.Namespace) -> None:
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps)
    paths = fetch_models(arguments.models, Console())
    for path, model, name in zip(paths, (SMOLLM2, GEMMA3), (SOURCE_ADAPTER, TARGET_ADAPTER), strict=True):
        train(jcl.open_base(path), arguments.task, settings, model.hub_id, arguments.out / name, arguments.overwrite)


def main() -> None:
    jcl.show_progress()
    try:
        run(parse_arguments())
    except jcl.JCrossLoRAError as error:
        sys.exit(f"train_demo_adapter: {error}")
    except KeyboardInterrupt:
        sys.exit("train_demo_adapter: interrupted; an adapter that is not written whole is not there")


if __name__ == "__main__":
    main()
