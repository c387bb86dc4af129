"""Notations of records: the same keys and values are written in one way in one data set and in another elsewhere.

An adapter that makes sentences of data knows one of them. A target that learns from another alone does not know it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_KEY = re.compile(r"\w[\w /-]*")
Record = tuple[tuple[str, str], ...]  # keys with values


@dataclass(frozen=True)
class Notation:
    """A way to write a record.

    Attributes:
        before: what stands in front of all.
        colon: what stands between a key and its value.
        close: what stands behind each value.
        comma: what stands between that and the next key.
        after: what stands behind all.
    """

    before: str
    colon: str
    close: str
    comma: str
    after: str

    def write(self, record: Record) -> str:
        """Write a record."""
        pairs = self.comma.join(f"{key}{self.colon}{value}{self.close}" for key, value in record)
        return self.before + pairs + self.after

    def read(self, text: str) -> Record | None:
        """Read what `write` would write; None for any other text."""
        inner = text.removeprefix(self.before).removesuffix(self.after)
        parts = [part.removesuffix(self.close).partition(self.colon) for part in inner.split(self.comma)]
        record = tuple((key, value) for key, _, value in parts)
        named = all(_KEY.fullmatch(key) and value for key, value in record)
        return record if named and self.write(record) == text else None


PLAIN = Notation("", ": ", "", ", ", "")
NOTATIONS = (
    PLAIN,
    Notation("", " = ", "", "; ", ""),
    Notation('{"', '": "', '"', ', "', "}"),
    Notation("", "(", ")", ", ", ""),
    Notation("", " | ", "", " & ", ""),
)


def write_in(text: str, place: int) -> str:
    """Write a record in plain notation in one of `NOTATIONS`: they take turns; other text stays as it is."""
    record = PLAIN.read(text)
    return text if record is None else NOTATIONS[place % len(NOTATIONS)].write(record)


def write_plain(text: str) -> str:
    """Write a record in any of `NOTATIONS` in plain notation; other text stays as it is."""
    found = (notation.read(text) for notation in NOTATIONS)
    record = next((one for one in found if one is not None), None)
    return text if record is None else PLAIN.write(record)
