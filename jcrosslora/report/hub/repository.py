"""A repository of the hub that an adapter goes to: who writes, whether it may, and what is there already."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jcrosslora.adapter.folder import CONFIG, GGUF_WEIGHTS, MLX_WEIGHTS, PICKLE, WEIGHTS
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.checkpoint.shards import INDEX, SINGLE
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.report.hub.refusal import refusals, status_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_BASE_FILES = {"config.json", SINGLE, INDEX}
_ADAPTER_WEIGHTS = {WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, PICKLE}
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Found:
    """A repository that is there already.

    Attributes:
        private: whether it is private.
        files: names of its files.
    """

    private: bool
    files: frozenset[str]


@dataclass(frozen=True)
class Repository:
    """A repository to write to, with the token that does so.

    Attributes:
        repo_id: "owner/name".
        private: whether it is to be private.
        token: of the user; never shown.
    """

    repo_id: str
    private: bool
    token: str = field(repr=False)

    @classmethod
    def of(cls, repo_id: str, *, private: bool, token: str | None) -> Repository:
        """Check the name, and find the token as the hub's client does. Nothing is sent.

        Args:
            repo_id: "owner/name".
            private: whether it is to be private.
            token: None takes that of the environment or of `hf auth login`.

        Raises:
            UsageError: not a name of a repository, or a token with characters that no token has.
            OutputError: there is no token.
        """
        from huggingface_hub import get_token

        check_repo_id(repo_id)
        with refusals(repo_id):
            found = token or get_token()
        if not found:
            msg = f"{repo_id}: you are not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that "
            raise OutputError(msg + "may write there")
        if _TOKEN.fullmatch(found) is None:
            msg = f"{repo_id}: the token (not shown) holds spaces or characters that no token has: copy it again"
            raise UsageError(msg)
        return cls(repo_id, private, found)

    def look(self) -> Found | None:
        """Return what is there already, None if there is no such repository yet.

        Raises:
            OutputError: it is public where a private one is wanted, holds a base model, or the hub refuses.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._client() as api:
            try:
                info = api.model_info(self.repo_id)
            except RepositoryNotFoundError as error:
                if status_of(error) == 401:  # which also stands for a token that is not valid
                    raise
                return None
        if self.private and not info.private:
            msg = f"{self.repo_id}: is there already and is public, a private one was wanted: allow it with --public "
            raise OutputError(msg + "(private=False), or choose another name")
        names = frozenset(file.rfilename for file in info.siblings or ())
        if CONFIG not in names and (of_base := sorted(_BASE_FILES & names)):
            msg = f"{self.repo_id}: holds a base model ({of_base[0]}), whose card would be lost: choose another name"
            raise OutputError(msg)
        return Found(bool(info.private), names)

    def send(self, files: Mapping[str, Path | bytes], message: str, *, create: bool) -> tuple[str, str]:
        """Upload files as one commit. Other files in the repository stay, and equal ones are not sent again.

        Args:
            files: name to a file on disk or to its content.
            message: of the commit.
            create: whether to make the repository first.

        Returns:
            The address of the repository and the commit, which is the last one if all files were there already.

        Raises:
            OutputError: the hub refuses.
        """
        from huggingface_hub import CommitOperationAdd

        with self._client() as api:
            if create:
                api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            made = api.create_commit(self.repo_id, added, commit_message=message)
            return f"{api.endpoint}/{self.repo_id}", made.oid

    def check_weights(self, found: Found, weights: str) -> None:
        """Check that no weights are there that the configuration of the adapter would not fit.

        Args:
            found: what is there.
            weights: name of the adapter's own file of weights.

        Raises:
            OutputError: there are weights of another format.
        """
        if others := sorted((_ADAPTER_WEIGHTS - {weights}) & found.files):
            msg = f"{self.repo_id}: holds {others[0]}, which does not go with {weights} of this adapter: remove it "
            raise OutputError(msg + "there, or choose another name")

    @contextmanager
    def _client(self) -> Iterator[HfApi]:
        """Provide the hub's client, with its errors as ours."""
        from huggingface_hub import HfApi

        with _quiet(), refusals(self.repo_id):
            yield HfApi(token=self.token, library_name="jcrosslora")


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UsageError: it has not the form owner/name, or characters that the hub does not allow.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        valid = is_hub_id(repo_id)
    except HFValidationError:
        valid = False
    if not valid:
        msg = f"{repo_id!r} is not the name of a repository: give one such as owner/name"
        raise UsageError(msg)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's client from lines about its retries, and from bars where nobody sees them move."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    before = logging.get_verbosity()
    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    bars = not (asked_for or sys.stderr.isatty() or are_progress_bars_disabled())
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            enable_progress_bars()
