"""`jcrosslora evaluate`: scores of a base alone and with adapters."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json, say
from jcrosslora.errors import UsageError

if TYPE_CHECKING:
    from jcrosslora.evaluate import Scores


@dataclass(frozen=True)
class Evaluate:
    """Score a base, alone and with adapters, on multiple-choice questions; say for each whether it is better."""

    base: str
    """The base model: a folder of safetensors, a GGUF file or a hub id."""
    task: Path
    """JSONL with question, choices and answer (the index of the right choice), one question a line."""
    adapter: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Adapters of this base, scored beside each other."""
    limit: int | None = None
    """Take only the first so many questions."""
    json: bool = False
    """Print the scores as JSON."""

    def run(self, console: Console) -> None:
        """Print each figure with its interval, and the difference to the base."""
        from jcrosslora.adapter import load_adapter
        from jcrosslora.adapter.ignored import token_update_sentences
        from jcrosslora.checkpoint import open_base
        from jcrosslora.evaluate import print_scores, read_task, score

        questions = read_task(self.task)
        if self.limit is not None and self.limit < 1:
            msg = f"limit {self.limit} is out of range; it must be at least 1"
            raise UsageError(msg)
        base = open_base(self.base)
        adapters = [load_adapter(ref, base) for group in self.adapter for ref in group]
        notes = [
            f"{adapter.info.name}: {sentence}"
            for adapter in adapters
            for sentence in token_update_sentences(adapter.tokens, "bases are run without it")
        ]
        scores = score(base, questions[: self.limit], adapters, progress=True)
        if self.json:
            print_json({**_figures(scores), "not_scored": notes})
            return
        for note in notes:
            say(console, f"not scored: {note}")
        print_scores(scores, console)


def _figures(scores: "Scores") -> dict[str, Any]:
    """Give every figure of every model with its interval, and its difference to the base."""
    from jcrosslora.evaluate import FIGURES

    models: list[dict[str, Any]] = [{"name": name} for name in scores.names]
    for figure in FIGURES:
        found = zip(models, scores.bootstrap(figure), scores.differences(figure), strict=True)
        for place, (model, value, difference) in enumerate(found):
            model[figure] = asdict(value) | ({"minus_base": asdict(difference)} if place else {})
    return {"questions": len(scores.answers), "models": models}
