r"""A base with an adapter as a model of lm-evaluation-harness, for all of its tasks.

Needs `pip install 'jcrosslora[eval]'`; nothing else in the package imports it. From Python, on a task of your own
that needs no network (`task.jsonl` has lines {"question", "choices", "answer"}):

    import lm_eval
    from jcrosslora.evaluate.harness import JCrossLoRALM

    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "task.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = JCrossLoRALM(base="models/gemma-3-270m", adapter="moved")
    print(lm_eval.simple_evaluate(model=model, tasks=[task])["results"]["mine"])

This gives the same log-likelihoods as `jcrosslora.evaluate.score`. On the command line all options of `lm_eval` work;
`--include_path` names a folder of task files:

    python -m jcrosslora.evaluate.harness run --model jcrosslora --tasks arc_easy \
        --model_args base=models/gemma-3-270m,adapter=moved
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from jcrosslora.errors import JCrossLoRAError

if TYPE_CHECKING:
    from jcrosslora.evaluate.harness_model import JCrossLoRALM as JCrossLoRALM


def __getattr__(name: str) -> Any:
    # Imported late, so that the command line can say in one line that lm_eval is missing.
    if name == "JCrossLoRALM":
        return importlib.import_module("jcrosslora.evaluate.harness_model").JCrossLoRALM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run `lm_eval` with the arguments given and the model "jcrosslora"; exit with 2 after an error of the user's."""
    try:
        importlib.import_module("jcrosslora.evaluate.harness_model")  # registers the model
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except JCrossLoRAError as error:
        print(f"jcrosslora: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
