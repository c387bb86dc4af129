"""Upload an adapter to a repository of the hub: user, permission, existing files, and explanations of refusals."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter.folder import CONFIG, GGUF_WEIGHTS, MLX_WEIGHTS, PICKLE, WEIGHTS
from jcrosslora.checkpoint import is_hub_id
from jcrosslora.checkpoint.hub import cause_of
from jcrosslora.checkpoint.safetensors import INDEX, SINGLE
from jcrosslora.errors import AdapterError, JCrossLoRAError, OutputError, UsageError
from jcrosslora.report.record import REPORT
from jcrosslora.report.upload import collect
from jcrosslora.utils.texts import safe_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

_BASE_FILES = {"config.json", SINGLE, INDEX}
_ADAPTER_WEIGHTS = {WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, PICKLE}
_TOKEN = re.compile(r"[!-~]+")
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


@dataclass(frozen=True)
class Pushed:
    """An adapter on the hub.

    Attributes:
        base_model: the base that the card names.
        notes: what the user should know, one sentence each without a full stop.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    base_model: str | None
    notes: tuple[str, ...]


def push_to_hub(
    adapter: str | Path | Any,
    repo_id: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    with_completions: bool = False,
    token: str | None = None,
) -> Pushed:
    """Upload an adapter to the hub as one commit: weights, configuration, model card, report and recipe.

    Before anything is sent, the folder is checked to be a whole adapter; it does not change. Other files in the folder
    are not uploaded, and other files in the repository stay. After a failure, repeat the call: uploaded files are not
    sent again.

    Args:
        adapter: the folder of a PEFT or MLX adapter or of `adapter.gguf`, such as `transfer` writes; or a
            `TransferResult`, which is written in profile "portable" (its `push_to_hub` method takes other profiles).
        repo_id: "owner/name"; the repository is created if it does not exist.
        private: whether the repository is private; False allows a public one.
        base_model: hub id of the base, for card and configuration; None takes the one that they name, if any.
        with_completions: whether report and card keep the completions that the source wrote.
        token: hub token; None uses the token of the environment or of `hf auth login`.

    Returns:
        The address, the commit, the names of the files, and notes such as that no base model is named.

    Raises:
        AdapterError: the folder is not a whole adapter, or its card or report is damaged.
        UsageError: `repo_id` or `base_model` is not of the form owner/name, or the token is malformed.
        OutputError: you are not logged in, the repository is public although `private` is true, it holds something
            else, or the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd

    settings: dict[str, Any] = {"base_model": base_model, "with_completions": with_completions}
    if not isinstance(adapter, str | Path):
        if not hasattr(adapter, "push_to_hub"):
            msg = f"a {type(adapter).__name__} cannot be uploaded; give a folder, or the result of a transfer"
            raise AdapterError(msg)
        return adapter.push_to_hub(repo_id, private=private, token=token, **settings)
    upload = collect(adapter, **settings)
    repository = Repository.of(repo_id, private=private, token=token)
    found = repository.look()
    if found is not None and (others := sorted((_ADAPTER_WEIGHTS - {upload.weights}) & _names(found))):
        # The configuration of this adapter would not fit those weights.
        msg = f"{repo_id}: holds {others[0]}, which does not go with {upload.weights} of this adapter: remove it "
        raise OutputError(msg + "there, or choose another name")
    what = "Adapter moved by jcrosslora" if REPORT in upload.files else "Adapter uploaded by jcrosslora"
    with repository.client() as api:
        if found is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        # Other files stay, and equal ones are not sent again. If all are there already, this returns the last commit.
        added = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        commit = api.create_commit(repo_id, added, commit_message=what).oid
        url = f"{api.endpoint}/{repo_id}"
    stays = ("the repository was private and stays so; its settings page makes it public",)
    notes = (*upload.notes, *(stays if found is not None and found.private and not private else ()))
    return Pushed(url, commit, tuple(upload.files), upload.base_model, notes)


@dataclass(frozen=True)
class Repository:
    """A repository to write to, with the token for it."""

    repo_id: str
    private: bool
    token: str = field(repr=False)  # never shown

    @classmethod
    def of(cls, repo_id: str, *, private: bool, token: str | None) -> Repository:
        """Check the name, and find the token as the hub's client does. Nothing is sent.

        Raises UsageError if the name or the token is malformed, and OutputError if there is no token.
        """
        from huggingface_hub import get_token

        check_repo_id(repo_id)
        with _refusals(repo_id):
            found = token or get_token()
        if not found:
            msg = f"{repo_id}: you are not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that "
            raise OutputError(msg + "may write there")
        if _TOKEN.fullmatch(found) is None:
            msg = f"{repo_id}: the token (not shown) holds spaces or characters that no token has: copy it again"
            raise UsageError(msg)
        return cls(repo_id, private, found)

    def look(self) -> ModelInfo | None:
        """Return the contents of the repository; None if it does not exist.

        Raises OutputError if it is public although `private` is true, holds a base model, or the hub refuses.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        with self.client() as api:
            try:
                info = api.model_info(self.repo_id)
            except RepositoryNotFoundError as error:
                if _status_of(error) == 401:  # the hub answers this to an invalid token too
                    raise
                return None
        if self.private and not info.private:
            msg = f"{self.repo_id}: is there already and is public, expected a private one: allow it with --public "
            raise OutputError(msg + "(private=False), or choose another name")
        names = _names(info)
        if CONFIG not in names and (of_base := sorted(_BASE_FILES & names)):
            msg = f"{self.repo_id}: holds a base model ({of_base[0]}), whose card would be lost: choose another name"
            raise OutputError(msg)
        return info

    @contextmanager
    def client(self) -> Iterator[HfApi]:
        """Provide the hub's client, and turn its errors into OutputError."""
        from huggingface_hub import HfApi

        with _quiet(), _refusals(self.repo_id):
            yield HfApi(token=self.token, library_name="jcrosslora")


def _names(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def check_repo_id(repo_id: str) -> None:
    """Raise UsageError if a name is not of the form owner/name, or has characters that the hub does not allow."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(repo_id)
        if is_hub_id(repo_id):
            return
    raise UsageError(f"{repo_id!r} is not the name of a repository: give one such as owner/name")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the hub client's messages about retries, and its progress bars if there is no terminal."""
    from huggingface_hub import constants
    from huggingface_hub import utils as hub

    before = hub.logging.get_verbosity()
    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    bars = not (asked_for or sys.stderr.isatty() or hub.are_progress_bars_disabled())
    hub.logging.set_verbosity_error()
    if bars:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        hub.logging.set_verbosity(before)
        if bars:
            hub.enable_progress_bars()


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """Turn every error of the hub's client in the block into OutputError."""
    try:
        yield
    except JCrossLoRAError:
        raise
    # The client raises its own errors, and errors of its HTTP library and of the compiled upload library, some of them
    # wrapped in RuntimeError.
    except Exception as error:
        raise OutputError(f"{repo_id}: {_account(error, repo_id)}") from error


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes carries; None if no answer came."""
    return next((status for cause in _causes(error) if (status := _status(cause)) is not None), None)


def _account(error: Exception, repo_id: str) -> str:
    status = _status_of(error)
    if status is None:
        return f"the upload broke off ({cause_of([*_causes(error)][-1], 300)}): {_BROKEN}"
    answer = next((said for cause in _causes(error) if (said := getattr(cause, "server_message", None))), None)
    outer = "" if _status(error) is not None else safe_line(error, 300)  # the client's summary of the answer
    inner = safe_line(answer or ("" if outer else error), 300)
    said = outer if inner in outer else f"{outer}: {inner}".removeprefix(": ")
    advice = _FAULT if status >= 500 else _ADVICE.get(status, "check the name, the token and the files")
    return f"the hub answers {status} ({said}): {advice.format(owner=repo_id.partition('/')[0])}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
