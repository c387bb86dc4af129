"""One error for too little memory on the host or on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

from jcrosslora.errors import ShortMemoryError

_STATUS = "RESOURCE_EXHAUSTED: "  # the prefix of XLA's message


@contextmanager
def enough_memory(advice: str = "") -> Iterator[None]:
    """Turn the memory errors of Python, NumPy and JAX into a `ShortMemoryError`; other errors pass.

    Args:
        advice: what to do to need less memory, for the message.

    Raises:
        ShortMemoryError: memory ran out in the block.
    """
    try:
        yield
    except MemoryError as error:
        raise _short(str(error), advice) from error
    except RuntimeError as error:
        import jax

        if not (isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(_STATUS)):
            raise
        raise _short(str(error).removeprefix(_STATUS), advice) from error


def _short(said: str, advice: str) -> ShortMemoryError:
    first = said.splitlines()[0].strip().rstrip(".") if said.strip() else ""
    ways = "use a device or a machine with more memory" + (f", or {advice}" if advice else "")
    return ShortMemoryError(f"not enough memory{f' ({first})' if first else ''}: {ways}")
