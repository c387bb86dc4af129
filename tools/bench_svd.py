"""Truncated SVD against torch on this machine: interleaved runs, medians, and how exact each of them is.

    python tools/bench_svd.py [--models FOLDER] [--shapes 576x1536 640x2048 2048x8192 4096x4096] [--repeats 5]
        [--threads 2] [--layers 8] [--rank 320] [--clock wall]

Rivals are torch's full SVD, `torch.svd_lowrank` at its usual setting (q=R, niter=2), and the cheapest setting of it
that captures as much energy as the best approximation, up to a share of 1e-5 of the whole (searched for here). Shapes
with a short side below 1,000 are stacks of `--layers` matrices, larger ones are single. With `--models` the stacks are
weights of that shape or its transpose; otherwise, and for shapes that no model there has, singular values are i^-0.33,
which is how those of language models fall, between vectors that are known exactly.

torch is needed for the rivals only (`pip install 'jcrosslora[test]'`); without it our side is timed alone. It runs on
the CPU, ours on the default device of JAX. Ratios of wall time mean nothing on a busy machine (look at the rate of the
matrix product, which is measured in the same run): threads that wait for each other have been seen to make torch 50
times slower. There `--threads 1 --clock cpu` says more. It prints, for every contender:

- time a matrix (median), and torch's full SVD over it;
- share of the rate of a large matrix product, counting the operations of one Gram matrix of the short side only;
- loss: energy that the best approximation of this rank has and this one has not, over ||W||_F^2, in float64;
- vectors: the largest angle between a singular pair and the exact one;
- update: the error of U_t U_s' dW V_s V_t' for a random dW of rank 16, U_t and V_t being exact, relative.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """Matrices of one shape and their exact leading triplets.

    Attributes:
        name: where they are from.
        stack: (L, O, I), float32.
        u: (L, O, R), v: (L, I, R), float64.
        energy: (L,), share of ||W||_F^2 in the R triplets.
    """

    name: str
    stack: np.ndarray
    u: np.ndarray
    v: np.ndarray
    energy: np.ndarray


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, columns) orthonormal columns: cosine transforms with random signs, for a QR would take a minute."""
    from scipy.fft import dct

    x = np.eye(rows, columns)
    for _ in range(2):
        x = dct(x * rng.choice([-1.0, 1.0], size=rows)[:, None], axis=0, norm="ortho", overwrite_x=True)
    return np.asarray(x)


def synthetic(layers: int, rows: int, columns: int, rank: int) -> Case:
    rng, short = np.random.default_rng(0), min(rows, columns)
    s = np.sort(np.arange(1, short + 1) ** -0.33 * np.exp(1e-3 * rng.normal(size=short)))[::-1]
    pairs = [(orthonormal(rows, short, rng), orthonormal(columns, short, rng)) for _ in range(layers)]
    stack = np.stack([((u * s) @ v.T).astype(np.float32) for u, v in pairs])
    u, v = (np.stack([pair[side][:, :rank] for pair in pairs]) for side in (0, 1))
    return Case("synthetic", stack, u, v, np.full(layers, np.sum(s[:rank] ** 2) / np.sum(s**2)))


def real(folder: Path, layers: int, rows: int, columns: int, rank: int) -> Case | None:
    """Weights of the first model in a folder that has any of this shape or its transpose, spread over its layers."""
    from jcrosslora.checkpoint import open_base

    for path in sorted(folder.iterdir()):
        if path.suffix != ".gguf" and not (path / "config.json").is_file():
            continue
        base = open_base(str(path))
        names = [name for name, module in base.modules.items() if sorted(module.shape) == sorted((rows, columns))]
        if not names:
            continue
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(layers, len(names))).astype(int)]
        weights = [np.asarray(base.weight(name), np.float32) for name in chosen]
        stack = np.stack([w if w.shape == (rows, columns) else w.T for w in weights])
        exact = [np.linalg.svd(w.astype(np.float64), full_matrices=False) for w in stack]
        energy = [np.sum(s[:rank] ** 2) / np.sum(s**2) for _, s, _ in exact]
        u = np.stack([u[:, :rank] for u, _, _ in exact])
        return Case(path.stem, stack, u, np.stack([vt[:rank].T for _, _, vt in exact]), np.array(energy))
    return None


def quality(case: Case, u: np.ndarray, v: np.ndarray) -> tuple[float, float, float]:
    """The worst loss of energy, angle of a pair and error of a moved update over the matrices (L, O, R), (L, I, R)."""
    rng, worst = np.random.default_rng(1), np.zeros(3)
    for w, u_exact, v_exact, energy, u_one, v_one in zip(case.stack, case.u, case.v, case.energy, u, v, strict=True):
        ours_u, ours_v = u_one.astype(np.float64), v_one.astype(np.float64)
        short = ours_v if w.shape[0] >= w.shape[1] else ours_u
        basis, _ = np.linalg.qr(short)
        caught = (w if w.shape[0] >= w.shape[1] else w.T).astype(np.float64) @ basis
        loss = energy - np.sum(caught**2) / np.sum(w.astype(np.float64) ** 2)
        signs = np.sign(np.sum(ours_u * u_exact, axis=0) + np.sum(ours_v * v_exact, axis=0))
        ours_u, ours_v = ours_u * signs, ours_v * signs
        beside = np.hypot(np.linalg.norm(ours_u - u_exact, axis=0), np.linalg.norm(ours_v - v_exact, axis=0)) / 2**0.5
        b, a = rng.normal(size=(w.shape[0], 16)), rng.normal(size=(16, w.shape[1]))
        # U_t and V_t have orthonormal columns, so the norms are those of the small factors.
        moved, exact = (ours_u.T @ b) @ (a @ ours_v), (u_exact.T @ b) @ (a @ v_exact)
        figures = loss, np.max(beside), np.linalg.norm(moved - exact) / np.linalg.norm(exact)
        worst = np.maximum(worst, figures)
    return float(worst[0]), float(worst[1]), float(worst[2])


def ours(case: Case, rank: int, kernel: Any) -> Callable[[], tuple[Any, Any]]:
    import jax

    from jcrosslora.linalg import decompose, describe_kernels, shard

    # As `align` does: over all devices, the surplus filled up with the last matrix.
    surplus = -len(case.stack) % jax.local_device_count() if len(case.stack) > 1 else 0
    filled = np.concatenate([case.stack, case.stack[len(case.stack) - surplus :]]) if surplus else case.stack
    stack = shard(filled) if len(case.stack) > 1 else jax.device_put(case.stack)

    def run() -> tuple[Any, Any]:
        svd, used = decompose(stack, rank, kernel=kernel)
        jax.block_until_ready(svd)
        return (svd.u[: len(case.stack)], svd.v[: len(case.stack)]), describe_kernels(used[: len(case.stack)])

    return run


def theirs(case: Case, rank: int, setting: tuple[int, int] | None) -> Callable[[], tuple[Any, Any]]:
    """The full SVD of torch, or `svd_lowrank` with (q, niter)."""
    import torch

    stack = [torch.from_numpy(w) for w in case.stack]

    def run() -> tuple[Any, Any]:
        if setting is None:
            parts = [torch.linalg.svd(w, full_matrices=False) for w in stack]
            pairs = [(u[:, :rank], vt[:rank].T) for u, _, vt in parts]
        else:
            parts = [torch.svd_lowrank(w, q=setting[0], niter=setting[1]) for w in stack]
            pairs = [(u[:, :rank], v[:, :rank]) for u, _, v in parts]
        return tuple(np.stack([pair[side].numpy() for pair in pairs]) for side in (0, 1)), ""

    return run


def equal_energy(case: Case, rank: int, allowed: float) -> tuple[int, int] | None:
    """The (q, niter) of `svd_lowrank` of fewest operations that loses at most a share `allowed`; None if none does."""
    import torch

    torch.manual_seed(0)
    short = min(case.stack.shape[1:])
    widths = sorted({min(short, int(rank * factor)) for factor in (1, 1.25, 1.5, 2)})
    settings = [(q, niter) for q in widths for niter in (2, 3, 4, 6, 8, 12)]
    one = Case(case.name, case.stack[:1], case.u[:1], case.v[:1], case.energy[:1])
    for setting in sorted(settings, key=lambda pair: pair[0] * (2 * pair[1] + 2)):
        (u, v), _ = theirs(one, rank, setting)()
        if quality(one, u, v)[0] <= allowed:
            return setting
    return None


def product_rate(size: int) -> Callable[[], tuple[Any, Any]]:
    import jax
    import jax.numpy as jnp

    from jcrosslora.linalg import dot

    a, product = jnp.ones((size, size), jnp.float32), jax.jit(dot)
    return lambda: (jax.block_until_ready(product(a, a)), "")


def bench(
    case: Case, rank: int, repeats: int, kernels: Sequence[str], clock: Callable[[], float], with_torch: bool
) -> None:
    layers, rows, columns = case.stack.shape
    contenders: dict[str, Callable[[], tuple[Any, Any]]] = {f"ours, {name}": ours(case, rank, name) for name in kernels}
    if with_torch:
        contenders["torch full"] = theirs(case, rank, None)
        contenders["svd_lowrank, usual"] = theirs(case, rank, (rank, 2))
        setting = equal_energy(case, rank, 1e-5)
        if setting is None:
            print("no setting of svd_lowrank that was tried captures as much energy")
        else:
            contenders[f"svd_lowrank, q={setting[0]} niter={setting[1]}"] = theirs(case, rank, setting)
    size = 2048
    contenders["product"] = product_rate(size)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results = {name: run() for name, run in contenders.items()}  # compiles, and warms up
    for _ in range(repeats):
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    median = {name: float(np.median(spent)) for name, spent in times.items()}
    rate = 2 * size**3 / median.pop("product")
    print(f"\n{rows}x{columns}, {layers} matrices ({case.name}), rank {rank}; product {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':30}{'s a matrix':>11}{'full over':>10}{'of rate':>9}{'loss':>10}{'vectors':>9}{'update':>9}")
    gram = 2 * max(rows, columns) * min(rows, columns) ** 2
    for name, spent in median.items():
        (u, v), used = results[name]
        loss, vectors, update = quality(case, np.asarray(u), np.asarray(v))
        ratio = f"{median['torch full'] / spent:.2f}" if with_torch else "-"
        share = layers * gram / spent / rate
        line = f"{name:30}{spent / layers:11.4f}{ratio:>10}{share:9.1%}{loss:10.1e}{vectors:9.1e}{update:9.1e}"
        print(f"{line}  {used}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a folder of models to take weights from")
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "640x2048", "2048x8192", "4096x4096"])
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="auto, full, gram, krylov")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, default=8, help="matrices of a stack")
    parser.add_argument("--rank", type=int, default=320)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu adds up all threads")
    arguments = parser.parse_args()
    # Before jax and OpenBLAS are loaded. One device a thread, as many as `align` would use on this CPU.
    if arguments.threads < (os.cpu_count() or 1) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["NPROC"] = str(2 * arguments.threads)
    import jax

    jax.config.update("jax_num_cpu_devices", arguments.threads)
    device = jax.devices()[0].device_kind
    print(f"ours on {jax.local_device_count()} x {device}, {arguments.threads} CPU threads, {arguments.clock} time")
    try:
        import torch

        torch.set_num_threads(arguments.threads)
        with_torch = True
    except ImportError:
        print("torch is not installed (pip install 'jcrosslora[test]'): no rivals", file=sys.stderr)
        with_torch = False
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        layers, rank = arguments.layers if min(rows, columns) < 1000 else 1, min(arguments.rank, rows, columns)
        case = real(arguments.models, layers, rows, columns, rank) if arguments.models else None
        case = synthetic(layers, rows, columns, rank) if case is None else case
        clock = time.perf_counter if arguments.clock == "wall" else time.process_time
        bench(case, rank, arguments.repeats, arguments.kernels, clock, with_torch)


if __name__ == "__main__":
    main()
