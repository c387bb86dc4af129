"""A multiple-choice task of lm_eval by its own backend for transformers and by ours: medians of interleaved runs.

    python tools/bench_harness.py BASE QUESTIONS.jsonl [--adapter DIR] [--limit 100] [--repeats 5] [--batch 16]
        [--dtype bfloat16] [--processor]

QUESTIONS has lines of {"question", "choices", "answer"}. Both score the same requests of lm_eval, which has to be
installed (extra `eval`), without a network. The weights of both are in memory before the time begins, and theirs have
the adapter through peft. Printed are seconds, and the accuracy and the length-normalised one of both, which have to be
equal in float32, the default. To time one core, start it with `taskset -c 0`. With --processor the seconds are
processor time, which means something on a busy machine too.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from interleaved import median_seconds
from lm_eval.models.huggingface import HFLM
from torch_model import torch_model

import jcrosslora as jcl
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evaluate.harness import JCrossLoRALM

METRICS = ("acc", "acc_norm")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights of both")
    parser.add_argument("--processor", action="store_true")
    for name, usual in {"limit": 100, "repeats": 5, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    return parser.parse_args()


def task_of(questions: Path) -> dict[str, Any]:
    """Return a task of lm_eval that reads the file."""
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric} for metric in METRICS],
    }


def theirs(base: BaseModel, arguments: argparse.Namespace) -> HFLM:
    """Return the harness's own backend with the weights that our reader gives."""
    path = Path(arguments.base)
    folder, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    model: Any = torch_model(base, getattr(torch, arguments.dtype))
    if arguments.adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, arguments.adapter)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch, device="cpu")


def main() -> None:
    arguments = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        base = jcl.open_base(arguments.base)
        ours = JCrossLoRALM(base, arguments.adapter, dtype=arguments.dtype)
        sides = {"jcrosslora": ours, "hf": theirs(base, arguments)}
    except jcl.JCrossLoRAError as error:
        sys.exit(f"bench_harness: {error}")
    task, found = task_of(arguments.questions), {}

    def run(name: str, model: Any) -> None:
        results = lm_eval.simple_evaluate(model, tasks=[task], limit=arguments.limit, bootstrap_iters=0)
        assert results is not None
        found[name] = [results["results"]["questions"][f"{metric},none"] for metric in METRICS]

    clock = time.process_time if arguments.processor else time.perf_counter
    runs = {name: partial(run, name, model) for name, model in sides.items()}
    seconds = median_seconds(runs, arguments.repeats, clock)
    print(f"{base.name}, {arguments.limit} questions, {len(os.sched_getaffinity(0))} cores")
    for name, taken in seconds.items():
        figures = ", ".join(f"{metric} {value:.4f}" for metric, value in zip(METRICS, found[name], strict=True))
        print(f"{name:10} {taken:7.2f} s; {figures}")
    print(f"{seconds['hf'] / seconds['jcrosslora']:.2f} x")


if __name__ == "__main__":
    main()
