"""Near-duplicates among short texts, by the pieces of four characters that they have in common."""

from collections.abc import Collection, Sequence

_PIECE = 4  # characters
_MOST = 0.6  # of all pieces of two texts, the share that both have


def distinct(texts: Sequence[str], beside: Collection[str] = ()) -> list[int]:
    """Choose texts that are no near-duplicates: of each other the first is kept, of those in `beside` none.

    Letters count as lower case, and any space as one.

    Returns:
        Their indices, in order.
    """
    kept, found = [pieces(text) for text in beside], []
    for place, text in enumerate(texts):
        own = pieces(text)
        if all(overlap(own, other) <= _MOST for other in kept):
            kept.append(own)
            found.append(place)
    return found


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of the pieces of both texts that they have in common, 0 to 1."""
    return len(first & second) / max(1, len(first | second))


def pieces(text: str, length: int = _PIECE) -> frozenset[str]:
    """Return all pieces of so many characters of a text, with a space in front and behind."""
    line = f" {' '.join(text.lower().split())} "
    return frozenset(line[place : place + length] for place in range(max(1, len(line) - length + 1)))
