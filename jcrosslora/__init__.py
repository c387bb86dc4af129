"""Move a LoRA adapter from one base model to a different one, without training data.

The public names are listed once, in `__init__.pyi`, which type checkers read as well. A name's module is imported when
the name is first used, so that `import jcrosslora` costs milliseconds.
"""

from importlib import import_module as _import_module
from inspect import isfunction as _isfunction
from pathlib import Path as _Path
from typing import Any as _Any

# The module of each name, from lines such as "from jcrosslora.utils.cache import Cache as Cache".
_LINES = _Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8").splitlines()
_HOMES = {line.split()[-1]: line.split()[1] for line in _LINES if line.startswith("from ")}


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        from jcrosslora.utils import version

        value: _Any = version()
    elif name == "__all__":  # what `from jcrosslora import *` asks for
        return [name for name in __dir__() if name != "__version__"]
    elif name not in _HOMES:
        raise AttributeError(f"module 'jcrosslora' has no attribute {name!r}")
    elif _HOMES[name] == __name__:
        return _import_module(f"{__name__}.{name}")
    else:
        value = getattr(_import_module(_HOMES[name]), name)
        if _isfunction(value):  # what users call; the package calls the functions themselves
            from jcrosslora.utils.settings import checked

            value = checked(value)
            value.__module__ = __name__  # pickle finds it here
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted((*_HOMES, "__version__"))
