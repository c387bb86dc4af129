"""Time programs that take turns, so that a change of the machine's load meets all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax


def median_seconds(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median wall seconds of each program, until its arrays are there, behind a first run that compiles it."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(program())
            if turn:
                taken[name].append(time.perf_counter() - begun)
    return {name: median(seconds) for name, seconds in taken.items()}
