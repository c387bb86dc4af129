"""Keep compiled programs on disk by JAX's own cache, so that later commands need not compile them again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from jcrosslora.cache.place import cache_root

_MAX_BYTES = 512 * 2**20  # beyond which the least recently used programs are removed
_MIN_COMPILE_SECONDS = 0.1  # from which a program is kept


def keep_compiled() -> None:
    """Turn on JAX's compilation cache in the user's cache folder, unless the environment names another.

    JAX compiles a damaged program again, with a warning. If the folder cannot be written to, nothing is kept. Each
    kind of processor has its own folder, because a program for one may not run on another.
    """
    root = cache_root()
    if root is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = root / "compiled" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    stated = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{stated}".encode()).hexdigest()[:16]
