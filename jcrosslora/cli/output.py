"""What commands print: lines that nothing reformats, and JSON."""

import json
import sys
from typing import Any

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colour, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print data as JSON on stdout, with nothing else beside it."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    print()
