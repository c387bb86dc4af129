"""Write a safetensors file block by block, in the memory of one block."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from jcrosslora.checkpoint.safetensors import DTYPES


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        dtype: its name in the header, e.g. "BF16".
        shape: its shape.
        blocks: yields its rows in order as arrays of that dtype; called once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """Number of its bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write_pieces(
    path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], written: Callable[[int], object]
) -> None:
    """Write a safetensors file.

    Args:
        path: the file to make.
        pieces: its tensors. Wider dtypes come first in the file, so that every tensor is aligned to its items.
        metadata: of the header.
        written: called with the number of bytes after each block.

    Raises:
        OSError: it cannot be written.
    """
    pieces = sorted(pieces, key=lambda piece: -DTYPES[piece.dtype].itemsize)
    with path.open("wb") as file:
        file.write(_header(pieces, metadata))
        for piece in pieces:
            left = piece.size
            for block in piece.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                file.write(data)
                left -= data.nbytes
                written(data.nbytes)
            assert left == 0, f"{piece.name}: {left} bytes of {piece.size} are missing"


def _header(pieces: Iterable[Piece], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for piece in pieces:
        offsets = [start, start + piece.size]
        entries[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
