"""Peak resident memory and time of the whole transfer, measured from outside: one fresh process for each pair of bases.

What an earlier run has kept (factors, transports, texts) is not made again: set JCROSSLORA_CACHE to a new folder to
measure the making as well. The CPU time is that of all cores; on a busy machine it says more than the seconds.

    python tools/measure_memory.py ADAPTER SOURCE TARGET [--method cross-lora] [--limit 2.0] [OPTION ...]

Options that it does not know go to the transfer: with `--effect never` the check of the effect is left out. Prints the
peak beside the size of both bases as float32, and exits with 1 if it is above the limit (GB = 10^9 bytes).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jcrosslora.checkpoint import open_base


def float32_bytes(ref: str) -> int:
    """Size of all target modules of a base as float32."""
    return sum(4 * module.shape[0] * module.shape[1] for module in open_base(ref).modules.values())


def run(arguments: argparse.Namespace, options: Sequence[str], out: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak bytes of `jcrosslora transfer` in a process of its own."""
    command = [sys.executable, "-m", "jcrosslora.cli.main", "transfer", arguments.adapter, "--out", str(out)]
    command += ["--source", arguments.source, "--target", arguments.target, "--method", arguments.method]
    command += options
    start = time.perf_counter()
    subprocess.run([*command, "--table", "none"], check=True, stdout=subprocess.DEVNULL)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    # ru_maxrss of children is the largest of them, in KiB on Linux.
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--method", default="cross-lora")
    parser.add_argument("--limit", type=float, default=2.0, help="GB allowed")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            seconds, busy, peak = run(arguments, options, Path(folder) / "out")
        except subprocess.CalledProcessError as error:
            sys.exit(f"measure_memory: the transfer failed with {error.returncode}; nothing was measured")
    sizes = [float32_bytes(arguments.source) / 1e9, float32_bytes(arguments.target) / 1e9]
    print(f"peak {peak / 1e9:.2f} GB, {seconds:.1f} s, CPU time {busy:.1f} s")
    print(f"target modules as float32: {sizes[0]:.2f} and {sizes[1]:.2f} GB")
    sys.exit(peak / 1e9 > arguments.limit)


if __name__ == "__main__":
    main()
