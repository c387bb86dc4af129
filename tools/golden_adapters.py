"""Move tiny adapters by every method, and compare the numbers with those of an earlier run.

    python tools/golden_adapters.py before.json          # before a change: writes the digests
    python tools/golden_adapters.py before.json          # after it: compares, and exits with 1 if any differ
    python tools/golden_adapters.py before.json --real   # with SmolLM2-135M and Gemma-3-270M too, which takes minutes

Each method of the registry moves one adapter where its shapes allow: between twins (equal weights) and between unequal
bases. A digest is that of the factors of all modules, so a change in the last bit of one number is seen. Digests
are those of one machine, one version of JAX and one number of threads: make both runs alike.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jcrosslora as jcl
from jcrosslora.errors import JCrossLoRAError

# Small fits: what is compared is that the same numbers come out, not how good they are.
FIT = {"completions": 48, "passes": 1, "answer_tokens": 6, "discovery": 0, "fit_rank": 4, "compared_tokens": 400}
REAL_METHODS = ("copy", "cross-lora", "theseus", "distill")
REAL_FIT = {"completions": 48, "passes": 1, "answer_tokens": 8, "discovery": 0}


def main() -> None:
    """Parse the command line, move the adapters, and write or compare the digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file with the digests; written where it is missing")
    parser.add_argument("--real", action="store_true", help="move the demo's adapter between the demo's bases as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(tiny_digests(Path(folder)))
    if arguments.real:
        found |= dict(real_digests())
    if not arguments.file.exists():
        arguments.file.write_text(json.dumps(found, indent=1) + "\n")
        sys.exit(f"{len(found)} digests written to {arguments.file}")
    before = json.loads(arguments.file.read_text())
    differ = [name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)]
    for name in differ:
        print(f"{name}: was {before.get(name)}, is {found.get(name)}")
    sys.exit(f"{len(differ)} of {len(found)} differ" if differ else None)


def tiny_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield a digest for each method and pair of tiny bases, or the error that came instead."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from probe_bases import CORPUS, write_base
    from tiny_bases import random_adapter

    source = jcl.open_base(write_base(folder / "source", 30, bos=True, layers=2))
    twin = jcl.open_base(write_base(folder / "twin", 30, bos=True, layers=2))
    other = jcl.open_base(write_base(folder / "other", 90, layers=3, hidden=32, head_dim=8, seed=1))
    adapter = random_adapter(source, scale=0.3)
    for name in jcl.methods.METHODS:
        for pair, target in {"twin": twin, "other": other}.items():
            found = _digest(adapter, source, target, name, FIT, prompts=CORPUS)
            yield f"{name}, {pair}", found.replace(str(folder), "")  # errors name the bases


def real_digests() -> Iterator[tuple[str, str]]:
    """Yield a digest for some methods on the demo's bases."""
    from rich.console import Console

    from jcrosslora.session.demo.fetch import fetch_models
    from jcrosslora.session.demo.run import SOURCE_ADAPTER, shipped

    source, target = map(jcl.open_base, fetch_models(None, Console(stderr=True)))
    with shipped(SOURCE_ADAPTER) as adapter:
        for name in REAL_METHODS:
            yield f"{name}, real", _digest(adapter, source, target, name, REAL_FIT)


def _digest(adapter: Any, source: Any, target: Any, name: str, fit: dict[str, Any], **options: Any) -> str:
    method = jcl.methods.make_method(name)
    known = {key: value for key, value in fit.items() if hasattr(method, key)}
    try:
        made = jcl.methods.make_method(name, known)
        moved = jcl.transfer(adapter, source, target, made, cache=False, effect="never", **options).adapter
    except JCrossLoRAError as error:
        return f"error: {error}"
    digest = hashlib.sha256()
    for module, factors in sorted(moved.modules.items()):
        for part in (factors.a, factors.b, np.float32(factors.scale)):
            digest.update(module.encode() + np.ascontiguousarray(np.asarray(part)).tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
