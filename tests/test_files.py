"""Folders appear completely or not at all, and old content survives every failure."""

import errno
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jcrosslora.errors import OutputError
from jcrosslora.utils.files import MARK, atomic_folder, ensure_free, write_whole
from jcrosslora.utils.unfinished import remove_unfinished, try_lock


def everything(root: Path) -> dict[str, str | None]:
    return {str(path.relative_to(root)): path.read_text() if path.is_file() else None for path in root.rglob("*")}


def old_adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / MARK).write_text("old")
    (folder / "more.txt").write_text("old too")
    return folder


def test_a_folder_appears_with_its_files_and_its_parents(tmp_path):
    out = tmp_path / "x" / "y" / "out"
    with atomic_folder(out) as work:
        (work / "a.txt").write_text("a")
        assert not out.exists()
        assert os.stat(work).st_dev == os.stat(out.parent).st_dev
    assert everything(tmp_path) == {"x": None, "x/y": None, "x/y/out": None, "x/y/out/a.txt": "a"}
    assert out.stat().st_mode & 0o055 == 0o055 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_old_adapter_is_replaced_when_asked(tmp_path):
    out = old_adapter(tmp_path / "out")
    with atomic_folder(out, overwrite=True) as work:
        (work / MARK).write_text("new")
    assert everything(tmp_path) == {"out": None, f"out/{MARK}": "new"}


def test_an_empty_folder_is_replaced_when_asked(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", overwrite=True) as work:
        (work / MARK).write_text("new")
    assert everything(tmp_path) == {"out": None, f"out/{MARK}": "new"}


def write_half_and_raise(out: Path, error: BaseException) -> None:
    with atomic_folder(out, overwrite=True) as work:
        (work / "half.txt").write_text("half")
        raise error


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
    ],
)
def test_a_failure_in_the_block_leaves_no_trace(tmp_path, existing, error, raised):
    out = tmp_path / "p" / "out"
    if existing:
        out.parent.mkdir()
        old_adapter(out)
    before = everything(tmp_path)
    with pytest.raises(raised) as caught:
        write_half_and_raise(out, error)
    assert everything(tmp_path) == before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_rename_restores_the_old_folder(tmp_path, monkeypatch, failing, error, late):
    """The first rename moves the old folder aside, the second the new one in; an interrupt may come after either."""
    out = old_adapter(tmp_path / "out")
    before, rename, calls = everything(tmp_path), Path.rename, []

    def fragile(self, target):
        calls.append(target)
        if len(calls) != failing:
            return rename(self, target)
        if late:
            rename(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", fragile)
    with (
        pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt),
        atomic_folder(out, overwrite=True) as work,
    ):
        (work / MARK).write_text("new")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("call", ["parent", "work"])
def test_a_parent_that_cannot_be_written_gives_a_one_line_error(tmp_path, monkeypatch, call):
    mkdir = Path.mkdir

    def refuse(folder, *rest, **more):
        if call == "parent" or folder.suffix == ".tmp":
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(folder, *rest, **more)

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OutputError, match="Permission denied"), atomic_folder(tmp_path / "p" / "out"):
        pytest.fail("the block must not run")
    monkeypatch.undo()
    assert everything(tmp_path) == {}


def left_of(out: Path, host: str, age: float = 0.0) -> Path:
    """Make the temporary folder of a killed process on a host."""
    digest = hashlib.sha256(host.encode()).hexdigest()[:8]
    folder = out.with_name(f".{out.name}.{digest}-0123abcd.tmp")
    (folder / "new").mkdir(parents=True)
    (folder / "new" / MARK).write_text("half")
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - age, time.time() - age))
    return folder


def test_unfinished_folders_are_removed_once_nobody_writes_to_them(tmp_path):
    here = platform.node()
    left_of(tmp_path / "a", here)
    left_of(tmp_path / "a", "elsewhere-long-ago", age=90_000)
    kept = [left_of(tmp_path / "b", here), left_of(tmp_path / "a", "elsewhere"), tmp_path / ".a.x.tmp"]
    kept[-1].mkdir()
    with atomic_folder(tmp_path / "a") as work:
        remove_unfinished(tmp_path, {"a"})
        assert work.is_dir()
        (work / MARK).write_text("whole")
    remove_unfinished(tmp_path / "none", {"a"})
    assert sorted(os.listdir(tmp_path)) == sorted([*(path.name for path in kept), "a"])


def test_a_pipe_with_the_name_of_an_unfinished_folder_holds_nobody_up(tmp_path):
    place = left_of(tmp_path / "a", platform.node())
    shutil.rmtree(place)
    os.mkfifo(place)
    write_whole(tmp_path / "a", b"whole")
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    made = []

    def late(folder, **more):
        if not made:
            folder.rmdir()
        made.append(folder)
        return try_lock(folder, **more)

    monkeypatch.setattr("jcrosslora.utils.unfinished.try_lock", late)
    with atomic_folder(tmp_path / "a") as work:
        (work / MARK).write_text("whole")
    assert len(made) == 2
    assert everything(tmp_path) == {"a": None, f"a/{MARK}": "whole"}


KILLED = """
import os, sys
from pathlib import Path
from jcrosslora.utils.files import MARK, atomic_folder
out, last = Path(sys.argv[1]), int(sys.argv[2])
calls = [0]
def die():
    if calls[0] == last:
        os.kill(os.getpid(), 9)
    calls[0] += 1
def counted(real):
    def call(*arguments, **settings):
        die()
        return real(*arguments, **settings)
    return call
for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (os, "fsync"), (os, "rmdir"),
                    (os, "unlink")):
    setattr(owner, name, counted(getattr(owner, name)))
with atomic_folder(out, overwrite=True) as work:
    (work / MARK).write_text("new")
    (work / "more.txt").write_text("new too")
print(calls[0])
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_writer_killed_at_any_moment_leaves_nothing_once_the_same_is_written_again(tmp_path, existing):
    old, new = {MARK: "old", "more.txt": "old too"}, {MARK: "new", "more.txt": "new too"}
    killed, last = True, 0
    while killed:
        out = tmp_path / str(last) / "out"
        out.parent.mkdir()
        if existing:
            old_adapter(out)
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(last)], check=False, capture_output=True)
        killed = done.returncode == -signal.SIGKILL
        assert killed or done.returncode == 0, done.stderr.decode()
        ensure_free(out, overwrite=True)
        assert os.listdir(out.parent) == (["out"] if existing or out.exists() else [])
        assert not out.exists() or everything(out) in ((old, new) if existing else (new,))
        with atomic_folder(out, overwrite=True) as work:
            for name, text in new.items():
                (work / name).write_text(text)
        assert everything(out.parent) == {"out": None, **{f"out/{name}": text for name, text in new.items()}}
        last += 1
    assert last > 8


def test_a_parent_that_cannot_be_written_to_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written to"):
        ensure_free(tmp_path / "out", overwrite=False)


def make_file(out: Path) -> None:
    out.write_text("mine")


def make_home(out: Path) -> None:
    out.mkdir()
    (out / "letter.txt").write_text("mine")


def make_checkpoints(out: Path) -> None:
    (old_adapter(out) / "checkpoint-100").mkdir()


def make_link(out: Path) -> None:
    out.symlink_to(old_adapter(out.with_name("elsewhere")))


@pytest.mark.parametrize("make", [make_file, make_home, make_checkpoints, make_link])
def test_a_folder_without_an_adapter_is_never_replaced(tmp_path, make):
    out = tmp_path / "out"
    make(out)
    before = everything(tmp_path)
    with pytest.raises(OutputError), atomic_folder(out, overwrite=True):
        pytest.fail("the block must not run")
    assert everything(tmp_path) == before


def test_a_folder_that_another_process_made_meanwhile_is_not_replaced(tmp_path):
    def write():
        with atomic_folder(tmp_path / "out") as work:
            (work / MARK).write_text("new")
            old_adapter(tmp_path / "out")

    with pytest.raises(OutputError, match="exists already"):
        write()
    assert everything(tmp_path) == {"out": None, f"out/{MARK}": "old", "out/more.txt": "old too"}


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    out = old_adapter(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        ensure_free(out, overwrite=False)
    ensure_free(out, overwrite=True)
    ensure_free(tmp_path / "new" / "deep", overwrite=False)
    with pytest.raises(OutputError, match="is a file"):
        ensure_free(out / MARK / "inside", overwrite=False)


@pytest.mark.parametrize("out", [".", "", "..", "inner/..", "/"])
def test_an_output_without_a_name_of_its_own_is_refused_before_any_work(tmp_path, monkeypatch, out):
    monkeypatch.chdir(old_adapter(tmp_path / "inner"))
    with pytest.raises(OutputError, match="an output needs a name"):
        ensure_free(out, overwrite=True)


def test_tilde_expands_to_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    with atomic_folder("~/out") as work:
        (work / MARK).write_text("new")
    assert everything(tmp_path) == {"me": None, "me/out": None, f"me/out/{MARK}": "new"}
    for refused in ("~/out", "~no-such-user/out"):
        with pytest.raises(OutputError, match=r"exists already|no such home"):
            ensure_free(refused, overwrite=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch, error, sync):
    path = tmp_path / "file.json"
    write_whole(path, b"old", sync=sync)

    def fail(self, target):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(type(error)):
            write_whole(path, b"new", sync=sync)
    assert everything(tmp_path) == {"file.json": "old"}
    write_whole(path, b"new", sync=sync)
    assert everything(tmp_path) == {"file.json": "new"}
