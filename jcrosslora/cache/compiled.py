"""Compiled programs, kept by JAX itself, so that a command does not compile what an earlier one has compiled."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from jcrosslora.cache.place import cache_root

# When they take more, those not used for longest go.
LIMIT = 512 * 2**20
# Seconds of compilation from which a program is kept.
WORTH = 0.1


def keep_compiled() -> None:
    """Turn JAX's compilation cache on, in the user's cache folder, unless the environment has set one up.

    A program that is damaged on the disk is compiled again, with a warning of JAX's; where the folder cannot be
    written to, nothing is kept. Each kind of processor has a folder of its own: a program for one may not run on
    another.
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
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    stated = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{stated}".encode()).hexdigest()[:16]
