"""A safetensors file as bytes."""

import json

import numpy as np
import safetensors.numpy


def serialized(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The file as bytes, the same for the same content: safetensors writes metadata in an order that varies."""
    data = safetensors.numpy.save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]
