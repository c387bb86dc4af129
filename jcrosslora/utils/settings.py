"""Check settings and arguments from Python: an unknown name or a value of a wrong type raises `UsageError`."""

import inspect
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from msgspec import Meta

from jcrosslora.errors import UsageError, suggestion

F = TypeVar("F", bound=Callable[..., Any])
# Values accepted for a type: numpy's numbers, any kind of path, and paths for text.
_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}
_GIVEN: dict[Any, Any] = {**_NUMBERS, bool: numbers.Integral | np.bool_, str: str | os.PathLike, Path: os.PathLike}


class Settings:
    """Base of dataclasses whose fields are set by users.

    Raises UsageError if a setting is unknown, given twice, or missing, or of another type than its annotation states.
    """

    # Type checkers, `inspect` and `help` see the `__init__` of the dataclass.
    if not TYPE_CHECKING:

        def __new__(cls, *values: Any, **given: Any) -> Self:
            """Check names and types before `__init__` takes them."""
            if values or given:  # pickle and copy give none
                _check_call(cls, values, given)
            return super().__new__(cls)

    @classmethod
    def called(cls) -> str:
        """Return the name of the class in errors."""
        return cls.__name__


def _check_call(cls: type[Settings], values: tuple[Any, ...], given: dict[str, Any]) -> None:
    signature = inspect.signature(cls)
    try:
        bound = signature.bind(*values, **given)
    except TypeError as error:
        known = list(signature.parameters)
        has = f"its settings are {', '.join(known)}" if known else "it has no settings"
        if name := next((name for name in given if name not in known), None):
            raise UsageError(f"{cls.called()} has no setting {name}{suggestion(name, known)}; {has}") from None
        raise UsageError(f"{cls.called()}: {error}; {has}") from None
    _check_types(cls.called(), bound.arguments, _types(cls))


def checked(function: F) -> F:
    """Make a public function raise UsageError for arguments whose types do not fit its annotations."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*values: Any, **given: Any) -> Any:
        try:
            arguments = signature.bind(*values, **given).arguments
        except TypeError:  # which the call itself raises
            arguments = {}
        _check_types(function.__qualname__.removesuffix(".__init__"), arguments, _types(function))
        return function(*values, **given)

    return call  # type: ignore[return-value]


@cache
def _types(of: Any) -> dict[str, Any]:
    try:
        return get_type_hints(of)
    except NameError:  # an annotation of a user's class that only type checkers can resolve
        return {}


def _check_types(called: str, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if not _fits(value, kinds.get(name, Any)):
            raise UsageError(f"{called}: {name} is {reprlib.repr(value)}; expected {wanted_type(kinds[name])}")


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value fits an annotation."""
    origin, parts = get_origin(kind), tuple(part for part in get_args(kind) if part is not ...)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (list, tuple, Sequence, Collection):
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            return False
        return not isinstance(value, Collection) or all(any(_fits(one, part) for part in parts) for one in value)
    if isinstance(value, bool) and kind in _NUMBERS:
        return False
    try:  # a function that takes a class checks it itself
        return kind is Any or origin is type or isinstance(value, _GIVEN.get(kind, origin or kind))
    except TypeError:  # a protocol, or a type variable
        return True


def wanted_type(kind: Any) -> str:
    """Name a type in words, for errors."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        described = (one.description for one in parts[1:] if isinstance(one, Meta) and one.description)
        return next(described, None) or wanted_type(parts[0])
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin in (list, tuple, Sequence, Collection):
        return f"a list of {wanted_type(parts[0])}"
    if origin in (Union, UnionType):
        return " or ".join(wanted_type(one) for one in parts if one is not NoneType)
    return {str: "text", dict: "a table"}.get(kind) or getattr(kind, "__name__", str(kind))
