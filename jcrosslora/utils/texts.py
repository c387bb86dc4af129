"""Texts of a bounded length."""


def shortened(text: str, most: int = 60) -> str:
    """Return a text of at most so many characters; of a longer one the beginning, and three dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
