"""The rates of accelerators by their makers, and the time of a program that reads its weights once, on paper."""

from dataclasses import dataclass

SHARE, SHARE_READ = 0.4, 0.7  # of a device's rates that such programs usually reach
FREE = 0.92  # of a device's memory that JAX may use


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        rate: dense products of bfloat16, TFLOP/s; of float32 where it has none of bfloat16.
        bandwidth: of its memory, TB/s.
        memory: GB.
        link: to its neighbours, in one direction, TB/s.
    """

    rate: float
    bandwidth: float
    memory: float
    link: float

    def seconds(self, operations: float, read: float, sent: float = 0.0, devices: int = 1) -> float:
        """Give the longer of computing and reading, each divided over the devices, and the sending behind it.

        Args:
            operations: of all devices.
            read: bytes of all devices.
            sent: bytes that each device sends.
            devices: how many there are.
        """
        computing = operations / (devices * SHARE * self.rate * 1e12)
        reading = read / (devices * SHARE_READ * self.bandwidth * 1e12)
        return max(computing, reading) + sent / (SHARE_READ * self.link * 1e12)

    def holds(self, size: float) -> bool:
        """Say whether so many bytes fit."""
        return size < FREE * 1e9 * self.memory


DEVICES = {
    "H100": Device(989, 3.35, 80, 0.45),  # SXM
    "A100": Device(312, 2.04, 80, 0.3),  # SXM, 80 GB
    "L4": Device(121, 0.3, 24, 0.032),
    "T4": Device(8.1, 0.32, 16, 0.016),  # has no units for bfloat16
    "v5e": Device(197, 0.82, 16, 0.2),
}
