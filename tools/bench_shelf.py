"""Time and memory of a shelf of many made-up adapters.

    python tools/bench_shelf.py [--adapters 1000 10000] [--width 640]

Vectors of samples are random, around a mean of each adapter, and stand for what an encoder makes of prompts: the time
of the encoder, and that of reading the adapters, come on top.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from jcrosslora.shelf import SAMPLES, ShelfBase, ShelfEntry
from jcrosslora.shelf.index import SEGMENT, Index
from jcrosslora.shelf.retrieval import MeanVectors, fit_means, word_retriever
from jcrosslora.shelf.searching import find_arrays, keep_arrays

WORDS = 5000


def peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"


def since(begun: float) -> float:
    return time.perf_counter() - begun


def made(number: int, width: int) -> tuple[ShelfEntry, np.ndarray]:
    """Make an adapter whose samples share words, and whose vectors share a mean."""
    rng = np.random.default_rng(number)
    own = rng.integers(0, WORDS, 20)
    texts = tuple(" ".join(f"w{word}" for word in rng.choice(own, 15)) for _ in range(SAMPLES))
    vectors = rng.standard_normal((SAMPLES, width), np.float32) + rng.standard_normal(width, np.float32)
    name = f"adapter-{number:05d}"
    digest = f"sha256:{number:064x}"
    entry = ShelfEntry(name, name, digest, True, "LoRA", 16, 126, 10_000_000, samples=texts, samples_from="completions")
    return entry, vectors


def bench(count: int, width: int, folder: Path) -> None:
    begun = time.perf_counter()
    index = Index.create(folder, ShelfBase("made up", "nowhere", "sha256:0", "none"), "hidden")
    for start in range(0, count, SEGMENT):
        index = index.change([made(number, width) for number in range(start, min(start + SEGMENT, count))])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{count} adapters: written in {since(begun):.1f} s, {size / 1e6:.0f} MB, {peak()}", flush=True)
    begun = time.perf_counter()
    index.change([made(count, width)])
    print(f"  one more: {since(begun):.2f} s", flush=True)
    index, begun = Index.open(folder), time.perf_counter()
    fitted = fit_means(index.blocks)
    arrays = {name: getattr(fitted, name) for name in ("center", "whiten", "means", "thresholds")}
    keep_arrays(folder / "text.safetensors", "key", arrays)
    print(f"  means and thresholds, behind every addition: {since(begun):.1f} s, {peak()}", flush=True)
    begun = time.perf_counter()
    index, found = Index.open(folder), find_arrays(folder / "text.safetensors", "key")
    assert found is not None
    means, opened = MeanVectors(**found), since(begun)
    begun = time.perf_counter()
    scores = means.scores(np.random.default_rng(0).standard_normal((1, width), np.float32))
    searched = since(begun)
    print(
        f"  search: opened in {opened:.2f} s, {searched * 1e3:.1f} ms for {scores.shape[1]} adapters, {peak()}",
        flush=True,
    )
    begun = time.perf_counter()
    words = word_retriever(index.entries)
    opened, begun = since(begun), time.perf_counter()
    words.scores(["w1 w2 w3"])
    print(
        f"  search by words: opened in {opened:.1f} s, {(since(begun)) * 1e3:.1f} ms, {peak()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--width", type=int, default=640)
    arguments = parser.parse_args()
    for count in arguments.adapters:
        with tempfile.TemporaryDirectory() as folder:
            bench(count, arguments.width, Path(folder) / "shelf")


if __name__ == "__main__":
    main()
