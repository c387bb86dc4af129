"""Run chat templates, which are untrusted programs, in a sandbox with a limit on their work.

A template gets the same variables as in transformers, and renders the same text. Iterations of loops, macro calls, the
sizes of values and the written text are counted, so that a template can neither run forever nor use up the memory.
"""

import json
import threading
from collections.abc import Sized
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_WORK = 20_000_000  # characters and items; conversations take thousands
_VALUE, _RUN = 10, 100  # what a value costs on top of its length, and a run of a loop or macro
_COUNTED = "counted value"  # no name that a template could write
_POWER = 64  # the largest exponent


def run_template(source: str, **names: Any) -> str:
    """Render a chat template, which may raise anything; a `TemplateError` if it does more work than it needs."""
    _LEFT.work = _WORK
    return _compiled(source).render(**names)


class _Left(threading.local):
    """The work that the template of a thread may still do."""

    work = _WORK

    def spend(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            msg = "it does more work than a conversation needs"
            raise TemplateRuntimeError(msg)


_LEFT = _Left()


class _Counting(NodeTransformer):
    """Put the counting into the syntax tree of a template."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.CallBlock(call=nodes.Filter(node=nodes.Call() as call)):
                node.call = call
            case nodes.For(test=nodes.Expr() as test):
                node.test = _counted(test)
            case nodes.Output():
                node.nodes = [one if isinstance(one, nodes.TemplateData) else _counted(one) for one in node.nodes]
            case nodes.BinExpr() | nodes.Concat() | nodes.Filter() | nodes.Call():
                return _counted(node)
            case nodes.Const(value=int(value)) if value > _RUN:
                return _counted(node)
            case nodes.NSRef(attr=name) if name.startswith("_"):
                raise _private(name)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_counted(nodes.Const(None), _RUN + written), lineno=node.lineno))
        return node


def _counted(node: nodes.Expr, cost: int = _VALUE) -> nodes.Filter:
    return nodes.Filter(node, _COUNTED, [nodes.Const(cost)], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, which counts."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or power of values, unless it is too large."""
        for many, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(many, Sized) and isinstance(count, int):
                _LEFT.spend(len(many) * max(count, 0))
        if operator == "**" and isinstance(right, int) and abs(right) > _POWER:
            msg = f"an exponent is {right}, wanted at most {_POWER}"
            raise TemplateRuntimeError(msg)
        return super().call_binop(context, operator, left, right)

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        """Call a filter for an item of a list."""
        return _count(None, super().call_filter(*args, **kwargs))

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """Call a test for an item of a list."""
        return _count(None, super().call_test(*args, **kwargs))


@pass_context
def _count(_: Any, value: Any, cost: int = _VALUE) -> Any:
    size = len(value) if isinstance(value, str | list | tuple | dict) else abs(value) if isinstance(value, int) else 0
    _LEFT.spend(max(cost, 0) + size)
    return value


class _Generation(Extension):
    """The tag around the assistant's text, which has no effect here."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [_Generation, "jinja2.ext.loopcontrols"]}
    made = _Environment(**options)
    made.filters |= {"tojson": _json, _COUNTED: _count}
    own = {
        "raise_exception": _raise,
        "namespace": _namespace,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    made.globals = {name: value for name, value in made.globals.items() if name != "lipsum"} | own
    return made


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    environment = _environment()
    tree = _Counting().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))
