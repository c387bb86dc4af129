"""Where things are kept, and how much of them: both can be set from the environment."""

import os
import re
from pathlib import Path

from jcrosslora.errors import UsageError

DEFAULT_LIMIT = 10 * 10**9
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_root() -> Path | None:
    """$JCROSSLORA_CACHE, else `jcrosslora` in $XDG_CACHE_HOME or in ~/.cache; None for a user without home.

    A ~ in front is the home, also where no shell has made it that.
    """
    try:
        if own := os.environ.get("JCROSSLORA_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "jcrosslora"
    except RuntimeError:
        return None


def cache_limit() -> int:
    """Bytes that factors and transports may take: $JCROSSLORA_CACHE_SIZE, such as 500MB or 20G, else 10 GB.

    Raises:
        UsageError: the variable holds something else.
    """
    stated = os.environ.get("JCROSSLORA_CACHE_SIZE") or str(DEFAULT_LIMIT)
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)B?", stated.strip().upper())
    if found is None:
        msg = f"JCROSSLORA_CACHE_SIZE is {stated!r}, wanted a number of bytes such as 500MB or 20G; 0 keeps nothing"
        raise UsageError(msg)
    return int(float(found[1]) * _UNITS[found[2]])
