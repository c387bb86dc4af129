"""The command line of lm-evaluation-harness with the model "jcrosslora"."""

import importlib
import sys

from jcrosslora.errors import JCrossLoRAError


def main() -> None:
    """Run `lm_eval` with the arguments given; exit with 2 after an error of the user's."""
    try:
        importlib.import_module("jcrosslora.evaluate.harness.model")  # registers the model
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except JCrossLoRAError as error:
        print(f"jcrosslora: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
