"""What experiments have in common as commands: progress, one line for an error, and scores of known answers."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import jcrosslora as jcl
from jcrosslora.decoder import Model, StackedAdapter
from jcrosslora.evaluate.log_probs import Models, scored_tokens
from jcrosslora.evaluate.packing import Tokens
from jcrosslora.text import Reading
from jcrosslora.utils.progress import track

_POSITIONS = 1024  # tokens of a batch that is scored


@contextmanager
def as_command() -> Iterator[None]:
    """Show progress, and end the command with one line if it fails by an error of ours or of the files."""
    jcl.show_progress()
    try:
        yield
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def wide_console() -> Console:
    """Return a console as wide as the terminal, 120 columns without one."""
    return Console(width=None if sys.stdout.isatty() else 120)


def score_answers(model: Model, update: StackedAdapter, items: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Score N answers to their prompts under a model with an update.

    Returns:
        float (N,) log-probabilities in nats, and bool (N,), whether each token, the end included, is the likeliest.
    """
    models = Models(model.with_adapter(jax.tree.map(lambda leaf: leaf[None], update)), ("the update",))
    tokens = [Tokens(one.ids[: one.answer - 1], (one.ids[one.answer - 1 :],), (1,)) for one in items]
    sums, written = np.zeros(len(items)), np.ones(len(items), bool)
    with track(len(items), "score", "answers") as bar:
        for found in scored_tokens(models, tokens, _POSITIONS, bar):
            np.add.at(sums, found.places[:, 0], found.log_probs[0].astype(np.float64))
            np.logical_and.at(written, found.places[:, 0], found.likeliest[0] == found.wanted)
    return sums, written
