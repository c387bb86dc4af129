"""The locks of the container images meet what the package asks for, and the script that builds says what is wrong."""

import re
import sys
import tomllib
from pathlib import Path

import build_images
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((build_images.ROOT / "pyproject.toml").read_text())["project"]
LOCKED = {kind: build_images.blocks(build_images.lock_file(kind).read_text()) for kind in build_images.KINDS}


def versions():
    """The locked version of every requirement, by its name."""
    both = LOCKED["cpu"] | LOCKED["cuda12"]
    return {name: Version(re.split(r"[\s;\\]", block.partition("==")[2])[0]) for name, block in both.items()}


def test_the_locks_meet_the_requirements_of_the_package():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(one for name in build_images.EXTRAS for one in extras[name])]
    found = versions()
    for requirement in map(Requirement, (*wanted, *build_images.BUILD)):
        assert found[canonicalize_name(requirement.name)] in requirement.specifier, f"{requirement}: lock anew"


def test_every_requirement_is_locked_by_digest():
    for kind, blocks in LOCKED.items():
        assert blocks
        assert all("--hash=sha256:" in block for block in blocks.values())
        assert build_images.joined(blocks) == build_images.lock_file(kind).read_text()


def test_what_cuda_needs_is_locked_beside_the_common_requirements():
    assert not set(LOCKED["cuda12"]) & set(LOCKED["cpu"])
    found = versions()
    assert found["jax-cuda12-plugin"] == found["jax"] == found["jaxlib"]


def test_the_image_has_the_python_of_the_lock():
    text = (build_images.DOCKER / "Dockerfile").read_text()
    assert set(re.findall(r"^FROM python:([\d.]+)", text, re.MULTILINE)) == {build_images.PYTHON}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rocm"], "there is no image 'rocm': name cpu or cuda12"),
        (["cpu", "--builder", "nothing-of-that-name"], r"no builder answers \(nothing-of-that-name\): start one"),
    ],
)
def test_what_cannot_be_built_is_said(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["build_images.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        build_images.main()
    assert re.search(said, str(ended.value) + capsys.readouterr().err)


def test_each_image_is_built_from_its_lock_and_run(monkeypatch, tmp_path):
    builder, log = tmp_path / "builder", tmp_path / "log"
    builder.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    builder.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["build_images.py", "--builder", str(builder), "--name", "registry/x"])
    build_images.main()
    lines = log.read_text().splitlines()
    assert lines[0] == "info"
    assert [line.split()[0] for line in lines[1:]] == ["build", "run"] * 2
    for kind, built, ran in zip(("cpu", "cuda12"), lines[1::2], lines[2::2], strict=True):
        assert f"--build-arg ACCELERATOR={kind} --tag registry/x:{kind}" in built
        assert ran == f"run --rm registry/x:{kind} --version"
        assert Path(built.split()[-1]) == build_images.ROOT
