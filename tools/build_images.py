"""Build the container images, for a CPU and for NVIDIA GPUs, from locked requirements.

    python tools/build_images.py                        # jcrosslora:cpu and jcrosslora:cuda12
    python tools/build_images.py cpu --name registry.example/jcrosslora --builder podman
    python tools/build_images.py --lock                 # lock the newest versions; needs uv (pip install uv)

The locks are tools/docker/requirements-cpu.txt, the package with its extras gguf, plot and ray, and
requirements-cuda12.txt, what jax[cuda12] needs beside it: exact versions with the digests of their files. Each image is
run once behind its build.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "tools" / "docker"
KINDS = {"cpu": (), "cuda12": ("jax[cuda12]",)}
EXTRAS = ("gguf", "plot", "ray")
BUILD = ("hatchling",)  # builds the package itself, in the image
PYTHON = "3.13"  # as in the Dockerfile
BUILDERS = ("docker", "podman")


def lock_file(kind: str) -> Path:
    """Return the place of a lock."""
    return DOCKER / f"requirements-{kind}.txt"


def lock() -> None:
    """Write the locks: that of the CPU first, and what each other kind needs beside it."""
    common = resolved(())
    lock_file("cpu").write_text(joined(common), encoding="utf-8")
    for kind, needs in KINDS.items():
        if kind != "cpu":
            more = resolved(needs, lock_file("cpu"))
            beside = {name: block for name, block in more.items() if name not in common}
            lock_file(kind).write_text(joined(beside), encoding="utf-8")


def resolved(needs: Sequence[str], kept: Path | None = None) -> dict[str, str]:
    """Resolve the package with its extras and `needs` for Linux; return the lines of each requirement by its name.

    Args:
        needs: further requirements.
        kept: a lock whose versions are kept.
    """
    command = [_found("uv"), "pip", "compile", "--quiet", "pyproject.toml", "-", "--python-version", PYTHON]
    command += ["--universal", "--generate-hashes", "--no-annotate", "--no-header"]
    command += [option for extra in EXTRAS for option in ("--extra", extra)]
    command += [] if kept is None else ["--constraints", str(kept)]
    given = "\n".join((*BUILD, *needs))
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"build_images: uv cannot resolve the requirements: {done.stderr.strip()}")
    return blocks(done.stdout)


def blocks(text: str) -> dict[str, str]:
    """Split a lock into the lines of each requirement, by its name."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)(==[^\n]*\n(?: [^\n]*\n)*)", text, re.MULTILINE)
    return {name: name + rest for name, rest in found}


def joined(requirements: dict[str, str]) -> str:
    """Return the text of a lock."""
    return "# Written by tools/build_images.py --lock.\n" + "".join(requirements.values())


def build(kinds: Sequence[str], name: str, builder: str) -> None:
    """Build an image of each kind, and run it once."""
    for kind in kinds:
        image = f"{name}:{kind}"
        command = [builder, "build", "--file", str(DOCKER / "Dockerfile"), "--build-arg", f"ACCELERATOR={kind}"]
        _run([*command, "--tag", image, str(ROOT)])
        _run([builder, "run", "--rm", image, "--version"])


def _run(command: Sequence[str]) -> None:
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(f"build_images: {' '.join(command)} failed with exit code {code}, see above")


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        sys.exit(f"build_images: {program} is not here: install it, or take another machine")
    return path


def _builder(named: str | None) -> str:
    """Return the builder that answers: a client without an engine does not."""
    for program in (named,) if named else BUILDERS:
        if shutil.which(program) is None:
            continue
        if subprocess.run([program, "info"], capture_output=True, check=False).returncode == 0:
            return program
    sys.exit(f"build_images: no builder answers ({named or ', '.join(BUILDERS)}): start one, or name it with --builder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"those to build: {', '.join(KINDS)}; all if left out")
    parser.add_argument("--name", default="jcrosslora", help="name of the images, without the tag")
    parser.add_argument("--builder", help=f"the program that builds; the first of {', '.join(BUILDERS)} that answers")
    parser.add_argument("--lock", action="store_true", help="lock the newest versions, and build nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"there is no image {min(unknown)!r}: name {' or '.join(KINDS)}")
    if arguments.lock:
        lock()
        return
    build(arguments.kinds or list(KINDS), arguments.name, _builder(arguments.builder))


if __name__ == "__main__":
    main()
