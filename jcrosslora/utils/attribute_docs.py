"""The docstrings beneath the fields of a dataclass, which Python itself does not keep."""

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise


@cache
def attribute_docs(cls: type) -> dict[str, str]:
    """Return the docstring beneath each annotated attribute of a class and its bases, on one line each.

    Args:
        cls: a class whose source can be read; one whose source cannot gives nothing.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
                )
                if isinstance(text, str) and text:
                    found[field.target.id] = " ".join(text.split())
    return found
