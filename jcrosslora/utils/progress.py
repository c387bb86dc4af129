"""Show the progress of all running work: one line on a terminal, elsewhere a log line every 30 s.

Work reports its progress by `track`, or by `each` when it iterates over a list; a caller of several such pieces names
them by `steps`. Nested work is shown on the same line:

    step 2 of 5: write completions, 120 of 300, about 3 min left

Commands show progress; from Python, `show_progress` turns it on.
"""

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TextIO, TypeVar

from jcrosslora.utils.texts import visible

T = TypeVar("T")
Shown = TypeVar("Shown", "Track", "Steps")

_REFRESH = 0.1  # seconds between two refreshes of the line on a terminal while work reports itself
# Below this share of the work done, the usual time of a step estimates the time left better than the pace so far.
_ENOUGH = 0.05
# Bounds on the pace of earlier steps, by which later ones are scaled: beyond them a step was read from a cache or
# compiled for long, which says little about the machine.
_LEAST_PACE, _MOST_PACE = 0.25, 4.0


class Track:
    """Work of a known size.

    Attributes:
        total: maximum number of units.
        note: shown after the count, such as "loss 1.234".
    """

    def __init__(
        self, display: "Display | None", total: int, description: str = "", unit: str = "", done: int = 0
    ) -> None:
        self.total, self.done, self.note = total, done, ""
        self._display, self._description, self._unit = display, description, unit
        self._begun = done
        self._since = 0.0 if display is None else display.clock()

    def update(self, count: int = 1) -> None:
        """Report that more units are done; the count stops at the total."""
        self.done = min(self.done + count, self.total)
        if self._display is not None:
            self._display.refresh()

    def skip_to(self, done: int) -> None:
        """Skip to `done` units: those before it are done or not needed, and took no time."""
        skipped = max(0, min(done, self.total) - self.done)
        self.done, self._begun = self.done + skipped, self._begun + skipped

    def text(self, inside: str) -> str:
        """Return the description, unless the enclosing step `inside` has the same, and the count."""
        if self._unit == "B":
            count = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        else:
            count = f"{self.done:,} of {self.total:,}" + (f" {self._unit}" if self._unit else "")
        described = [] if self._description == inside else [self._description]
        return ", ".join([*described, count, *([self.note] if self.note else [])])

    def left(self, now: float, _: "Sequence[Track | Steps]") -> float | None:
        """Estimate the seconds left from the pace so far; None before the first unit is done."""
        done = self.done - self._begun
        return (now - self._since) / done * max(0, self.total - self.done) if done > 0 else None

    @property
    def share(self) -> float:
        """The share of the work that is done."""
        return self.done / self.total if self.total else 1.0


class Steps:
    """The named steps of a command, in order; for the arguments see `Display.steps`."""

    def __init__(
        self,
        display: "Display | None",
        seconds: Mapping[str, float | None],
        unpaced: Collection[str] = (),
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self._display, self._seconds, self._names = display, dict(seconds), list(seconds)
        self._unpaced, self._announce = frozenset(unpaced), announce
        self._current, self._since = -1, 0.0
        self._took = self._usual = 0.0

    def plans(self, name: str) -> bool:
        """Check whether a step of this name is still to come."""
        return name in self._names[self._current + 1 :]

    def begin(self, name: str) -> None:
        """Begin a step and end the current one; steps between the two are skipped."""
        if self._display is None:
            return
        now = self._display.clock()
        usual = self._seconds.get(self.name)
        if usual is not None and self.name not in self._unpaced:
            self._took, self._usual = self._took + now - self._since, self._usual + usual
        self._current, self._since = self._names.index(name), now
        if self._announce is not None:
            left = self.left(now, ())
            with self._display.hidden():
                ending = "" if left is None else f" ({_about(left)} left in all)"
                self._announce(f"{self._number()}: {name}{ending}")
        self._display.refresh()

    def begin_again(self, name: str) -> None:
        """Go back to a step to run it and the later ones again; to the beginning if none has this name."""
        if name in self._names:
            self.begin(name)
        elif self._display is not None:
            self._current, self._since = -1, self._display.clock()

    @property
    def name(self) -> str:
        """The name of the current step, "" before the first."""
        return "" if self._current < 0 else self._names[self._current]

    def text(self, _: str) -> str:
        """Return the number and the name of the current step; only the number if the name was announced."""
        if not self.name:
            return "begin"
        return self._number() if self._announce else f"{self._number()}: {self.name}"

    def _number(self) -> str:
        return f"step {self._current + 1} of {len(self._names)}"

    def left(self, now: float, inside: "Sequence[Track | Steps]") -> float | None:
        """Estimate the seconds left: the rest of the current step plus the usual times of later ones, at this pace.

        `inside` holds the work inside the step, outermost first. Its own estimate is better than the usual time of the
        step, and corrects the pace. Returns None if unknown.
        """
        later = [self._seconds[name] for name in self._names[self._current + 1 :]]
        if not self.name or None in later:
            return None
        usual, took = self._seconds[self.name], now - self._since
        pace, known = _pace(self._took, self._usual), None
        current = None if usual is None else max(0.0, usual * pace - took)
        if inside and (current is None or not isinstance(inside[0], Track) or inside[0].share >= _ENOUGH):
            known = inside[0].left(now, inside[1:])
        if known is not None:
            current = known
            if usual is not None and self.name not in self._unpaced:
                pace = _pace(self._took + took + known, self._usual + usual)
        return None if current is None else current + pace * sum(seconds for seconds in later if seconds)


class Display:
    """The progress line of all running work, outermost first.

    Args:
        clock: returns seconds since any point in time.
        tick: seconds between refreshes by a thread while work reports nothing; None for none.
        log_every: seconds between two log lines.
        stream: where to write; None is standard error.
        on: whether to show work that begins from now on.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        tick: float | None = 1.0,
        log_every: float = 30.0,
        stream: TextIO | None = None,
        on: bool = True,
    ) -> None:
        self.clock, self.log_every, self.on = clock, log_every, on
        self._tick_every, self._stream = tick, stream
        self._shown, self._lock = list[Track | Steps](), threading.Lock()
        self._begun = self._last = 0.0
        self._terminal = self._stopped = False
        self._ended = threading.Event()

    @contextmanager
    def track(self, total: int, description: str, unit: str = "", *, done: int = 0) -> Iterator[Track]:
        """Show a piece of work of `total` units while the block runs; `done` units were done before.

        The description is in the imperative. The unit is in the plural, "B" for bytes, or "" if it needs no name.
        """
        if self.on:
            self.begin(description)
        with self._during(Track(self if self.on else None, total, description, unit, done)) as shown:
            yield shown

    def each(self, items: Collection[T], description: str, unit: str = "") -> Iterator[T]:
        """Iterate over `items`, and show how many are done; for the arguments see `track`."""
        with self.track(len(items), description, unit) as shown:
            for item in items:
                yield item
                shown.update()

    @contextmanager
    def steps(
        self,
        seconds: Mapping[str, float | None],
        *,
        unpaced: Collection[str] = (),
        announce: Callable[[str], None] | None = None,
    ) -> Iterator[Steps]:
        """Number the steps of a command while the block runs.

        A step begins by `begin`, or by a `track` with its name as description.

        Args:
            seconds: step name -> its usual time, in order; None if unknown.
            unpaced: steps whose time does not depend on the speed of the machine, such as a download.
            announce: prints a line before each step, with the time left in all.
        """
        with self._during(Steps(self if self.on else None, seconds, unpaced, announce)) as shown:
            yield shown

    def begin(self, name: str) -> None:
        """Begin a step of the running command if it is still to come; else do nothing."""
        innermost = self._shown[-1] if self._shown else None
        if isinstance(innermost, Steps) and innermost.plans(name):
            innermost.begin(name)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the line until the next refresh, so that the block can print; it must not report work."""
        with self._lock:
            if self._shown and self._terminal:
                self._write("")
            yield

    def say(self, text: str) -> None:
        """Write a line that stays."""
        with self.hidden():
            self._out.write(f"jcrosslora: {visible(text, keep='')}\n")
            self._out.flush()

    def stop(self, text: str) -> None:
        """Write a line that stays, and show nothing until new work begins: the current work was interrupted."""
        self._stopped = True
        self.say(text)

    def refresh(self) -> None:
        """Show the line if the last refresh is long enough ago."""
        with self._lock:
            now, silent = self.clock(), self._stopped or not self._shown
            if not silent and now - self._last >= (_REFRESH if self._terminal else self.log_every):
                self._last = now
                self._write(self.line(now))

    def line(self, now: float) -> str:
        """Describe all running work, and the time left for the outermost; the time so far if that is unknown."""
        parts, inside = [], ""
        for one in self._shown:
            parts.append(one.text(inside))
            inside = one.name if isinstance(one, Steps) else ""
        first = self._shown[0]
        is_done = isinstance(first, Track) and first.done == first.total
        left = None if is_done else first.left(now, self._shown[1:])
        ending = f"{duration(now - self._begun)} so far" if left is None else f"{_about(left)} left"
        return ", ".join([*parts, ending])

    @contextmanager
    def _during(self, shown: Shown) -> Iterator[Shown]:
        if not self.on:
            yield shown
            return
        self._push(shown)
        try:
            yield shown
        finally:
            with self._lock:
                self._shown.remove(shown)
                if not self._shown:
                    self._ended.set()
                    if self._terminal:
                        self._write("")

    def _push(self, shown: Track | Steps) -> None:
        with self._lock:
            if not self._shown:
                self._terminal, self._begun = self._out.isatty(), self.clock()
                # On a terminal at once; in a log only after the first wait.
                self._last = -math.inf if self._terminal else self._begun
                self._ended = threading.Event()
                if self._tick_every is not None:
                    threading.Thread(target=self._tick, args=(self._ended, self._tick_every), daemon=True).start()
            self._shown.append(shown)
            self._stopped = False
        self.refresh()

    @property
    def _out(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    def _tick(self, ended: threading.Event, seconds: float) -> None:
        while not ended.wait(seconds):
            self.refresh()

    def _write(self, line: str) -> None:
        line = visible(line, keep="")
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r\x1b[K{line[:width]}")  # the escape clears a longer line
        else:
            self._out.write(f"jcrosslora: {line}\n")
        self._out.flush()


def _pace(took: float, usual: float) -> float:
    return min(max(took / usual, _LEAST_PACE), _MOST_PACE) if usual else 1.0


def _about(seconds: float) -> str:
    """Write a waiting time, rounded to 10 s."""
    return f"about {duration(max(10, 10 * math.ceil(seconds / 10)) if seconds < 90 else seconds)}"


def duration(seconds: float) -> str:
    """Write a time in round figures: 40 s, 3 min, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


DISPLAY = Display(on=False)
track, each, steps, begin, hidden = DISPLAY.track, DISPLAY.each, DISPLAY.steps, DISPLAY.begin, DISPLAY.hidden
say = DISPLAY.say


def show_progress(show: bool = True) -> AbstractContextManager[object]:
    """Show the progress of work that begins from now on, or while a `with` block runs.

        jcl.show_progress()  # from now on, for example in a notebook

        with jcl.show_progress():
            jcl.transfer(adapter, source, target)

    False shows nothing.
    """
    switched = ExitStack()
    switched.callback(setattr, DISPLAY, "on", DISPLAY.on)
    DISPLAY.on = show
    return switched


def shows_progress() -> bool:
    """Check whether progress is shown."""
    return DISPLAY.on
