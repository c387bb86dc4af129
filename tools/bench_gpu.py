"""Time and exactness of every SVD kernel on this machine's accelerator, and of a whole pair of models.

    python tools/bench_gpu.py [--models FOLDER] [--shapes 576x1536 640x2048 2048x8192 4096x4096] [--repeats 5]
        [--kernels gram krylov full] [--layers 32] [--rank 320] [--fit 1B] [--device H100] [--small]

It runs on whatever JAX finds: a GPU, a TPU, or, with `--small` in seconds, a CPU. Shapes with a short side below 1,000
are stacks of `--layers` matrices as a model has them, larger ones of a quarter of that. Weights are those of a model in
FOLDER that has the shape, or else synthetic with exactly known singular vectors (see tools/bench_svd.py). Everything is
waited for, and what is compiled at the first call is told apart. A line for each kernel as it comes, and one for
`decompose` that begins with it and redoes what misses its tolerance:

- first: seconds of the first call, compilation included; s a matrix: median of the calls after it.
- of rate: share of the device's own rate of a large float32 product at precision HIGHEST, counting the operations of
  one Gram matrix of the short side only (a full SVD does many times that).
- redone: share of the matrices that were refined in float64 or redone by another kernel.
- loss, vectors, update: against float64 on the host, the worst matrix; see tools/bench_svd.py.

Last comes the table of `tools/fit_sizes.py`: the programs of a fit between bases of the shapes `--fit`, each run,
beside their times on paper on a `--device`, the one of `tools/roofline.py` that is nearest to this one; and their sums
as rows of the hardware table of docs/performance.md, measured and computed.

With `--models` the first two models in FOLDER, by name, are aligned as well, by cross-lora with all their modules, from
files to maps in memory: first call, and median of the calls after it.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_svd import Case, quality, real, synthetic
from fit_sizes import (
    SHAPES,
    add_lengths,
    bytes_of,
    empty_base,
    make_programs,
    measured,
    phases,
    temporary_bytes,
    times_table,
)
from rich.console import Console
from roofline import DEVICES

import jcrosslora as jcl
from jcrosslora.decoder import load_model
from jcrosslora.linalg import decompose, describe_kernels, dot, shard
from jcrosslora.methods import CrossLoRA

# Where a float32 product of this size runs at the full rate of the device; and small enough for a CPU.
_PRODUCT, _PRODUCT_SMALL = 8192, 1024
SMALL = {"shapes": ["640x768"], "rank": 16, "layers": 4, "repeats": 2, "fit": ["small"], "prompt": 16, "answer": 8}


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first call, median of those after it, and what the last gave."""
    spent, result = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        spent.append(time.perf_counter() - start)
    return spent[0], float(np.median(spent[1:])), result


def rate(size: int, repeats: int, precision: str) -> float:
    """Operations a second of a float32 product on one device: at precision HIGHEST, or at the default one."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(dot if precision == "highest" else jnp.matmul)
    return 2 * size**3 / timed(lambda: product(a, a), repeats)[1]


def facts(size: int, repeats: int) -> float:
    """Print what there is to know of the devices; the rate at precision HIGHEST."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = f", {limit / 2**30:.0f} GiB each for JAX" if limit else ""
    print(f"{jax.local_device_count()} x {device.device_kind} ({device.platform}){memory}; {os.cpu_count()} CPU cores")
    print(f"jax {jax.__version__}, jcrosslora {jcl.__version__}")
    highest, default = (rate(size, repeats, precision) for precision in ("highest", "default"))
    print(f"float32 product of {size}: {highest / 1e12:.2f} TFLOP/s at HIGHEST, {default / 1e12:.2f} at the default")
    return highest


def bench(case: Case, rank: int, kernels: Sequence[Any], repeats: int, highest: float) -> None:
    count, rows, columns = case.stack.shape
    # As `align` does: over all devices, the surplus filled up with the last matrix.
    surplus = -count % jax.local_device_count()
    stack = shard(np.concatenate([case.stack, np.repeat(case.stack[-1:], surplus, axis=0)]))
    gram = count * 2 * max(rows, columns) * min(rows, columns) ** 2
    whole = highest * jax.local_device_count()
    print(f"\n{rows}x{columns}, {count} matrices ({case.name}), rank {rank}")
    print(f"{'':24}{'first':>8}{'s a matrix':>12}{'of rate':>9}{'redone':>8}{'loss':>10}{'vectors':>9}{'update':>9}")
    for kernel in kernels:
        plain = kernel
        for name, tolerance in ((f"{kernel} as it comes", np.inf), (f"decompose by {kernel}", 1e-2)):

            def run(kernel: Any = kernel, tolerance: float = tolerance) -> Any:
                return decompose(stack, rank, kernel=kernel, tolerance=tolerance)

            first, median, (svd, used) = timed(run, repeats)
            if tolerance == np.inf:
                plain = used[0]  # on a CPU "gram" is in float64 to begin with
            if not plain.startswith(kernel):
                print(f"{kernel:24} has no room for its subspace in this shape")
                break
            used = used[:count]
            redone = np.mean([one != plain for one in used])
            loss, vectors, update = quality(case, np.asarray(svd.u)[:count], np.asarray(svd.v)[:count])
            line = f"{name:24}{first:8.2f}{median / count:12.5f}{gram / median / whole:9.1%}{redone:8.0%}"
            print(f"{line}{loss:10.1e}{vectors:9.1e}{update:9.1e}  {describe_kernels(used)}", flush=True)


def whole_pair(folder: Path, rank: int, repeats: int) -> None:
    models = [path for path in sorted(folder.iterdir()) if path.suffix == ".gguf" or (path / "config.json").is_file()]
    if len(models) < 2:
        print(f"\n{folder} holds {len(models)} models; no pair is aligned")
        return
    source, target = (jcl.open_base(str(path)) for path in models[:2])
    first, median, transport = timed(lambda: jcl.align(source, target, CrossLoRA(svd_rank=rank)), repeats)
    pairs = sum(len(group.pairs) for group in transport.groups)
    print(f"\n{models[0].stem} to {models[1].stem}, {pairs} pairs of modules, rank {rank}: {transport.recipe.svd}")
    print(f"first {first:.2f} s, then {median:.2f} s", flush=True)


def hardware_rows(shapes: Sequence[str], given: argparse.Namespace) -> None:
    """Print rows of the hardware table of docs/performance.md: each fit as measured here, and as computed."""
    kind = jax.local_devices()[0].device_kind
    for name in shapes:
        model = load_model(empty_base(name), jnp.bfloat16)
        programs = make_programs(model, given.prompt, given.answer)
        parts = phases(model, given, DEVICES[given.device])
        size = 2 * bytes_of(model) + max(temporary_bytes(*programs[part]) for part in ("step", "write"))
        run, paper = (
            sum(count * one for count, one in found)
            for found in ([(count, measured(*programs[part])) for part, (count, _) in parts.items()], parts.values())
        )
        for device, seconds, how in ((kind, run, "measured"), (given.device, paper, "computed")):
            job = f"| {name} to {name} | `distill`, {given.prompts} completions | one {device} "
            print(f"{job}| {seconds:.3g} s of computing | {size / 1e9:.1f} GB | {how} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a folder of models to take weights from, and a pair")
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "640x2048", "2048x8192", "4096x4096"])
    parser.add_argument("--kernels", nargs="+", default=["gram", "krylov", "full"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32, help="matrices of a stack")
    parser.add_argument("--rank", type=int, default=320)
    parser.add_argument("--fit", nargs="*", choices=list(SHAPES), default=["1B"], help="shapes of bases to fit between")
    parser.add_argument("--device", choices=list(DEVICES), default="H100", help="whose times on paper are shown")
    add_lengths(parser)
    parser.add_argument("--small", action="store_true", help="one small shape, to try the script out on a CPU")
    given = parser.parse_args(arguments)
    if given.small:
        vars(given).update(SMALL)
    highest = facts(_PRODUCT_SMALL if given.small else _PRODUCT, given.repeats)
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        layers = given.layers if min(rows, columns) < 1000 else max(1, given.layers // 4)
        rank = min(given.rank, rows, columns)
        case = real(given.models, layers, rows, columns, rank) if given.models else None
        bench(case or synthetic(layers, rows, columns, rank), rank, given.kernels, given.repeats, highest)
    if given.models:
        whole_pair(given.models, given.rank, given.repeats)
    print(f"\na fit of bases of {' and '.join(given.fit)}, on paper on {given.device}")
    Console(width=120).print(times_table(given.fit, given, DEVICES[given.device], run=True))
    print("\nrows for the table of hardware in docs/performance.md; add start, reading and compilation")
    hardware_rows(given.fit, given)


if __name__ == "__main__":
    main()
