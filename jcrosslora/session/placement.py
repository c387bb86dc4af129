"""Over how many devices the weights of the bases of a transfer are divided, and by how much memory that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import fast_dtype
from jcrosslora.decoder.sharding import mesh_of
from jcrosslora.decoder.weight_sizes import held_numbers
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.errors import UsageError
from jcrosslora.methods import Method
from jcrosslora.session.settings import Divide, TransferOptions
from jcrosslora.utils.memory import free_memory
from jcrosslora.utils.progress import say, shows_progress

_CHECKED = 4  # bytes of a number in the check of the effect, which holds one base at a time


@dataclass(frozen=True)
class Placement:
    """Where the weights of bases lie while a fit, and the check of its effect, run them.

    Attributes:
        devices: over how many devices they are divided; 1 where they are whole on the first.
        there: how many devices there are.
        weights: the most bytes of weights on a device at a time.
        whole: the same of weights that are not divided.
        beside: the most bytes that a fit takes of a device beside them.
        free: bytes that are free on a device; None where that is not known, or of no account.
    """

    devices: int
    there: int
    weights: int
    whole: int
    beside: int
    free: int | None

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the weights; None where the first has all."""
        return None if self.devices == 1 else mesh_of(self.devices)

    @property
    def was_chosen(self) -> bool:
        """Whether several devices are there, and it is known what they hold, or asked to divide."""
        return self.devices > 1 or (self.there > 1 and self.free is not None)

    def announce(self) -> None:
        """Write the choice, if there was one, where progress is shown."""
        if shows_progress() and self.was_chosen:
            say(f"devices: {self.text()}")

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON value."""
        figures = {"devices": self.devices, "devices_there": self.there, "weights_bytes": self.weights}
        return figures | {"whole_bytes": self.whole, "beside_bytes": self.beside, "free_bytes": self.free}

    def text(self) -> str:
        """Say the choice and its reason, without a full stop."""
        beside = f", and up to {_gb(self.beside)} beside them" if self.beside else ""
        free = "" if self.free is None else f", where {_gb(self.free)} are free"
        if self.devices == 1:
            return f"1 of {self.there} has all weights: {_gb(self.weights)}{beside}{free}"
        of = "" if self.devices == self.there else f" of {self.there}"
        return f"{self.devices}{of} share the weights: {_gb(self.weights)} of {_gb(self.whole)} on each{beside}{free}"


def place_bases(bases: Sequence[BaseModel], method: Method, options: TransferOptions) -> Placement:
    """Choose where the weights of the bases lie that a transfer runs, the target last.

    Raises:
        UsageError: the weights have to be divided, and cannot be.
        MemoryError: the weights of a fit do not fit into the devices, however they are divided.
    """
    # Imported here: methods that look at weights alone need no optimiser.
    from jcrosslora.distill.memory import most_beside

    fits = isinstance(method, DistillSettings)
    checks = options.checks_effect(runs_bases=method.runs_bases)

    def fitted(count: int) -> int:
        return fast_dtype().itemsize * sum(held_numbers(base, count) for base in bases) if fits else 0

    def largest(count: int) -> int:
        return max(fitted(count), _CHECKED * max(held_numbers(base, count) for base in bases) if checks else 0)

    free = free_of_each()
    beside = most_beside(bases[-1], method) if isinstance(method, DistillSettings) else 0
    placement = choose_placement(largest, beside, jax.local_device_count(), free, options.divide)
    needed = fitted(placement.devices)
    if free is not None and needed > free:
        of = "a device" if placement.devices == 1 else f"each of {placement.devices} devices"
        msg = f"the weights of the fit take {_gb(needed)} of {of}, where {_gb(free)} are free"
        raise MemoryError(msg + ("; divide never was asked for" if options.divide == "never" else ""))
    return placement


def free_of_each() -> int | None:
    """Return the bytes that are free on each device; None if that is not known, and on a CPU, whose memory is one."""
    return None if jax.default_backend() == "cpu" else free_memory(jax.local_device_count())


def choose_placement(
    weights: Callable[[int], int], beside: int, there: int, free: int | None, divide: Divide
) -> Placement:
    """Choose the number of devices: all that leave the least on each, or one.

    Args:
        weights: bytes of weights on each device, by the number that they are divided over.
        beside: bytes on each beside them.
        there: how many devices there are.
        free: bytes that are free on each; None where that is not known.
        divide: "auto" divides what does not fit into one.

    Raises:
        UsageError: `divide` is "always", and no number of devices divides the weights.
    """
    # A number that divides few matrices leaves more on each than a smaller one.
    most = min(range(1, there + 1), key=weights)
    if divide == "always" and most == 1:
        msg = f"divide always was asked for, and the weights cannot be divided over {there} device{'s'[: there > 1]}: "
        raise UsageError(msg + "leave it out")
    fits = free is None or weights(1) + beside <= free
    devices = most if divide == "always" or (divide == "auto" and not fits) else 1
    return Placement(devices, there, weights(devices), weights(1), beside, free)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
