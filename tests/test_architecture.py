"""The rooms of the package: imports point down, and no files import each other in a circle."""

import ast
import graphlib
import re
import runpy
from pathlib import Path

import jcrosslora

ROOT = Path(jcrosslora.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
# From the bottom to the top, as the page has them from the top; a room imports from itself and from rooms before it.
ROOMS = ("errors", *reversed(re.findall(r"^\| `(\w+)/` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)))
DATA = {"data"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, those inside functions and for type checks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {name if (name := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
    return {name for name in found if name in FILES and name != "jcrosslora"}


def room(module: str) -> str:
    return module.split(".")[1]


def test_root_holds_only_the_public_names_and_the_errors():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files - {"__main__.py"} == {"__init__.py", "errors.py"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders - DATA == set(ROOMS) - {"errors"}


def test_imports_point_down():
    upward = [
        f"{module} imports {name}"
        for module, path in FILES.items()
        if module.count(".") and room(module) in ROOMS
        for name in imports(path)
        if ROOMS.index(room(name)) > ROOMS.index(room(module))
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imports(path) for name, path in FILES.items() if name != "jcrosslora"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_pictures_of_the_page_are_those_of_today():
    tool = runpy.run_path(str(PAGE.parent.parent / "tools" / "draw_architecture.py"))
    for name, draw in tool["PICTURES"].items():
        assert (PAGE.parent / "images" / name).read_text(encoding="utf-8") == draw(), "run tools/draw_architecture.py"
