"""Charge the work of a chat template's operations to its budget before they run.

These are the filters, tests and methods that templates of published models use. The sizes of the operands bound the
work and the size of the result of each.
"""

import json
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError, pass_eval_context
from jinja2.filters import FILTERS
from jinja2.tests import TESTS
from jinja2.utils import Namespace

# Cost of a value on top of its length; maximum nesting of values.
VALUE, _DEPTH = 10, 64
_BITS = 64  # of a whole number that is computed
_ESCAPED = 6  # characters that one becomes in JSON or where text marked safe is joined with other text
_LAZY = ["map", "reject", "rejectattr", "select", "selectattr"]  # they read an item when it is asked for
_OUTER = ["count", "d", "default", "first", "items", "last", "length", "list", "reverse"]  # they look at no item
_WHOLE = [
    *("abs", "capitalize", "dictsort", "float", "int", "lower", "max", "min", "safe", "sort", "string", "title"),
    *("unique", "upper"),
]
_TESTS = (
    "boolean callable defined false float integer iterable mapping none number sameas sequence string true undefined"
)
# Operators in the syntax tree, with the names of their tests.
_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "eq": ("== eq equalto", operator.eq),
    "ne": ("!= ne", operator.ne),
    "gt": ("> gt greaterthan", operator.gt),
    "gteq": (">= ge", operator.ge),
    "lt": ("< lt lessthan", operator.lt),
    "lteq": ("<= le", operator.le),
    "in": ("in", lambda value, values: value in values),
    "notin": ("", lambda value, values: value not in values),
}


class _Left:
    """The remaining work budget of the template."""

    work = 0

    def spend(self, work: int) -> None:
        """Subtract work; raise TemplateRuntimeError if the budget is exceeded."""
        self.work -= work
        if self.work < 0:
            raise TemplateRuntimeError("it does more work than a conversation needs")


LEFT = _Left()


def weigh(value: Any, depth: int = _DEPTH) -> None:
    """Spend the work of reading a whole value, as printing and comparing do; an item in two lists counts twice."""
    if isinstance(value, str):
        LEFT.spend(VALUE + len(value))
    elif isinstance(value, int):
        LEFT.spend(VALUE + value.bit_length())
    elif isinstance(value, Namespace) or not depth:
        msg = "it reads a namespace as a whole" if depth else f"it nests values more than {_DEPTH} times"
        raise TemplateRuntimeError(msg)
    else:
        LEFT.spend(VALUE)
        if isinstance(value, Collection):
            for item in value.items() if isinstance(value, dict) else value:
                weigh(item, depth - 1)


def filters() -> dict[str, Callable[..., Any]]:
    """Return the filters of templates by their names."""
    known = {name: FILTERS[name] for name in (*_LAZY, *_OUTER, *_WHOLE)}
    known |= {"replace": _replace, "trim": _trim, "join": _join, "indent": _indent}
    return {name: _costing(name, function) for name, function in known.items()} | {"tojson": _json}


def tests() -> dict[str, Callable[..., Any]]:
    """Return the tests of templates by their names."""
    known = {name: TESTS[name] for name in _TESTS.split()}
    for name, (aliases, _) in _COMPARISONS.items():
        known |= {alias: lambda left, right, name=name: compare(name, left, right) for alias in aliases.split()}
    return known


def counted(value: Any, cost: int = VALUE) -> Any:
    """Spend the work of making a value of known length."""
    LEFT.spend(cost + (len(value) if isinstance(value, Collection) else 0))
    return value


def spend_on_text(text: str, name: str, *given: Any) -> None:
    """Spend the work of a string method and the size of what it adds."""
    first, *rest = [one for one in given if isinstance(one, str)] or [""]
    LEFT.spend(VALUE + _search(text, len(first) + sum(map(len, rest))))
    if name in ("split", "rsplit"):
        LEFT.spend(VALUE * (text.count(first) + 1 if first else len(text) // 2 + 1))
    if name == "replace" and rest:
        LEFT.spend(text.count(first) * len(rest[0]) * growth(text))


def _search(text: str, length: int) -> int:
    """Return the work to search for a text of `length`: at worst Python compares all characters with all."""
    return len(text) * (1 + length // 16)


def growth(*values: Any) -> int:
    """Return the factor by which text may grow when joined with these: text marked safe escapes it."""
    return _ESCAPED if any(hasattr(one, "__html__") for one in values) else 1


def checked_number(value: Any) -> Any:
    """Return a value; raise TemplateRuntimeError for an integer that is too large to compute with quickly."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise TemplateRuntimeError(f"it computes a whole number of {value.bit_length()} bits, expected at most {_BITS}")
    return value


def compare(name: str, left: Any, right: Any) -> Any:
    """Compare two values by an operator of the syntax tree."""
    if name in ("in", "notin"):
        right = list(right) if isinstance(right, Iterator) else right
        if isinstance(left, str) and isinstance(right, str):
            LEFT.spend(VALUE + _search(right, len(left)))
        else:
            weigh(left)
            weigh(None if isinstance(right, dict) else right)
    elif isinstance(left, Collection) and isinstance(right, Collection):
        weigh(left)
        weigh(right)
    return _COMPARISONS[name][1](left, right)


def _paced(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        LEFT.spend(VALUE)
        yield value


def _costing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it spends its work."""
    place = int(hasattr(function, "jinja_pass_arg"))  # a context or environment may come first
    lazy, outer, sorts = name in _LAZY, name in _OUTER, name in ("sort", "dictsort")

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        value = given[place]
        if lazy:
            given[place] = _paced(value) if isinstance(value, Collection | Iterator) else value
        elif not outer:
            given[place] = value = list(_paced(value)) if isinstance(value, Iterator) else value
            before = LEFT.work
            for one in (*given[place:], *kwargs.values()):
                weigh(one)
            if sorts:
                LEFT.spend((before - LEFT.work) * len(value).bit_length())
        elif name == "list" and isinstance(value, Collection):
            LEFT.spend(VALUE * len(value))
        return checked_number(counted(function(*given, **kwargs)))

    return run


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, first, last = str(value), str(old), str(new)
    spend_on_text(text, "replace", first, last)
    return text.replace(first, last, -1 if count is None else count)


def _trim(value: Any, chars: str | None = None) -> str:
    text = value if isinstance(value, str) else str(value)
    spend_on_text(text, "strip", chars)
    return text.strip(chars)


@pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    values = list(value)
    LEFT.spend(len(values) * len(str(d)))
    return FILTERS["join"](context, values, d, attribute)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else max(width, 0)
    LEFT.spend((len(value) + 1) * (VALUE + size))
    return FILTERS["indent"](value, width, first, blank)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    before = LEFT.work
    weigh(value)
    between = sum(map(len, separators or ())) + _DEPTH * (len(indent) if isinstance(indent, str) else indent or 0)
    LEFT.spend((before - LEFT.work) * (_ESCAPED + max(between, 0) // VALUE))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
