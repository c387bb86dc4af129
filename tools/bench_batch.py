"""Time, memory and files of batches of many tiny adapters, each a command of its own, and of doing them once more.

    python tools/bench_batch.py [--jobs 50 200 1000] [--pairs 20] [--method cross-lora]

Random bases of two layers are written: one source for each pair, and targets that several pairs share, with a
vocabulary of their own. A batch has its jobs divided evenly over the pairs, an adapter on all seven modules for each.
All batches share one folder of compiled programs, which a first batch fills that is not counted; the cache of factors
and transports is new for each. `again` is the same command behind it, which finds all jobs done.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import jcrosslora as jcl

TARGETS = 4
LAYERS, VOCABULARY, RANK = 2, 512, 8
SOURCE, TARGET = 64, 96  # widths


def write_base(folder: Path, width: int, seed: int) -> None:
    """A llama of random weights, with a tokenizer of made-up words, of which any two bases share most."""
    rng = np.random.default_rng(seed)
    wide = 2 * width
    shapes = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (wide, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, wide),
    }
    tensors: dict[str, np.ndarray] = {"model.embed_tokens.weight": rng.standard_normal((VOCABULARY, width), np.float32)}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        norms += [f"model.layers.{layer}.{name}_layernorm" for name in ("input", "post_attention")]
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = rng.standard_normal(shape, np.float32) / 8
    tensors |= {f"{name}.weight": np.ones(width, np.float32) for name in norms}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
    }
    words = {f"w{seed + number}": number for number in range(VOCABULARY)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": words, "merges": []},
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_adapters(base: Path, folder: Path, count: int, seed: int) -> None:
    """Random adapters of a base, on all modules."""
    modules = jcl.open_base(base).modules
    rng = np.random.default_rng(seed)
    for number in range(count):
        factors = {
            name: jcl.LoRAFactors(
                a=rng.standard_normal((RANK, module.shape[1]), np.float32),
                b=rng.standard_normal((module.shape[0], RANK), np.float32),
            )
            for name, module in modules.items()
        }
        jcl.save_adapter(jcl.Adapter(factors), folder / f"{base.name}-{number:04d}", base_name=base.name)


def write_plan(folder: Path, pairs: int, jobs: int, method: str) -> Path:
    """Write bases, adapters and a plan of them."""
    targets = min(TARGETS, pairs)
    for number in range(targets):
        write_base(folder / f"target{number}", TARGET, 100 + number)
    bases = [f"target{number}" for number in range(targets)]
    adapters, moves = [], []
    for number in range(pairs):
        name, count = f"source{number}", jobs // pairs + (number < jobs % pairs)
        write_base(folder / name, SOURCE, number)
        write_adapters(folder / name, folder / "adapters", count, number)
        bases.append(name)
        adapters.append(f'{name} = ["adapters/{name}-*"]')
        moves.append(f'[[moves]]\nfrom = "{name}"\nto = "target{number % targets}"\nmethods = ["{method}"]')
    named = [f'{name} = "{name}"' for name in bases]
    plan = folder / "plan.toml"
    plan.write_text("\n".join(['out = "moved"', "[bases]", *named, "[adapters]", *adapters, *moves]) + "\n")
    return plan


def command(plan: Path, cache: Path, compiled: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak GB of `jcrosslora batch` in a process of its own."""
    environment = os.environ | {"JCROSSLORA_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "jcrosslora.cli.main", "batch", str(plan)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)  # of this child alone, where RUSAGE_CHILDREN is the largest of all
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"bench_batch: the batch failed with {child.returncode}; see {plan.parent / 'moved'}")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def bench(pairs: int, jobs: int, method: str, compiled: Path) -> str:
    """Run a batch and then again, and return its row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = write_plan(folder, pairs, jobs, method)
        first = command(plan, folder / "cache", compiled)
        again = command(plan, folder / "cache", compiled)
        files = [path for path in (folder / "moved").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        kept = json.loads((folder / "moved" / "batch_summary.json").read_text())["kept"]
        assert kept == jobs
    times = " | ".join(f"{seconds:.1f} | {busy:.1f} | {peak:.2f}" for seconds, busy, peak in (first, again))
    return f"| {jobs} | {times} | {len(files)} | {size:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--method", default="cross-lora")
    arguments = parser.parse_args()
    if not 0 < arguments.pairs <= min(arguments.jobs):
        parser.error("--pairs must be at least 1, and no more than any number of --jobs")
    with tempfile.TemporaryDirectory() as compiled:
        bench(1, max(arguments.jobs) // arguments.pairs, arguments.method, Path(compiled))
        print("| jobs | s | CPU s | GB | again: s | CPU s | GB | files | MB |")
        for jobs in arguments.jobs:
            print(bench(arguments.pairs, jobs, arguments.method, Path(compiled)), flush=True)


if __name__ == "__main__":
    main()
