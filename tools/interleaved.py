"""Time programs that take turns, so that a change of the machine's load meets all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax


def median_seconds(
    programs: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each program, until its arrays are there, behind a first run that compiles it.

    They are wall seconds, or by another clock `time.process_time`, which means something on a busy machine too.
    """
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            begun = clock()
            jax.block_until_ready(program())
            if turn:
                taken[name].append(clock() - begun)
    return {name: median(seconds) for name, seconds in taken.items()}
