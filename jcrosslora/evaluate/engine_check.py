"""Run an adapter in an engine, and compare the engine's predictions with those of our decoder.

Engines round differently, above all with quantised weights. So the base alone is compared too. With the adapter, the
two may differ by three times the difference without it, or by 0.001.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, find_adapter, load_adapter
from jcrosslora.adapter.export import split_for_base
from jcrosslora.adapter.merge import write_merged
from jcrosslora.adapter.records import why_idle
from jcrosslora.checkpoint import BaseModel, load_tokenizer, open_base
from jcrosslora.checkpoint.tokenizer import pad_right
from jcrosslora.decoder import Generator, Model, forward, load_model, logits, stack_adapter
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.evaluate.engine_runs import ENGINES, Answers, Text

PROMPTS = (
    "The capital of France is",
    "Question: Which of the two is larger, the sun or the moon?\nAnswer:",
    "Play some jazz and wake me up at seven tomorrow",
)
_NEW = 8  # tokens that are written after a prompt
_LEAST, _FACTOR = 1e-3, 3.0


@dataclass(frozen=True)
class EngineRun:
    """The predictions of an engine with an adapter, compared with our decoder's.

    Attributes:
        difference: the largest difference between log-probabilities of next tokens, with the adapter.
        plain: the same without it.
        change: the largest change that the adapter makes to them in our decoder.
        answers: number of prompts.
        agreeing: number of prompts where all likeliest tokens agree.
        notes: parts of the adapter that our decoder leaves out, one sentence each.
    """

    engine: str
    version: str
    difference: float
    plain: float
    change: float
    answers: int
    agreeing: int
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether the engine computes something else with the adapter, beyond rounding."""
        return not self.difference <= max(_LEAST, _FACTOR * self.plain)

    @property
    def sentence(self) -> str:
        """The outcome with its figures, without a full stop."""
        agrees = "agrees" if self.change > _FACTOR * self.plain else "cannot tell, as its rounding hides the adapter"
        figures = f"log-probabilities differ by up to {self.difference:.2g} with the adapter and {self.plain:.2g} "
        figures += f"without it; it changes them by up to {self.change:.2g}"
        verdict = f"{self.engine} {self.version} {'differs' if self.differs else agrees}"
        return f"{verdict}: {figures}; {self.agreeing} of {self.answers} answers agree"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a figure that is not finite becomes null."""
        data = {**asdict(self), "differs": self.differs}
        return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in data.items()}


def check_run(path: str | Path, base: Any, *, original: Any = None) -> EngineRun:
    """Run an adapter in the engine of its format, and compare with our decoder.

    Args:
        base: in a form that the engine loads: GGUF for llama.cpp.
        original: the adapter that the files were made from, which our decoder runs instead.

    Raises:
        JCrossLoRAError: the engine is not installed, it or our decoder cannot load the adapter or the base, or the
            adapter does nothing.
    """
    files, base = find_adapter(path), open_base(base)
    engine = ENGINES.get(files.form)
    if engine is None:
        msg = f"{path}: no engine runs {files.form} here: write the adapter in profile portable, gguf or mlx"
        raise UsageError(msg)
    version = engine.version
    whole = max(min(module.shape) for module in base.modules.values())  # a DoRA has a change of full rank
    adapter = load_adapter(path if original is None else original, base, rank=whole, replaced=True)
    if (idle := why_idle(adapter)) is not None:
        raise AdapterError(idle)
    texts, plain, ours = _own(base, adapter)
    their_plain, theirs = engine.answers(base, files, texts)
    likeliest = [[np.nan_to_num(row, nan=-np.inf).argmax(-1) for row in rows] for rows in (ours, theirs)]
    agreeing = sum(map(np.array_equal, *likeliest))
    figures = _largest(ours, theirs), _largest(plain, their_plain), _largest(plain, ours)
    return EngineRun(engine.name, version, *figures, len(texts), agreeing, adapter.info.ignored)


def _own(base: BaseModel, adapter: Adapter) -> tuple[list[Text], Answers, Answers]:
    """Write texts with our decoder and an adapter; return them and their predictions without and with it.

    Norms, biases and token rows of the adapter are first merged into a copy of the base.
    """
    plain, split = load_model(base), split_for_base(replace(adapter, experts=()), base)
    if not split.changes_base:
        model = plain.with_adapter(stack_adapter(adapter, base))
    else:
        with TemporaryDirectory() as folder:
            write_merged(base, split.absorbed, Path(folder), "float32")
            stacked = stack_adapter(replace(split.kept, experts=adapter.experts), base)
            model = load_model(open_base(folder)).with_adapter(stacked)
    tokenizer = load_tokenizer(base)
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    answers = Generator(model, tokenizer, base.ref).continue_tokens(prompts, _NEW, 0.0, jax.random.key(0))
    pairs = zip(prompts, answers, strict=True)
    texts = [Text(np.concatenate([prompt, answer]), len(prompt) - 1) for prompt, answer in pairs]
    return texts, _log_probs(plain, texts), _log_probs(model, texts)


def _log_probs(model: Model, texts: Sequence[Text]) -> Answers:
    tokens, mask = pad_right([text.ids for text in texts], (len(texts), max(len(text.ids) for text in texts)))
    rows = _predict(model, jnp.asarray(tokens), jnp.asarray(mask))
    return [np.asarray(row[text.first : len(text.ids)]) for row, text in zip(rows, texts, strict=True)]


@jax.jit
def _predict(model: Model, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits(model, forward(model, tokens, mask=mask).hidden))


def _largest(ours: Answers, theirs: Answers) -> float:
    """Return the largest difference where both give a number; infinity if a row has none."""
    gaps = [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    known = all(np.isfinite(gap).any(-1).all() for gap in gaps)
    return float(max(np.nanmax(gap) for gap in gaps)) if known else math.inf
