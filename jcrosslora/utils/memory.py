"""What to say where a host or a device has too little memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from jcrosslora.errors import ShortMemoryError

_STATUS = "RESOURCE_EXHAUSTED: "  # how XLA begins


@contextmanager
def enough_memory(advice: str = "") -> Iterator[None]:
    """Turn what NumPy, Python and JAX raise where memory runs out into an error of ours; other errors pass.

    Args:
        advice: what may need less.

    Raises:
        ShortMemoryError: there was too little memory.
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
