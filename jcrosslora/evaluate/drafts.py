"""Judge a draft model: how many of its tokens greedy speculative decoding accepts.

The target accepts drafted tokens as long as it would write the same ones (Y. Leviathan et al., arXiv 2211.17192). So
its answers are the same as without a draft, and one pass of the draft over them shows which tokens would be accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.hub import public_names
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Generator, load_model
from jcrosslora.decoder.generate import cut_ids
from jcrosslora.decoder.loading import held_numbers
from jcrosslora.errors import CheckpointError, UsageError, not_finite
from jcrosslora.evaluate.bootstrap import Interval, ratios
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.evaluate.log_probs import Models, likeliest_by_question, scored_tokens
from jcrosslora.evaluate.packing import Tokens
from jcrosslora.text.completion import Asked, as_prompts
from jcrosslora.utils.progress import track

_POSITIONS = 4096  # tokens in memory at once, over all drafts


@dataclass(frozen=True)
class DraftFigures:
    """The figures of one draft, with 95% intervals over prompts.

    Attributes:
        acceptance_rate: share of the target's tokens that the draft predicts.
        acceptance_length: tokens per pass of the target, including the one that it adds itself.
        minus_alone: acceptance length minus the acceptance length without an adapter.
        estimated_speed_up: over the target alone, if the time of a pass is proportional to the parameters.
    """

    name: str
    acceptance_rate: Interval
    acceptance_length: Interval
    minus_alone: Interval
    estimated_speed_up: float


@dataclass(frozen=True, eq=False)
class Acceptance:
    """How well A drafts, the draft model alone and with each adapter, predict n greedy answers of a target.

    Attributes:
        names: (A,) names of the drafts, without their folders.
        predicted: (n,) of bool (A, T): whether a token of an answer, the end token included, is the draft's likeliest.
        drafted: number of tokens drafted per pass of the target.
        cost: the draft's share of the target's parameters.
    """

    names: tuple[str, ...]
    predicted: tuple[np.ndarray, ...]
    drafted: int
    cost: float

    @property
    def tokens(self) -> int:
        """The number of tokens in all answers."""
        return sum(one.shape[1] for one in self.predicted)

    def passes(self) -> np.ndarray:
        """Count the target's passes for each answer, float64 (A, n)."""
        return np.array([[_passes(row, self.drafted) for row in one] for one in self.predicted], np.float64).T

    def figures(self) -> list[DraftFigures]:
        """Compute the figures of each draft."""
        hits, passes = np.array([one.sum(axis=1) for one in self.predicted]).T, self.passes()
        tokens = np.broadcast_to([float(one.shape[1]) for one in self.predicted], passes.shape)
        lengths = ratios(tokens, passes)
        speed_ups = [one.value / (1 + self.drafted * self.cost) for one in lengths]
        columns = self.names, ratios(hits, tokens), lengths, ratios(tokens, passes, minus_first=True), speed_ups
        return [DraftFigures(*row) for row in zip(*columns, strict=True)]


def judge_draft(
    target: BaseModel | str | Path | Any,
    draft: BaseModel | str | Path | Any,
    prompts: Sequence[Asked] | str | Path,
    adapter: Adapter | str | Path | Any | None = None,
    draft_adapters: Sequence[Adapter | str | Path | Any] = (),
    *,
    drafted: int = 4,
    max_new_tokens: int = 128,
    dtype: DTypeLike = jnp.float32,
) -> Acceptance:
    """Let a target write greedy answers, and count the tokens that a draft predicts, alone and with adapters.

        found = jcl.judge_draft("qwen-1.5b", "qwen-0.5b", "prompts.jsonl", "trained", ["moved"])
        found.figures()[1].minus_alone

    Args:
        target: the model that answers, an open base or anything that `open_base` accepts.
        draft: the smaller model that drafts, given in the same way.
        prompts: texts and conversations, or a file of them, in the form of `transfer --prompts`.
        adapter: of the target, loaded or anything that `load_adapter` accepts; None for the target alone.
        draft_adapters: of the draft.
        drafted: number of tokens drafted per pass of the target.
        max_new_tokens: tokens at which an answer is cut off.
        dtype: of the weights, float32 or bfloat16.

    Raises:
        UsageError: the two have different vocabularies, there is no prompt, or a number is below 1.
        AdapterError: an adapter does not fit, or its predictions are not finite.
        CheckpointError: a base or its tokenizer cannot be read, or its predictions are not finite.
    """
    asked = read_prompts(prompts) if isinstance(prompts, str | Path) else as_prompts(prompts)
    if not asked or min(drafted, max_new_tokens) < 1:
        msg = f"{len(asked)} prompts, {drafted} tokens drafted, answers of {max_new_tokens}: expected 1 or more of each"
        raise UsageError(msg)
    target, draft = open_base(target), open_base(draft)
    _check_vocabularies(target, draft)
    adapter = None if adapter is None else load_adapter(adapter, target)
    adapters = [load_adapter(one, draft) for one in draft_adapters]
    tokenizer = load_tokenizer(target)
    ids = cut_ids(tokenizer, asked)
    with track(len(ids), "write answers", "answers") as bar:
        generator = Generator.of(target, adapter, model=load_model(target, dtype), tokenizer=tokenizer)
        rows = generator.write_tokens(ids, max_new_tokens, 0.0, jax.random.key(0), bar=bar)
        del generator  # before the draft is loaded
    items = [Tokens(one[:-1], (np.append(one[-1:], row),), (1,)) for one, row in zip(ids, rows, strict=True)]
    models = Models.of(draft, adapters, None, dtype)
    cost = held_numbers(draft) / held_numbers(target)
    return Acceptance(tuple(public_names(models.names)), _predicted(models, items), drafted, cost)


def _passes(predicted: np.ndarray, drafted: int) -> int:
    """Count the target's passes: each accepts the drafted tokens before the first wrong one, and adds its own."""
    passes = place = 0
    while place < len(predicted):
        wrong = np.flatnonzero(~predicted[place : place + drafted])
        place += 1 + (int(wrong[0]) if len(wrong) else drafted)
        passes += 1
    return passes


def _predicted(models: Models, items: Sequence[Tokens]) -> tuple[np.ndarray, ...]:
    """Return for each answer bool (A, T): whether the likeliest token of a draft is the answer's."""
    with track(len(items), "draft", "answers") as bar:
        scored = list(scored_tokens(models, items, _POSITIONS, bar))
    for one in scored:
        for log_probs, name in zip(one.log_probs, (None, *models.names[1:]), strict=True):
            if not np.isfinite(log_probs).all():
                raise not_finite(models.names[0], name, sound=True)
    own = likeliest_by_question(scored, len(items))
    return tuple(tokens == one.tails[0][1:] for tokens, one in zip(own, items, strict=True))


def _check_vocabularies(target: BaseModel, draft: BaseModel) -> None:
    """Refuse different tokenizers: drafted tokens are handed over as ids. Embedding rows without a token may differ."""
    for base in (target, draft):
        if base.vocabulary().tokens is None:
            raise CheckpointError(f"{base.ref}: its vocabulary cannot be compared: {base.vocabulary().reason}")
    names, own = target.vocabulary().names, draft.vocabulary().names
    if differ := sorted(index for index in names.keys() | own.keys() if names.get(index) != own.get(index)):
        shown = [one.get(differ[0], b"").decode(errors="replace") for one in (own, names)]
        msg = f"{draft.ref} cannot draft for {target.ref}: {len(differ):,} token ids differ, such as {differ[0]}, "
        msg += f"which is {shown[0]!r} in the draft and {shown[1]!r} in the target: give a draft of the target's own "
        raise UsageError(msg + "family, as vLLM and llama.cpp need one vocabulary for both")
