"""The public names: listed once, imported when first used, and visible to type checkers."""

import ast
import importlib
import inspect
import pickle
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


def test_type_checkers_see_the_names_that_can_be_imported():
    tree = ast.parse(Path(jcl.__file__).with_suffix(".pyi").read_text())
    seen = {
        (node.module, alias.name, alias.asname)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for _, name, _ in seen} == set(dir(jcl)) - {"__version__"}
    for module, name, shown in seen:
        assert name == shown  # or type checkers take it for private
        assert inspect.unwrap(getattr(jcl, name)) is inspect.unwrap(getattr(importlib.import_module(str(module)), name))


def test_functions_keep_their_signature_and_can_be_pickled():
    assert list(inspect.signature(jcl.compare_bases).parameters) == ["source", "target"]
    assert pickle.loads(pickle.dumps(jcl.transfer)) is jcl.transfer


def test_the_methods_show_public_names_alone():
    names = dir(jcl.methods)
    assert {"Distill", "Copy", "Theseus", "MapMethod", "register_method"} <= set(names)
    assert all(hasattr(jcl.methods, name) for name in names)
    assert not {"Any", "M", "TypeVar", "os", "sys", "dataclasses", "importlib", "copy", "theseus"} & set(names)


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
