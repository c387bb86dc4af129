"""Run chat templates, which are untrusted programs, in a sandbox with a limit on their work.

A template gets the same variables as in transformers, and renders the same text. It has the filters, tests and methods
that templates of published models use. The work of each operation is known before it begins and is taken from a
budget, and so is each run of a loop or macro and each character of the text. So a template can neither run forever nor
use up the memory.
"""

import threading
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, Undefined, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jcrosslora.text.work import (
    LEFT,
    VALUE,
    checked_number,
    compare,
    counted,
    filters,
    growth,
    spend_on_text,
    tests,
    weigh,
)

_SOURCE = 40_000  # characters of a template; the longest of 265 published ones has 20,000
_LOOPS = 8  # nested loops and macros, at most 4 in those: compile time grows with them
# Characters and items; more for each character of the messages, because some templates loop over them, and for each
# pair of messages, because Gemma 4's looks at all messages for each. The most that one of the 265 needs is 214 and 60.
_WORK, _CHARACTER, _PAIR = 10_000_000, 300, 100
_RUN, _NODE = 30, 2  # cost of a run of a loop or macro, and of a node in it
_POWER = 64  # the largest exponent
# What templates of published models call.
_METHODS = {
    str: [
        *("capitalize", "count", "endswith", "find", "isdigit", "lower", "lstrip", "partition", "removeprefix"),
        *("removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "startswith", "strip"),
        *("title", "upper"),
    ],
    dict: ["get", "items", "keys", "values"],
    LoopContext: ["changed", "cycle"],
}
# Filters that a template cannot call, because their names have a space.
_WRITTEN, _COUNTED, _COMPARED = "written value", "counted value", "compared values"
_LOCK = threading.Lock()  # there is one budget


def run_template(source: str, messages: Sequence[dict[str, Any]], **names: Any) -> str:
    """Render a chat template, which may raise anything; raise TemplateError if it exceeds its work budget."""
    if len(source) > _SOURCE:
        raise TemplateError(f"it has {len(source):,} characters, expected at most {_SOURCE:,}")
    said = sum(len(value) for message in messages for value in message.values() if isinstance(value, str))
    with _LOCK:
        LEFT.work = _WORK
        made = _compiled(source)
        LEFT.work = _WORK + _CHARACTER * said + _PAIR * len(messages) ** 2
        return made.render(messages=messages, **names)


class _Counting(NodeTransformer):
    """Insert the work counting into a template's syntax tree."""

    depth = 0  # of loops and macros

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        runs = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        self.depth += runs
        if self.depth > _LOOPS:
            raise TemplateError(f"it nests loops and macros more than {_LOOPS} times")
        super().generic_visit(node, *args, **kwargs)
        self.depth -= runs
        match node:
            case nodes.Block() | nodes.EvalContextModifier():
                raise TemplateError(f"it has a {type(node).__name__}, which chat templates do not")
            case nodes.NSRef(attr=name) if name.startswith("_"):
                raise _private(name)
            case nodes.Compare(expr=left, ops=pairs) if not _trivial(left, pairs):
                given = [one for pair in pairs for one in (nodes.Const(pair.op), pair.expr)]
                return _filtered(_COMPARED, left, *given)
            case nodes.Output() | nodes.Concat():
                node.nodes = [
                    one if isinstance(one, nodes.TemplateData) else _filtered(_WRITTEN, one) for one in node.nodes
                ]
            case nodes.Pair(key=key) if not isinstance(key, nodes.Const):
                node.key = _filtered(_WRITTEN, key)
            case nodes.Getitem(arg=nodes.Slice()):
                return _filtered(_COUNTED, node, nodes.Const(VALUE))
            case nodes.For(test=nodes.Expr() as test):
                node.test = _filtered(_COUNTED, test, nodes.Const(_RUN))
        if runs:
            inside = list(node.find_all(nodes.Node))
            cost = (
                _RUN + _NODE * len(inside) + sum(len(one.data) for one in inside if isinstance(one, nodes.TemplateData))
            )
            node.body.insert(0, nodes.ExprStmt(_filtered(_COUNTED, nodes.Const(None), nodes.Const(cost))))
        return node


def _trivial(left: nodes.Expr, pairs: list[nodes.Operand]) -> bool:
    """Tell whether a comparison is cheap because it has a literal: comparing a string with a list costs nothing."""
    first = pairs[0]
    if first.op in ("in", "notin"):
        right = first.expr
        literal = isinstance(right, nodes.List | nodes.Tuple) and all(isinstance(it, nodes.Const) for it in right.items)
    else:
        literal = isinstance(left, nodes.Const) or isinstance(first.expr, nodes.Const)
    return len(pairs) == 1 and literal


def _filtered(name: str, node: nodes.Expr, *given: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(given), [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, with work counting."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Add texts and lists, repeat them, and compute with numbers."""
        if operator == "+" and type(left) is type(right) is str:  # nearly always
            LEFT.spend(VALUE + len(left) + len(right))
            return left + right
        lengths = [len(one) for one in (left, right) if isinstance(one, Collection)]
        if operator == "+":
            LEFT.spend(VALUE + sum(lengths) * growth(left, right))
        elif operator == "*" and lengths:
            count = right if isinstance(right, int) else left
            LEFT.spend(VALUE + lengths[0] * max(count if isinstance(count, int) else 0, 0))
        elif lengths:
            msg = f"it computes {type(left).__name__} {operator} {type(right).__name__}, expected numbers"
            raise TemplateRuntimeError(msg)
        elif operator == "**" and isinstance(right, int) and abs(right) > _POWER:
            raise TemplateRuntimeError(f"an exponent is {right}, expected at most {_POWER}")
        return checked_number(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Look an item up."""
        if not isinstance(argument, str):
            weigh(argument)
        return super().getitem(obj, argument)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a function of the template's names, or a method of a text or dict."""
        LEFT.spend(VALUE * (1 + len(args) + len(kwargs)))
        if not isinstance(called, Macro | LoopContext | Undefined):
            owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
            known = any(isinstance(owner, kind) and name in names for kind, names in _METHODS.items())
            if not known and not any(called is one for one in self.globals.values()):
                raise TemplateRuntimeError(f"it calls {name or type(called).__name__}, which chat templates do not")
            for value in args:
                weigh(value)
            if known and isinstance(owner, str):
                spend_on_text(owner, name, *args, *kwargs.values())
        return super().call(context, called, *args, **kwargs)


@pass_context
def _written(_: Context, value: Any) -> Any:
    if type(value) is str:  # nearly always
        LEFT.spend(VALUE + len(value))
    else:
        weigh(value)
    return value


@pass_context
def _counted(_: Any, value: Any, cost: int = VALUE) -> Any:
    return counted(value, cost)


@pass_context
def _compared(_: Context, left: Any, *pairs: Any) -> Any:
    """Compare values in a chain, as in `a < b <= c`."""
    found = True
    for name, right in zip(pairs[::2], pairs[1::2], strict=True):
        found = compare(name, left, right)
        if not found:
            return found
        left = right
    return found


class _Generation(Extension):
    """The tag around the assistant's text, which has no effect here."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: Any) -> None:
    weigh(message)
    raise TemplateError(message)


def _now(form: str) -> str:
    LEFT.spend(1024 * len(form))  # Python keeps this many bytes for a character of the form
    return datetime.now().strftime(form)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = dict(*args, **kwargs)
    for name in values:
        if str(name).startswith("_"):
            raise _private(name)
    return Namespace(values)


def _private(name: str) -> TemplateError:
    return TemplateError(f"a namespace has no attribute {name!r}: names there do not begin with _")


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    # Constants are computed when the template runs, where the work is counted.
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters = filters() | {_WRITTEN: _written, _COUNTED: _counted, _COMPARED: _compared}
    made.tests = tests()
    made.globals = {
        "range": safe_range,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _namespace,
        "raise_exception": _raise,
        "strftime_now": _now,
    }
    return made


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    environment = _environment()
    tree = _Counting().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))
