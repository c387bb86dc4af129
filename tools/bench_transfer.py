"""Time of whole moves, files to files, against a plain torch implementation of the published method.

    python tools/bench_transfer.py SOURCE TARGET ADAPTER [ADAPTER ...] [--repeats 5] [--rank 320] [--many 100]
        [--clock wall]

Interleaved, medians, all in one run:

- torch: the published method as one would write it: for every module of the adapter the full SVD of both weights, cut
  to the rank, and B and A through the factors, one module after the other; weights are read by the same reader. The
  joint signs of singular vectors are left as LAPACK gives them.
- first: `jcrosslora transfer` in a new process with an empty cache folder: start, imports and compilation included.
- compiled: `jcrosslora.transfer` in a process that has called it before, without the cache of factors and transports.
- second: the same with the cache, in which the pair's transport lies.
- batch: `--many` copies of the adapter in one plan, beside as many single calls (timed for one, and multiplied).

Needs torch (the test extra). Look at the ratios of a quiet machine: processes that share cores starve each other. On a
busy one `--clock cpu` says more: processor time of all threads and of the command.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch
from jcrosslora.methods import CrossLoRA
from jcrosslora.relation.pairing import pair_modules
from jcrosslora.session.transfer import transfer_files


def with_torch(source_ref: str, target_ref: str, adapter_ref: str, rank: int, out: Path) -> None:
    """Cross-LoRA as published, module by module, with full SVDs in torch."""
    import torch

    source, target, adapter = jcl.open_base(source_ref), jcl.open_base(target_ref), jcl.load_adapter(adapter_ref)
    moved = {}
    for pair in pair_modules(source.modules, target.modules, "proportional").pairs:
        factors = adapter.modules.get(pair.source)
        if factors is None:
            continue
        sides = [
            torch.from_numpy(np.ascontiguousarray(base.weight(name), np.float32))
            for base, name in ((source, pair.source), (target, pair.target))
        ]
        (u_src, _, v_src), (u_tgt, _, v_tgt) = (torch.linalg.svd(side, full_matrices=False) for side in sides)
        most = min(rank, *sides[0].shape, *sides[1].shape)
        b = torch.from_numpy(np.asarray(factors.b, np.float32) * np.float32(factors.scale))
        a = torch.from_numpy(np.asarray(factors.a, np.float32))
        b = u_tgt[:, :most] @ (u_src[:, :most].T @ b)
        a = (a @ v_src[:most].T) @ v_tgt[:most]
        moved[pair.target] = jcl.LoRAFactors(a=a.numpy(), b=b.numpy())
    jcl.save_adapter(jcl.Adapter(modules=moved), out, base_name=target.name)


def settings(arguments: argparse.Namespace, adapter: str, out: Path, *, cache: bool) -> jcl.TransferSettings:
    """Of the published method for the pair."""
    return jcl.TransferSettings(
        adapter=adapter,
        source=arguments.source,
        target=arguments.target,
        out=str(out),
        method=CrossLoRA(svd_rank=arguments.rank),
        cache=cache,
    )


def in_new_process(arguments: argparse.Namespace, adapter: str, out: Path) -> None:
    """The command, with no program compiled before."""
    command = [sys.executable, "-m", "jcrosslora.cli.main", "transfer", adapter, "--out", str(out), "--table", "none"]
    command += ["--source", arguments.source, "--target", arguments.target, "--method", "cross-lora"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JCROSSLORA_CACHE": cache}
        subprocess.run(
            [*command, "--svd-rank", str(arguments.rank)], check=True, env=environment, stdout=subprocess.DEVNULL
        )


def many(arguments: argparse.Namespace, folder: Path) -> None:
    """A plan of copies of the first adapter."""
    for number in range(arguments.many):
        shutil.copytree(arguments.adapter[0], folder / "adapters" / f"a{number:03d}")
    bases = f'[bases]\nsource = "{arguments.source}"\ntarget = "{arguments.target}"\n'
    move = f'[[moves]]\nfrom = "source"\nto = "target"\nmethods = ["cross-lora"]\nsvd_rank = {arguments.rank}\n'
    (folder / "plan.toml").write_text(f'out = "moved"\n{bases}[adapters]\nsource = ["adapters/*"]\n{move}')
    start = now(arguments.clock)
    summary = run_batch(read_plan(folder / "plan.toml"))
    seconds = now(arguments.clock) - start
    assert summary.count("done") == arguments.many
    print(f"batch of {arguments.many}: {seconds:.1f} s, {seconds / arguments.many:.2f} s an adapter")


def now(clock: str) -> float:
    """Seconds of the clock: of the wall, or of processors, those of finished processes included."""
    if clock == "wall":
        return time.perf_counter()
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def timed(clock: str, job: Callable[[Path], object]) -> float:
    """Seconds of a job that writes into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = now(clock)
        job(Path(folder) / "out")
        return now(clock) - start


def run(arguments: argparse.Namespace) -> None:
    adapters: Sequence[str] = arguments.adapter
    source, target, rank = arguments.source, arguments.target, arguments.rank
    rows: dict[str, Callable[[str, Path], object]] = {
        "torch": lambda adapter, out: with_torch(source, target, adapter, rank, out),
        "first": lambda adapter, out: in_new_process(arguments, adapter, out),
        "compiled": lambda adapter, out: transfer_files(settings(arguments, adapter, out, cache=False)),
        "second": lambda adapter, out: transfer_files(settings(arguments, adapter, out, cache=True)),
    }
    for name in ("compiled", "second"):
        timed(arguments.clock, lambda out, job=rows[name]: job(adapters[0], out))
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(arguments.repeats):
        for name, job in rows.items():
            adapter = adapters[turn % len(adapters)]
            times[name].append(timed(arguments.clock, lambda out, job=job, adapter=adapter: job(adapter, out)))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        ratio = medians["torch"] / medians[name]
        print(f"{name:8} {medians[name]:7.2f} s ({min(found):.2f} to {max(found):.2f}), torch / this {ratio:.1f}")
    if arguments.many:
        with tempfile.TemporaryDirectory() as folder:
            many(arguments, Path(folder))
        alone, inside = (medians[name] * arguments.many for name in ("first", "compiled"))
        print(f"as many single calls without a cache: {alone:.0f} s as commands, {inside:.0f} s in one process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("adapter", nargs="+", help="of the source; several are taken in turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=320)
    parser.add_argument("--many", type=int, default=100, help="adapters of the batch, 0 for none")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu adds up all threads")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
