"""A LoRA extracted from a full fine-tune, beside mergekit's `extract_lora`: error at one rank, processor time, memory.

    python tools/bench_extract.py FINETUNE BASE [--ranks 4 8 16] [--mergekit PYTHON]

Both models are folders of safetensors. mergekit runs in the Python that is named, which has it installed, and is left
out without one. Each program runs as a process of its own, one after the other, on as many threads as OMP_NUM_THREADS
says; what it loads and compiles counts. Processor time says more than seconds on a busy machine. The error is
||D - B A||_F / ||D||_F over all linear modules, D the difference of the weights, computed in float64 from the files
that were written; `best` is that of numpy's full SVD.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jcrosslora.checkpoint import BaseModel, open_base

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Run:
    """One run of a program: seconds, processor seconds, peak memory in bytes, and the folder that it wrote."""

    seconds: float
    busy: float
    peak: float
    folder: Path


def run(command: Sequence[str], folder: Path) -> Run:
    """Run a command and measure it; a small process starts it, whose children's peak is the command's alone."""
    code = "import json, resource as r, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2, stderr=2);"
    code += "u = r.getrusage(r.RUSAGE_CHILDREN); print(json.dumps([u.ru_utime + u.ru_stime, u.ru_maxrss * 1024]))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    busy, peak = json.loads(done.stdout.splitlines()[-1])
    return Run(time.perf_counter() - start, busy, peak, folder)


def differences(finetune: BaseModel, base: BaseModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the difference of each linear module, float64."""
    for name in base.modules:
        yield name, finetune.weight(name).astype(np.float64) - base.weight(name).astype(np.float64)


def error(folder: Path, finetune: BaseModel, base: BaseModel) -> float:
    """Return the relative error of a PEFT folder with one scale over all linear modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale, lost, whole = config["lora_alpha"] / config["r"], 0.0, 0.0
    for name, wanted in differences(finetune, base):
        a, b = (tensors[f"{_PREFIX}{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        lost += float(np.sum((wanted - scale * (b @ a)) ** 2))
        whole += float(np.sum(wanted**2))
    return (lost / whole) ** 0.5


def best_errors(ranks: Sequence[int], finetune: BaseModel, base: BaseModel) -> list[float]:
    """Return the least error at each rank."""
    spectra = [np.linalg.svd(wanted, compute_uv=False) ** 2 for _, wanted in differences(finetune, base)]
    whole = sum(map(np.sum, spectra))
    return [float(sum(np.sum(s[rank:]) for s in spectra) / whole) ** 0.5 for rank in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("finetune")
    parser.add_argument("base")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--mergekit", help="a Python with mergekit")
    arguments = parser.parse_args()
    finetune, base = open_base(arguments.finetune), open_base(arguments.base)
    best = best_errors(arguments.ranks, finetune, base)
    with tempfile.TemporaryDirectory() as place:
        for rank, least in zip(arguments.ranks, best, strict=True):
            print(f"rank {rank}: best error {least:.5f}")
            out = Path(place) / f"{rank}"
            ours = [sys.executable, "-m", "jcrosslora", "extract", arguments.finetune, "--base", arguments.base]
            commands = {"jcrosslora": [*ours, "--rank", str(rank), "--out", f"{out}-jcrosslora"]}
            if arguments.mergekit:
                rival = [arguments.mergekit, "-m", "mergekit.scripts.extract_lora", "--model", arguments.finetune]
                rival += ["--base-model", arguments.base, "--max-rank", str(rank), "--skip-undecomposable"]
                commands["mergekit"] = [*rival, "-e", "embed_tokens|lm_head", "--out-path", f"{out}-mergekit"]
            for name, command in commands.items():
                done = run(command, Path(f"{out}-{name}"))
                found = error(done.folder, finetune, base)
                times = f"{done.seconds:.1f} s, processor {done.busy:.1f} s, peak {done.peak / 1e9:.2f} GB"
                print(f"  {name}: error {found:.5f}, {times}")


if __name__ == "__main__":
    main()
