"""Locate the cache, of JAX's compiled programs too, and read its size limit; both can be set from the environment."""

import hashlib
import os
import platform
import re
import warnings
from pathlib import Path

import jax

from jcrosslora.errors import UsageError

_DEFAULT_LIMIT = 10 * 10**9
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_root() -> Path | None:
    """Return $JCROSSLORA_CACHE, else `jcrosslora` in $XDG_CACHE_HOME or ~/.cache; None for a user without a home.

    A leading ~ is expanded, because not every shell does it inside a variable.
    """
    try:
        if own := os.environ.get("JCROSSLORA_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "jcrosslora"
    except RuntimeError:
        return None


def cache_folder(kind: str) -> Path:
    """Return the cache folder of one kind of data, such as "models"; it is not created.

    Raises:
        UsageError: the user has no home folder and no environment variable names a cache.
    """
    root = cache_root()
    if root is None:
        msg = "no cache folder: the user has no home folder; set JCROSSLORA_CACHE to a folder"
        raise UsageError(msg)
    return root / kind


def cache_limit() -> int:
    """Return the bytes that cached arrays may take: $JCROSSLORA_CACHE_SIZE, such as 500MB or 20G, else 10 GB.

    Raises:
        UsageError: the variable is not a size.
    """
    stated = os.environ.get("JCROSSLORA_CACHE_SIZE") or str(_DEFAULT_LIMIT)
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)B?", stated.strip().upper())
    if found is None:
        msg = f"JCROSSLORA_CACHE_SIZE is {stated!r}, wanted a number of bytes such as 500MB or 20G; 0 turns it off"
        raise UsageError(msg)
    return int(float(found[1]) * _UNITS[found[2]])


_MAX_BYTES = 512 * 2**20  # beyond which the least recently used programs are removed
_MIN_COMPILE_SECONDS = 0.1  # from which a program is kept
# What JAX warns of where another process holds the lock of the folder; the program is then compiled and not kept.
_LOCKED = r"Error (reading|writing) persistent compilation cache entry for '[^']*': Timeout"


def keep_compiled() -> None:
    """Turn on JAX's compilation cache in the user's cache folder, unless the environment names another.

    JAX compiles a damaged program again, with a warning; one that another process keeps it from reading, without. If
    the folder cannot be written to, nothing is kept. Each kind of processor has its own folder, because a program for
    one may not run on another.
    """
    root = cache_root()
    if root is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = root / "compiled" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    warnings.filterwarnings("ignore", _LOCKED)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def processor() -> str:
    """Return a name for the kind of processor, of 16 characters: a program compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    stated = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{stated}".encode()).hexdigest()[:16]
