"""The public names: listed once, imported when first used, and visible to type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jcrosslora as jcl


def run(code: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_can_be_imported():
    for name in dir(jcl):
        assert getattr(jcl, name) is not None


def test_dir_shows_the_public_names_and_nothing_else():
    names = dir(jcl)
    assert {"transfer", "align", "shift", "methods", "errors", "__version__"} <= set(names)
    assert not [name for name in names if name.startswith("_") and name != "__version__"]
    import jcrosslora.linalg  # noqa: F401  # an internal room that has been imported is still not shown

    assert dir(jcl) == names


def test_a_star_import_brings_the_public_names():
    found: dict[str, object] = {}
    exec("from jcrosslora import *", found)
    assert set(dir(jcl)) - {"__version__"} <= set(found)


def test_type_checkers_see_the_names_that_the_table_lists():
    tree = ast.parse(Path(jcl.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (node.module, alias.asname) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    listed = {(f"jcrosslora.{module}", name) for module, names in jcl._MODULES.items() for name in names}
    assert seen == listed | {("jcrosslora", name) for name in jcl._PUBLIC_MODULES}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jcrosslora' has no attribute 'tranfer'"):
        _ = jcl.tranfer  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_none_of_its_rooms_or_libraries():
    code = (
        "import sys, jcrosslora; print(sorted(n for n in sys.modules if n.split('.')[0] in {%s} "
        "or '.' in n and n.startswith('jcrosslora')))"
    )
    heavy = ("jax", "flax", "numpy", "transformers", "huggingface_hub", "tyro", "rich", "torch")
    assert run(code % ", ".join(map(repr, heavy))) == "[]"
