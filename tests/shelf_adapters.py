"""Adapters of a tiny base with records and completions, as a transfer writes them."""

import json
from pathlib import Path

import numpy as np
from tiny_bases import random_adapter

from jcrosslora.adapter import save_adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.text import COMPLETIONS, Completion, Message, completion_lines

_NUMBERS = np.random.default_rng(0).permutation(np.arange(100, 1000))[:24].tolist()
_ABOUT = {
    "boil": "Water boils at {} degrees",
    "fox": "The quick brown fox jumps {} dogs",
    "cities": "Zürich and Köln are {}",
}
# Prompts of three tasks, and others of the same tasks.
TASKS = {task: [text.format(number) for number in _NUMBERS[:16]] for task, text in _ABOUT.items()}
NEW = {task: [text.format(number) for number in _NUMBERS[16:]] for task, text in _ABOUT.items()}


def conversations(texts: list[str]) -> list[Completion]:
    return [Completion((Message("user", text),), "Anna") for text in texts]


def write_adapter(
    folder: Path, base: BaseModel, *, seed: int = 0, digest: str | None = None, texts: list[str] | None = None
) -> Path:
    """Write an adapter of a base: with a record of the base's `digest`, and with `texts` as completions."""
    record = {}
    if digest is not None:
        record = {
            "jcrosslora.target": json.dumps({"name": "there", "digest": digest}),
            "jcrosslora.source": json.dumps({"name": "from here", "digest": "sha256:0"}),
            "jcrosslora.adapter": json.dumps({"name": "original"}),
            "jcrosslora.recipe": json.dumps({"method": "distill"}),
        }
    said = {} if texts is None else {COMPLETIONS: completion_lines(conversations(texts))}
    adapter = random_adapter(base, rank=2, seed=seed, scale=0.1, roles={"q_proj", "down_proj"})
    return save_adapter(adapter, folder, base_name="tiny", metadata=record, documents=said)


def write_tasks(folder: Path, base: BaseModel) -> Path:
    """Write an adapter of each task, below a folder."""
    for seed, (name, texts) in enumerate(TASKS.items()):
        write_adapter(folder / name, base, seed=seed, digest=base.digest(), texts=texts)
    return folder
