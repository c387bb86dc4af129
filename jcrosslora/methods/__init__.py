"""Transfer methods, one file per family, and the registry, which makes methods from names and settings.

Methods are frozen dataclasses that hold their hyper-parameters. `MapMethod.maps` gets the `Evidence` of one pair of
modules at a time; it uses no files or models.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from jcrosslora.distill.facts import FitFacts as FitFacts
from jcrosslora.errors import MethodError, UsageError, suggestion
from jcrosslora.maps import MapMethod as MapMethod
from jcrosslora.maps import Method as Method
from jcrosslora.maps import Moved as Moved
from jcrosslora.maps import Plan as Plan
from jcrosslora.methods.copy import CompensatedCopy as CompensatedCopy
from jcrosslora.methods.copy import Copy as Copy
from jcrosslora.methods.copy import InterpolatedCopy as InterpolatedCopy
from jcrosslora.methods.copy import PadTruncate as PadTruncate
from jcrosslora.methods.copy import Select as Select
from jcrosslora.methods.cross_lora import CrossLoRA as CrossLoRA
from jcrosslora.methods.cross_lora import LoRAX as LoRAX
from jcrosslora.methods.cross_lora import ProLoRA as ProLoRA
from jcrosslora.methods.cross_lora import Random as Random
from jcrosslora.methods.fits import Distill as Distill
from jcrosslora.methods.fits import DistilledCopy as DistilledCopy
from jcrosslora.methods.fits import DistilledSelect as DistilledSelect
from jcrosslora.methods.theseus import Theseus as Theseus

AUTO = "auto"
M = TypeVar("M", bound=Method)
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(CrossLoRA, LoRAX, ProLoRA, Copy, InterpolatedCopy, CompensatedCopy, DistilledCopy, Select, DistilledSelect),
        *(PadTruncate, Theseus, Distill, Random),
    )
}


@dataclasses.dataclass(init=False, repr=False, unsafe_hash=True)
class Auto:
    """Choose the method from the weights of the two bases (see `relation.method_selection`).

    Attributes:
        settings: hyper-parameters for whichever method is chosen, sorted by name; those that it lacks are left out.
    """

    settings: tuple[tuple[str, Any], ...]

    def __init__(self, **settings: Any) -> None:
        """Take hyper-parameters by name, such as `completions=600`."""
        self.settings = tuple(sorted(settings.items()))

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{name}={value!r}' for name, value in self.settings)})"


MethodLike = str | Method | type[Method] | Auto


def __dir__() -> list[str]:
    """Return the public names: the methods, and the names for making and registering them."""
    made = [method.__name__ for method in METHODS.values() if method.__module__.startswith(__name__)]
    named = ("AUTO", "METHODS", "Auto", "FitFacts", "MapMethod", "Method", "Moved", "Plan", "register_method")
    return sorted([*made, *named])


def register_method(method: type[M]) -> type[M]:
    """Add a user's method to the registry and return it; it can be used as a class decorator.

    The class must be a frozen dataclass with a name and a default for every field, and have `maps` (a `MapMethod`) or
    `move`.

    Raises:
        MethodError: the class does not meet these conditions, or another class has its name.
    """
    if not (isinstance(method, type) and issubclass(method, Method) and isinstance(getattr(method, "name", None), str)):
        msg = f"{method!r} is not a method; write a class that inherits from jcrosslora.MapMethod, with a name"
        raise MethodError(msg)
    unset = [field.name for field in dataclasses.fields(method) if field.default is dataclasses.MISSING]
    if unset or not method.__dataclass_params__.frozen or "__dataclass_params__" not in vars(method):  # type: ignore[attr-defined]
        reason = f"field {unset[0]} has no default" if unset else "it is not a frozen dataclass"
        msg = f"method {method.name}: {reason}; write @dataclass(frozen=True) and give every field a default"
        raise MethodError(msg)
    other = METHODS.get(method.name)
    if method.name == AUTO or (other is not None and other.spec() != method.spec()):
        raise MethodError(f"another method is called {method.name!r}; choose another name")
    if method.move is Method.move or (issubclass(method, MapMethod) and method.maps is MapMethod.maps):
        msg = f"method {method.name} does not say how it moves an update; inherit from jcrosslora.MapMethod and write "
        raise MethodError(msg + "`maps`, or from jcrosslora.Method and write `move`")
    METHODS[method.name] = method
    return method


def allow_module(name: str) -> None:
    """Import a user's module, also from the current folder, so that its methods can be named "module:Class".

    Pass only names that the user typed, never names from a file, which may come from somebody else. Raises MethodError
    if the module does not exist or cannot be imported.
    """
    here = os.getcwd()
    sys.path.insert(0, here)  # a console script does not search the current folder
    try:
        importlib.import_module(name.partition(":")[0])
    except (ImportError, TypeError, ValueError) as error:
        msg = f"{name!r} cannot be imported ({error}); give MODULE or MODULE:CLASS of a file that Python finds"
        raise MethodError(msg) from error
    finally:
        sys.path.remove(here)


def find_method(name: str) -> type[Method]:
    """Return the method called `name`, which may be "module:Class" of a module that has been imported.

    Raises MethodError if `name` is not registered, its module has not been imported, or the module has no such method.
    """
    module, _, own = name.partition(":")
    if own and module in sys.modules:
        if not hasattr(sys.modules[module], own):
            msg = f"method {name!r} does not exist: its module has no {own}; give the name of a class in it"
            raise MethodError(msg)
        return register_method(getattr(sys.modules[module], own))
    if ":" in name:
        msg = f"method {name!r} is in a module that is imported only if you name it yourself: look at its code, then "
        raise MethodError(msg + f"give --allow-module {module}, or import it in Python")
    if name not in METHODS:
        names = (AUTO, *METHODS)
        listed = f"use one of {', '.join(names)}, or MODULE:CLASS for one of your own"
        raise MethodError(f"method {name!r} is unknown{suggestion(name, names)}; {listed}")
    return METHODS[name]


def make_method(method: MethodLike, settings: Mapping[str, Any] | None = None) -> Method | Auto:
    """Make a method object, or `Auto`, from a name, a class or an object, with hyper-parameters by name.

    Raises MethodError if the method is not registered, and UsageError if the method does not have a setting, or a value
    is out of range.
    """
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in (settings or {}).items()}
    if isinstance(method, Auto) or method == AUTO:
        given = (dict(method.settings) if isinstance(method, Auto) else {}) | settings
        if strange := given.keys() - (known := setting_fields()).keys():
            msg = f"no method has a setting {min(strange)}{suggestion(min(strange), known)}; see jcrosslora.methods"
            raise UsageError(msg)
        for name, value in given.items():  # check it by a method that has it, before the bases are read
            METHODS[next(iter(known[name]))](**{name: value}).check()
        return Auto(**given)
    if isinstance(method, str):
        method = find_method(method)
    if not isinstance(method, Method) and not (isinstance(method, type) and issubclass(method, Method)):
        raise MethodError(f"method {method!r} is neither a name nor a method; see jcrosslora.methods")
    made = method(**settings) if isinstance(method, type) else dataclasses.replace(method, **settings)
    made.check()  # before slow work
    return made


def make_chosen(name: str, auto: Auto) -> Method:
    """Make the method that was chosen for `auto`, with the settings of `auto` that it has."""
    method = find_method(name)
    known = {field.name for field in dataclasses.fields(method)}
    return method(**{key: value for key, value in auto.settings if key in known})


def setting_fields() -> dict[str, dict[str, dataclasses.Field[Any]]]:
    """Return the hyper-parameters of all registered methods: name -> method -> field."""
    found: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for method in METHODS.values():
        for field in dataclasses.fields(method):
            found.setdefault(field.name, {})[method.name] = field
    return found


def hyper_types() -> dict[str, Any]:
    """Return the type of each hyper-parameter of all registered methods, by name."""
    first = {name: next(iter(by_method.items())) for name, by_method in setting_fields().items()}
    return {
        # A type is text if the method's file postpones annotations.
        name: get_type_hints(METHODS[method])[name] if isinstance(field.type, str) else field.type
        for name, (method, field) in first.items()
    }
