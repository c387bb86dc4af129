"""What `jcrosslora evaluate --draft` prints of a draft model."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from jcrosslora.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from jcrosslora.evaluate import Acceptance, Interval


def print_drafts(found: "Acceptance", notes: Sequence[str], console: Console, *, as_json: bool) -> None:
    """Print the figures of each draft; `notes` say what of the adapters is not part of them."""
    figures = found.figures()
    counts = {"answers": len(found.foreseen), "tokens": found.tokens, "drafted": found.drafted, "cost": found.cost}
    if as_json:
        print_json(counts | {"drafts": [asdict(one) for one in figures], "not_scored": list(notes)})
        return
    for note in notes:
        say(console, f"not scored: {note}")
    said = f"{counts['answers']:,} answers of {found.tokens:,} tokens in all, {found.drafted} drafted for each pass by "
    say(console, f"{said}{found.cost:.2f} of the parameters, 95% intervals")
    columns = "draft", "acceptance rate", "acceptance length", "minus alone", "estimated speed-up"
    print_table(console, columns, (map(_text, vars(one).values()) for one in figures))


def _text(value: "Interval | float | str") -> str:
    if isinstance(value, str | int | float):
        return value if isinstance(value, str) else f"{value:.2f}"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
