"""The options of every command, which are taken out of its arguments before the command reads the rest."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from jcrosslora.errors import UsageError

COMMON = ("--quiet", "--verbose", "--token")
COMMON_HELP = """options of every command:
  --quiet        no progress; of what is written, only the path
  --verbose      what libraries log, and the traceback of an error
  --token TOKEN  of the hub, in place of HF_TOKEN or that of `hf auth login`"""


@dataclass(frozen=True)
class Common:
    """Options of every command; `arguments` are those of the command itself."""

    arguments: list[str]
    quiet: bool
    verbose: bool
    token: str | None

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Common":
        """Take the options out of the arguments, up to a `--`.

        Raises:
            UsageError: --token has no value.
        """
        own = list(takewhile(lambda one: one != "--", arguments))
        behind, kept, token = list(arguments[len(own) :]), [], None
        rest = iter(own)
        for one in rest:
            if one.partition("=")[0] == "--token":
                token = one.partition("=")[2] or next(rest, "")
            elif one not in COMMON:
                kept.append(one)
        if token is not None and (not token or token.startswith("-")):
            msg = "--token is given without a token: give one of the hub, such as --token hf_..."
            raise UsageError(msg)
        return cls(kept + behind, "--quiet" in own, "--verbose" in own, token)

    def apply(self) -> None:
        """Have libraries log, and the hub's client take the token."""
        if self.verbose:
            logging.basicConfig(level=logging.INFO)
        if self.token is not None:
            os.environ["HF_TOKEN"] = self.token
