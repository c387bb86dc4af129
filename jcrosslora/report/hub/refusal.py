"""Say in one line what the hub refuses, or where a connection broke, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from jcrosslora.checkpoint.hub import cause_of
from jcrosslora.errors import JCrossLoRAError, OutputError
from jcrosslora.utils.texts import safe_line

_AGAIN = "repeat the upload: what was sent is not sent again"
_ADVICE = {
    400: "mend what it names, and repeat the upload",
    401: "the token is not valid: log in with `hf auth login`, or set HF_TOKEN to a new one",
    403: "the token may not write there: use one with write access to {owner}, or a name of your own",
    404: "check the name, and that the token has access to {owner}",
    409: f"something else changes the repository at the same time; {_AGAIN}",
    412: f"something else changes the repository at the same time; {_AGAIN}",
    429: f"these are too many requests; wait some minutes, and {_AGAIN}",
}
_FAULT = f"the hub has a fault; wait some minutes, and {_AGAIN}"
_BROKEN = f"check the network and HF_HUB_OFFLINE, and {_AGAIN}"


@contextmanager
def refusals(repo_id: str) -> Iterator[None]:
    """Turn every error of the hub's client in the block into one of ours.

    Raises:
        OutputError: the hub refuses a request, has a fault or cannot be reached.
    """
    try:
        yield
    except JCrossLoRAError:
        raise
    # The client raises errors of its own, of its HTTP library and of the compiled library that uploads, and wraps some
    # of them in RuntimeError.
    except Exception as error:
        msg = f"{repo_id}: {_account(error, repo_id)}"
        raise OutputError(msg) from error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes carries; None where no answer came."""
    return next((status for cause in _causes(error) if (status := _status(cause)) is not None), None)


def _account(error: Exception, repo_id: str) -> str:
    status = status_of(error)
    if status is None:
        return f"the upload broke off ({cause_of([*_causes(error)][-1], 300)}): {_BROKEN}"
    answer = next((said for cause in _causes(error) if (said := getattr(cause, "server_message", None))), None)
    outer = "" if _status(error) is not None else safe_line(error, 300)  # what the client makes of the answer
    inner = safe_line(answer or ("" if outer else error), 300)
    said = outer if inner in outer else f"{outer}: {inner}".removeprefix(": ")
    advice = _FAULT if status >= 500 else _ADVICE.get(status, "check the name, the token and the files")
    return f"the hub answers {status} ({said}): {advice.format(owner=repo_id.partition('/')[0])}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those below it, which say more than those that wrap them."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
