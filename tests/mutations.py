"""Hostile changes to bytes and JSON, chosen by a `random.Random`: of hypothesis in tests, seeded in tools."""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 31, 255, 1 << 15, (1 << 16) - 1, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
NUMBERS += (1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PATHS = (
    "../x.safetensors",
    "/etc/passwd",
    "..\\x.safetensors",
    "a/b.safetensors",
    "x\0.safetensors",
    "C:x.safetensors",
)
TEXTS = (
    "",
    " ",
    "\n",
    "\x1b[2J",
    "\0",
    "\ud800",
    "\u2028",
    "é" * 300,
    "x" * 5000,
    "nan",
    "LORA",
    "(",
    "(a+)+$",
    "a" * 300,
)
TEXTS += ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "gptq", "awq", "fp8", "bitsandbytes", "llama")


def mutated_bytes(rng: Random, data: bytes) -> bytes:
    """Make one to three changes: bits, numbers of 1 to 8 bytes, pieces cut, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed) + 1)
        rng.choice(_BYTE_CHANGES)(rng, changed, place)
    return bytes(changed)


def _flip(rng: Random, data: bytearray, place: int) -> None:
    if place < len(data):
        data[place] ^= 1 << rng.randrange(8)


def _number(rng: Random, data: bytearray, place: int) -> None:
    code, bits = rng.choice((("<B", 8), ("<H", 16), ("<I", 32), ("<Q", 64)))
    raw = struct.pack(code, rng.choice(NUMBERS) % (1 << bits))
    data[place : place + len(raw)] = raw


def _noise(rng: Random, data: bytearray, place: int) -> None:
    raw = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    data[place : place + (len(raw) if rng.random() < 0.5 else 0)] = raw


def _cut(rng: Random, data: bytearray, place: int) -> None:
    del data[place : place + rng.choice((1, 4, 8, 64, 1 << 30))]


def _double(rng: Random, data: bytearray, place: int) -> None:
    piece = data[place : place + rng.choice((1, 4, 8, 64))]
    where = rng.randrange(len(data) + 1)
    data[where:where] = piece


_BYTE_CHANGES: tuple[Callable[[Random, bytearray, int], None], ...] = (_flip, _number, _noise, _cut, _double)


def hostile_value(rng: Random) -> Any:
    """Return an unexpected JSON value."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(NUMBERS) * rng.choice((1, 1, -1))
    if kind == 1:
        return rng.choice((None, True, False, {}, [], [[]], {"": {}}, [None], [True]))
    if kind == 2:
        return rng.choice((0.0, -0.0, 0.5, 1.0, 2.5, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan")))
    if kind == 3:
        return rng.choice(PATHS)
    if kind == 4:
        return nested(rng.choice((3, 100, 900, 5000)), rng.random() < 0.5)
    if kind == 5:
        return [rng.choice(NUMBERS) for _ in range(rng.choice((1, 2, 3, 64, 70)))]
    if kind == 6:
        return Raw(rng.choice(("1e999", "9" * 5000, "-9" * 3, "NaN", "-Infinity", "01", "1" + "0" * 400)))
    return rng.choice(TEXTS)


class Raw(str):
    """Text to insert into JSON unquoted."""

    __slots__ = ()


def nested(depth: int, objects: bool) -> Raw:
    """Return nested brackets as text; the JSON encoder itself would refuse that depth."""
    return Raw('{"a":' * depth + "1" + "}" * depth if objects else "[" * depth + "]" * depth)


def mutated_json(rng: Random, value: Any) -> bytes:
    """Return the JSON text of a value with one to three changes in its tree, sometimes with damaged bytes."""
    tree = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        tree = _changed(rng, tree)
    text = encoded(rng, tree)
    return mutated_bytes(rng, text) if rng.random() < 0.1 else text


def _changed(rng: Random, tree: Any) -> Any:
    places = list(_places(tree))
    if not places:
        return hostile_value(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, there = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[there], default=str)) if not isinstance(other[there], Raw) else 0
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice((*TEXTS, *PATHS, "__metadata__"))] = holder.pop(key)
    elif kind == 3 and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1, -holder[key], holder[key]))
    else:
        holder[key] = hostile_value(rng)
    return tree


def _places(tree: Any):
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def encoded(rng: Random, tree: Any) -> bytes:
    """Encode JSON as bytes; sometimes an object names a key twice."""
    if isinstance(tree, Raw):
        return tree.encode()
    if isinstance(tree, dict):
        pairs = [(key, encoded(rng, value)) for key, value in tree.items()]
        if pairs and rng.random() < 0.02:
            pairs.append((rng.choice(pairs)[0], rng.choice(pairs)[1]))
        return b"{" + b",".join(json.dumps(key).encode() + b":" + text for key, text in pairs) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(encoded(rng, value) for value in tree) + b"]"
    return json.dumps(tree).encode()
