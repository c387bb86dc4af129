"""What of a table of cases runs by default; the rest has the mark `full`, and runs in `.ci/run`.

The quick set holds each behaviour once: one case of each kind, format and engine, each method on one pair of shapes,
and families that together have every part of a layer.
"""

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

import pytest


def full_except(cases: Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """Mark as `full` all cases of a table but those to keep, each of which has to be in it."""
    cases = list(cases)
    missing = [case for case in keep if case not in cases]
    assert not missing, f"not in the table: {missing}"
    return [case if case in keep else _full(case) for case in cases]


def first_of_each(cases: Iterable[Any], of: Callable[[Any], Hashable]) -> list[Any]:
    """Mark as `full` all cases but the first of each group, so that a new group runs by default.

    Args:
        cases: the cases of a table, in its order.
        of: returns the group of a case.
    """
    seen: set[Hashable] = set()
    marked = []
    for case in cases:
        group = of(case)
        marked.append(_full(case) if group in seen else case)
        seen.add(group)
    return marked


def _full(case: Any) -> Any:
    """Mark a case; a tuple is one of several arguments."""
    if hasattr(case, "marks"):  # made by `pytest.param`
        return case._replace(marks=(*case.marks, pytest.mark.full))
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.full)
