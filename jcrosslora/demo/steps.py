"""Announce the steps of a long command, with the time that is probably left."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class Steps:
    """Print a line in front of every step: its number, its name, and about how long the command still takes.

    The seconds expected of each step are scaled by how long the steps before took, so that the estimate fits slower
    and faster machines.
    """

    def __init__(
        self, say: Callable[[str], None], expected: Sequence[float], clock: Callable[[], float] = time.monotonic
    ):
        """Plan one step for each number of `expected`, the seconds that it usually takes."""
        self._say, self._expected, self._clock = say, tuple(expected), clock
        self._done, self._elapsed, self._usual = 0, 0.0, 0.0

    @contextmanager
    def step(self, name: str, *, paced: bool = True) -> Iterator[None]:
        """Announce a step and time it.

        Args:
            name: what is done, in the imperative.
            paced: whether its time says how fast this machine is; a download's does not.
        """
        left = sum(self._expected[self._done :]) * self._pace()
        self._say(f"step {self._done + 1} of {len(self._expected)}: {name} ({duration(left)} left in all)")
        start = self._clock()
        yield
        if paced:
            self._elapsed += self._clock() - start
            self._usual += self._expected[self._done]
        self._done += 1

    def _pace(self) -> float:
        return self._elapsed / self._usual if self._usual else 1.0


def duration(seconds: float) -> str:
    """Return a time to wait in round figures, such as "about 3 min" or "about 20 s"."""
    if seconds >= 90:
        return f"about {round(seconds / 60)} min"
    return f"about {max(10, 10 * math.ceil(seconds / 10))} s"
