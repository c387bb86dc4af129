"""Files, memory, progress, untrusted text, logs; and the versions of packages."""

import functools
import importlib.metadata


@functools.cache
def version(package: str = "jcrosslora") -> str:
    """Return the version of an installed package, whose metadata is read once: that takes a millisecond."""
    return importlib.metadata.version(package)
