"""Write a folder or a file atomically, completely or not at all; and read the user's files.

Only regular files are read, because a pipe or a device may never end.
"""

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jcrosslora.errors import OutputError
from jcrosslora.utils.unfinished import NEW, OLD, remove_unfinished, unfinished

# A folder with one of these files is an adapter or an output of this package, and may be overwritten on request.
MARK = "adapter_config.json"
MARKS = (MARK, "adapter.gguf", "merge_report.json")
# Bytes of a configuration, a tokenizer, a recipe, a template, an index: the largest known, of tokenizers, have 40 MB.
SMALL = 128 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int | None:
    """Read a number of bytes such as 500MB or 20G; None if the text is not a size."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def output_path(out: str | Path) -> Path:
    """Expand ~ in the path of an output; an `OutputError` says that there is no such home folder."""
    try:
        return Path(out).expanduser()
    except RuntimeError as error:
        raise OutputError(f"{out}: no such home folder: choose another output") from error


def ensure_free(out: str | Path, overwrite: bool) -> None:
    """Check that a folder can be written, before any work is done for it; remove what killed processes left there.

    `overwrite` allows to replace an empty folder, or one with one of `MARKS`. Raises OutputError if something exists
    there that may not be replaced, or the place cannot be written to.
    """
    out = output_path(out)
    if out.name in ("", ".."):
        raise OutputError(f"{out}: an output needs a name: give a folder to make, or to replace")
    remove_unfinished(out.parent, {out.name})
    if os.path.lexists(out):
        _check_replaceable(out, overwrite)
    parent = next(one for one in out.parents if os.path.lexists(one) or one == one.parent)
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file, expected a folder: choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} cannot be written to: choose another output, or change its permissions")


@contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Provide an empty temporary folder near `out`, and rename it to `out` when the block ends without an error.

    If the block or the rename fails, the temporary folder is removed and an old folder at `out` is as before. Missing
    parents are made, and removed again on failure. What may be replaced is as in `ensure_free`; a symbolic link is
    refused, not followed. Raises OutputError if `out` may not be replaced, or the system refuses to write (no
    permission, disk full).
    """
    out = output_path(out)
    ensure_free(out, overwrite)
    made: list[Path] = []
    try:
        _make_parents(out.parent, made)
        with unfinished(out) as work:
            new = work / NEW
            new.mkdir()
            yield new
            sync_folder(new)
            if os.path.lexists(out):  # another process may have made it in the meantime
                _check_replaceable(out, overwrite)
            _put_in_place(new, out, work / OLD)
    except BaseException as error:
        for folder in reversed(made):
            with suppress(OSError):  # something else may be in it by now
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            msg = f"{out}: cannot be written ({reason}): make it writable, free space, or choose another output"
            raise OutputError(msg) from error
        raise


def sync_folder(folder: Path) -> None:
    """Flush all files below a folder to the disk; OSError if that fails, such as on a full one."""
    for path in filter(Path.is_file, folder.rglob("*")):
        _sync_file(path)


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path is that of an output folder, or lies in it."""
    inner, outer = (output_path(one).absolute() for one in (path, folder))
    return inner == outer or outer in inner.parents


def write_whole(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file next to `path` and rename it into place, so that no reader sees a part of it.

    The folder must exist. With `sync` the file is flushed to the disk before the rename and survives a power failure.
    Raises OSError if the file cannot be written; an old one is as before.
    """
    with unfinished(path, file=True) as work:
        work.write_bytes(content)
        if sync:
            _sync_file(work)
        work.replace(path)


def write_output(path: Path, content: bytes, advice: str) -> None:
    """Write a file of the user's as `write_whole` does; an `OutputError` ends with `advice`, what to do."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}): {advice}") from error


def regular_size(path: Path) -> int:
    """Return the size in bytes of a regular file, or of the one that a link leads to; OSError for all else."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def read_file(path: Path) -> bytes:
    """Read a regular file of any size; `strerror` of an OSError says why that cannot be done."""
    regular_size(path)
    return path.read_bytes()


def read_small(path: Path, most: int = SMALL) -> bytes:
    """Read a regular file up to a size in bytes; `strerror` of an OSError says why it cannot be read."""
    size = regular_size(path)
    if size > most:
        raise OSError(errno.EFBIG, f"{size / 1e6:.0f} MB, and at most {most / 1e6:.0f} MB of such a file", str(path))
    return path.read_bytes()


def read_small_text(path: Path, most: int = SMALL) -> str:
    r"""Read a small file of UTF-8 text as `read_small` does, with \n at the ends of lines."""
    return io.TextIOWrapper(io.BytesIO(read_small(path, most)), encoding="utf-8").read()


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or not out.is_dir():
        kind = "a symbolic link" if out.is_symlink() else "a file"
        raise OutputError(f"{out}: {kind} exists there, expected a new folder: choose another output")
    try:
        names = os.listdir(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be read ({error.strerror}): choose another output") from error
    if not overwrite:
        msg = f"{out}: exists already: choose another output, or replace it with --overwrite (overwrite=True)"
        raise OutputError(msg)
    if names and not set(MARKS) & set(names):
        marks = " or ".join(MARKS)
        msg = f"{out}: not replaced, because it holds no {marks}: choose another output, or remove it yourself"
        raise OutputError(msg)
    if folders := [name for name in names if (out / name).is_dir()]:
        raise OutputError(f"{out}: not replaced, because it holds folders ({folders[0]}): choose another output")


def _make_parents(folder: Path, made: list[Path]) -> None:
    if folder.is_dir():
        return
    _make_parents(folder.parent, made)
    with suppress(FileExistsError):  # another process may make the same parents
        folder.mkdir()
        made.append(folder)


def _put_in_place(new: Path, out: Path, old: Path) -> None:
    try:
        if out.is_dir():
            out.rename(old)
        new.rename(out)
    except BaseException:
        # Also on an interrupt between or just after the two renames, the old folder is restored.
        if old.exists():
            if out.exists():
                out.rename(new)
            old.rename(out)
        raise
    _sync_entry(out.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_entry(folder: Path) -> None:
    # Some file systems cannot sync a folder; the rename is done by then.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
