"""Score the choices of questions under a base and its adapters."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Model, load_model, stack_adapters
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.log_probs import Models, log_prob_sums
from jcrosslora.evaluate.question_batches import Tokens, tokenize
from jcrosslora.evaluate.scores import Scores
from jcrosslora.evaluate.tasks import Question, read_task


def score(
    base: BaseModel | str | Path,
    questions: Sequence[Question] | str | Path,
    adapters: Sequence[Adapter | str | Path] = (),
    *,
    dtype: DTypeLike = jnp.float32,
    batch_tokens: int = 4096,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Scores:
    """Score every choice of every question under the base and under the base with each adapter.

    All models run in one pass over the questions, mapped over the adapters; the base is an adapter of zeros. The tokens
    that the choices of a question share are run once. Log-probabilities are float32, their sums float64.

    Args:
        base: the model, opened, or what `open_base` opens.
        questions: at least one, or the JSONL file of them (see `read_task`).
        adapters: of this base, loaded, or what `load_adapter` loads; applied unmerged.
        dtype: of the weights, float32 or bfloat16.
        batch_tokens: token positions in memory at once, over all adapters.
        model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
        tokenizer: of the base, if it is loaded already.

    Raises:
        UsageError: no question, batch_tokens below 1, text without tokens, or more tokens than the base was trained
            for.
        AdapterError: an adapter that does not fit, or whose scores are not finite.
        CheckpointError: the base or its tokenizer cannot be read, or its scores are not finite.
    """
    base = base if isinstance(base, BaseModel) else open_base(base)
    questions = read_task(questions) if isinstance(questions, str | Path) else questions
    adapters = [one if isinstance(one, Adapter) else load_adapter(one, base) for one in adapters]
    if not questions or batch_tokens < 1:
        msg = f"{len(questions)} questions in batches of {batch_tokens} tokens: wanted 1 or more of both"
        raise UsageError(msg)
    items = read_questions(base, questions, tokenizer)
    count = len(adapters) + 1
    stacked = stack_adapters([Adapter(modules={}), *adapters], base)
    models = Models((model or load_model(base, dtype)).with_adapter(stacked), count)
    names = (base.name, *(adapter.info.name for adapter in adapters))
    log_probs, tokens = log_prob_sums(models, names, items, batch_tokens, unit="questions")
    return Scores.of(names, questions, log_probs, tokens)


def read_questions(base: BaseModel, questions: Sequence[Question], tokenizer: Tokenizer | None = None) -> list[Tokens]:
    """Tokenize questions for a base.

    Raises:
        UsageError: text without tokens, or with more of them than the positions that the base was trained on, beyond
            which its predictions mean nothing.
        CheckpointError: the tokenizer cannot be read.
    """
    tokenizer = tokenizer or load_tokenizer(base)
    items = [tokenize(tokenizer, question) for question in questions]
    longest = base.config.get("max_position_embeddings")
    for number, (item, question) in enumerate(zip(items, questions, strict=True), 1):
        length = len(item.prefix) + max(map(len, item.tails))
        if isinstance(longest, int) and length > longest:
            msg = f"question {number} ({question.prompt[:40]!r}...) has {length:,} tokens with its longest choice, and "
            msg += f"{base.ref} reads {longest:,} at most: leave it out, or make it shorter"
            raise UsageError(msg)
    return items
