"""Print the demo's result: answers side by side, and a table of figures."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jcrosslora.demo.compare import Comparison
from jcrosslora.errors import UsageError


def print_answers(comparison: Comparison, names: Sequence[str], count: int, console: Console) -> None:
    """Print what some of the models write in answer to the first `count` questions, one model below the other."""
    width = max(map(len, names))
    for place, question in enumerate(comparison.questions[:count]):
        console.print(Text(question.question, style="bold"), soft_wrap=True)
        for name in names:
            written = comparison.written[name][place] or "(nothing)"
            console.print(Text(f"  {name:<{width}}  {written}"), soft_wrap=True)


def print_figures(comparison: Comparison, trained: str, console: Console) -> None:
    """Print log-likelihood, accuracy, share of JSON and lift of every model.

    Args:
        comparison: what to print.
        trained: the model whose gain over the base is the whole lift.
        console: where to.
    """
    nats, accuracy, json = comparison.log_likelihoods(), comparison.accuracies(), comparison.json_shares()
    written = len(comparison.written[trained])
    caption = (
        f"{len(comparison.questions)} questions. log p / char: log-likelihood of the right answer, nats per character. "
        f"In JSON: of the first {written} answers in writing. "
        f"Lift: share of the gain in log-likelihood of '{trained}', with its 95% interval."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("log p / char", "accuracy", "in JSON", "lift recovered"):
        table.add_column(name, justify="right")
    for name in comparison.names:
        shown = (f"{nats[name]:.3f}", f"{accuracy[name]:.0%}", f"{json[name]:.0%}", _lift(comparison, name, trained))
        table.add_row(Text(name), *map(Text, shown))
    console.print(table)


def _lift(comparison: Comparison, name: str, trained: str) -> str:
    if name == comparison.names[0]:
        return "0"
    if name == trained:
        return "1"
    try:
        found = comparison.lift(name, trained)
    except UsageError:  # an interval that includes 0: no share of such a gain can be told
        return "-"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
