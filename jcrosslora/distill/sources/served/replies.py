"""What servers answer, as types: completions with log-probabilities in both forms, lists of models and of adapters.

Every answer is read here and nowhere else, so what passes has the types and ranges that are stated.
"""

from typing import Annotated, TypeVar

import msgspec

from jcrosslora.errors import SourceError

T = TypeVar("T")
LogProb = Annotated[float, msgspec.Meta(le=1e-3)]  # rounding makes log-probabilities of sure tokens positive
Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Byte = Annotated[int, msgspec.Meta(ge=0, lt=256)]
_NOTHING = -9000.0  # vLLM writes -9999 for minus infinity, llama.cpp the lowest float


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
