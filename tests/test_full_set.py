"""Which cases of a table run by default: a kind that joins the table does, and a case that left it is missed."""

import pytest
from full_set import first_of_each, full_except


def by_default(cases):
    """The cases without the mark."""
    return [case for case in cases if not getattr(case, "marks", ())]


def test_the_first_case_of_every_group_runs_by_default():
    cases = [("a", 1), ("a", 2), pytest.param("b", 1, id="first"), pytest.param("b", 2, id="second")]
    marked = first_of_each(cases, lambda case: getattr(case, "values", case)[0])
    assert by_default(marked) == [("a", 1), cases[2]]
    assert [case.values for case in marked if case not in by_default(marked)] == [("a", 2), ("b", 2)]
    assert marked[3].id == "second"


def test_a_case_to_keep_that_is_not_in_the_table_is_named():
    marked = full_except({"a": 1, "b": 2}, ["b"])
    assert by_default(marked) == ["b"]
    assert [mark.name for mark in marked[0].marks] == ["full"]
    with pytest.raises(AssertionError, match=r"not in the table: \['c'\]"):
        full_except(["a"], ["a", "c"])
