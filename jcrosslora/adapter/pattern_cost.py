"""Bound the time that matching a pattern from an adapter's configuration can take.

Python's regular expressions try every way to match, exponentially many for `(a+)+`: a malicious configuration could
block its reader.
"""

import re
from math import prod

_NAME = 64  # typical characters of a module's name
_BUDGET = 1 << 22  # ways to match; `.*\.layers\.(0|1|...|31)\.(q|k|v|o)_proj` has 2^13
_SINGLE = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # an escaped character, or a set of characters
_GROUP_MARK = re.compile(r"\(\?(?::|[=!]|<[=!]|P<\w+>)")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def is_matchable(pattern: str) -> bool:
    """Whether a pattern is a regular expression without repeated groups, and with few ways to match.

    The number of ways is bounded by the product over its repeats, optional parts and alternatives.
    """
    try:
        re.compile(f"({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    plain = _GROUP_MARK.sub("(", _SINGLE.sub("x", pattern))
    repeats = sum(map(plain.count, "*+{"))
    if _REPEATED_GROUP.search(plain) or repeats > 4 or plain.count("?") > 16 or plain.count("(") > 16:
        return False
    ways = [1 + part.count("|") for part in re.split(r"[()]", plain)]
    return prod([*ways, _NAME**repeats, 2 ** plain.count("?")]) <= _BUDGET
