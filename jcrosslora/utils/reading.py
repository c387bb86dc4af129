"""Read files of the user's: regular ones alone, as a pipe may never end and a device never does."""

import errno
import io
import os
import stat
from pathlib import Path

# Bytes of a configuration, a tokenizer, a recipe, a template, an index: the largest known, of tokenizers, have 40 MB.
SMALL = 128 << 20


def regular_size(path: Path) -> int:
    """Return the size in bytes of a regular file, or of the one that a link leads to.

    Raises:
        OSError: it is not there, or is something else.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def read_file(path: Path) -> bytes:
    """Read a regular file of any size.

    Raises:
        OSError: it cannot be read, or is no regular file; `strerror` says why.
    """
    regular_size(path)
    return path.read_bytes()


def read_small(path: Path, most: int = SMALL) -> bytes:
    """Read a regular file that is small by its kind.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `most` bytes; `strerror` says why.
    """
    size = regular_size(path)
    if size > most:
        raise OSError(errno.EFBIG, f"{size / 1e6:.0f} MB, and at most {most / 1e6:.0f} MB of such a file", str(path))
    return path.read_bytes()


def read_small_text(path: Path, most: int = SMALL) -> str:
    r"""Read a small file of UTF-8 text, with \n at the ends of lines.

    Raises:
        OSError: see `read_small`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return io.TextIOWrapper(io.BytesIO(read_small(path, most)), encoding="utf-8").read()
