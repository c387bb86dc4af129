"""What servers answer, as types: completions with log-probabilities in both forms, lists of models and of adapters.

Every answer is read here and nowhere else, so what passes has the types and ranges that are stated.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from jcrosslora.cache.keys import digest_of
from jcrosslora.errors import SourceError
from jcrosslora.utils.files import write_whole
from jcrosslora.utils.unfinished import remove_unchanged

T = TypeVar("T")
LogProb = Annotated[float, msgspec.Meta(le=1e-3)]  # rounding makes log-probabilities of sure tokens positive
Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Byte = Annotated[int, msgspec.Meta(ge=0, lt=256)]
_NOTHING = -9000.0  # vLLM writes -9999 for minus infinity, llama.cpp the lowest float
_SAMPLE = "sample.json"


class DamagedError(SourceError):
    """An answer is none to what was asked; the message names the field."""


class Likely(msgspec.Struct, frozen=True):
    """A token with its log-probability; llama.cpp adds its id, chats its bytes."""

    token: str
    logprob: LogProb | None
    id: Index | None = None
    bytes: list[_Byte] | None = None

    @property
    def value(self) -> float | None:
        """The log-probability; None where there is none, or where it says minus infinity."""
        return None if self.logprob is None or self.logprob < _NOTHING else min(self.logprob, 0.0)


class Position(Likely, frozen=True, kw_only=True):
    """A token of a text, and the likeliest ones in its place."""

    top_logprobs: list[Likely]


class LogProbs(msgspec.Struct, frozen=True):
    """The `logprobs` of a choice: `content`, as chats and llama.cpp have it, or three lists, as completions have it."""

    content: list[Position] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[LogProb | None] = []
    top_logprobs: list[dict[str, LogProb | None] | None] = []

    def positions(self) -> list[Position]:
        """Return the tokens of a text in either form.

        Raises:
            DamagedError: the lists have different lengths.
        """
        if self.content is not None:
            return self.content
        sizes = [len(self.tokens or ()), len(self.token_logprobs), len(self.top_logprobs)]
        if len(set(sizes)) > 1:
            msg = f"tokens, token_logprobs and top_logprobs have {sizes} entries, wanted as many of each"
            raise DamagedError(msg)
        rows = zip(self.tokens or (), self.token_logprobs, self.top_logprobs, strict=True)
        return [
            Position(token, value, top_logprobs=[Likely(*pair) for pair in (top or {}).items()])
            for token, value, top in rows
        ]


class Choice(msgspec.Struct, frozen=True):
    """The answer to one prompt."""

    text: str
    index: Index = 0
    finish_reason: str | None = None
    logprobs: LogProbs | None = None


class Completion(msgspec.Struct, frozen=True):
    """The answer to a request with one prompt or several."""

    choices: list[Choice]

    def of(self, prompts: int) -> list[Choice]:
        """Return the answers in the order of the prompts.

        Raises:
            DamagedError: there is not one for each.
        """
        found = sorted(self.choices, key=lambda choice: choice.index)
        if [choice.index for choice in found] != list(range(prompts)):
            msg = f"choices have the indices {[choice.index for choice in found][:40]}, wanted 0 to {prompts - 1}"
            raise DamagedError(msg)
        return found


class Card(msgspec.Struct, frozen=True):
    """A model of a server. vLLM and SGLang tell its base as the parent."""

    id: str | None = None
    aliases: list[str] | None = None
    owned_by: str | None = None
    parent: str | None = None


class Cards(msgspec.Struct, frozen=True):
    """The models of a server."""

    data: list[Card] | None = None


class LoadedAdapter(msgspec.Struct, frozen=True):
    """An adapter that llama.cpp loaded."""

    id: Index
    path: str = ""


def read_reply(content: bytes, kind: type[T]) -> T:
    """Read JSON as a type; fields that it does not have are passed over.

    Raises:
        DamagedError: the content is not JSON, or not of this type.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(str(error)) from None


class Answers:
    """Answers of one model on one server. Without a folder nothing is kept; the state of the disk raises no error."""

    def __init__(self, parent: Path | None, identity: Any) -> None:
        """Use the folder of a model, named by a JSON value, below `parent`, the folder of all models, or None.

        Folders that did not change for 30 days are removed.
        """
        self._folder: Path | None = None
        if parent is not None:
            self._folder = parent / digest_of(identity)[:24]
            remove_unchanged(parent, self._folder)

    def renew(self, sample: T, is_of: Callable[[T], bool]) -> None:
        """Drop all answers of another model under the same name.

        `sample` is what the model answers to the same questions in every run; `is_of` tells whether that of an earlier
        run is of this model.
        """
        if self._folder is None:
            return
        kept = self._read(self._folder / _SAMPLE, type(sample))
        if kept is not None and is_of(kept):
            return
        with suppress(OSError):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / _SAMPLE, msgspec.json.encode(sample))

    def find(self, key: str, kind: type[T]) -> T | None:
        """Return an answer of a type; None if there is none."""
        return None if self._folder is None else self._read(self._path(key), kind)

    def keep(self, key: str, answer: Any) -> None:
        """Keep an answer."""
        if self._folder is None:
            return
        with suppress(OSError):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, msgspec.json.encode(answer))

    @staticmethod
    def _read(path: Path, kind: type[T]) -> T | None:
        with suppress(OSError, DamagedError):
            return read_reply(path.read_bytes(), kind)
        return None

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key[2:24]}.json"
