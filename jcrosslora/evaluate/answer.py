"""Write the answers to examples under a base and its adapters."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Generator, Model, Written
from jcrosslora.decoder.prompt_batches import LONGEST
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.answers import Answers
from jcrosslora.evaluate.examples import Example, as_completion, read_examples
from jcrosslora.evaluate.log_probs import Models, Tokens, log_prob_sums
from jcrosslora.text import Completion, read
from jcrosslora.utils.progress import track

_MORE, _MOST = 16, 512  # tokens that an answer may have beyond the longest right one, and in all


def answer(
    base: BaseModel | str | Path,
    examples: Sequence[Example] | str | Path,
    adapters: Sequence[Adapter | str | Path] = (),
    *,
    max_new_tokens: int | None = None,
    dtype: DTypeLike = jnp.float32,
    batch_tokens: int = 4096,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Answers:
    """Write the likeliest answer to each example, token by token, under the base and under the base with each adapter.

    The likelihood of the right answer, the token that ends it included, is computed as well. A conversation is read in
    the base's chat template.

        found = jcl.answer("models/gemma-3-270m", "test.jsonl", ["moved", "trained"])
        found.bootstrap("exact"), found.lift("exact", 1, 2)

    Args:
        base: the model, opened, or what `open_base` opens.
        examples: at least one, or the JSONL file of them (see `read_examples`); of a question with choices the right
            choice is the answer.
        adapters: of this base, loaded, or what `load_adapter` loads; applied unmerged.
        max_new_tokens: tokens at which an answer is cut off; None takes those of the longest right answer and 16 more,
            512 at most.
        dtype: of the weights, float32 or bfloat16.
        batch_tokens: token positions in memory at once for the likelihoods, over all adapters.
        model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
        tokenizer: of the base, if it is loaded already.

    Raises:
        UsageError: no example, one without an answer, max_new_tokens or batch_tokens below 1, a text longer than the
            base reads, or messages that its chat template refuses.
        AdapterError: an adapter that does not fit, or whose predictions are not finite.
        CheckpointError: the base or its tokenizer cannot be read, or its predictions are not finite.
    """
    base = base if isinstance(base, BaseModel) else open_base(base)
    found = read_examples(examples) if isinstance(examples, str | Path) else examples
    completions = tuple(map(as_completion, found))
    adapters = [one if isinstance(one, Adapter) else load_adapter(one, base) for one in adapters]
    if not completions or batch_tokens < 1:
        msg = f"{len(completions)} examples in batches of {batch_tokens} tokens: wanted 1 or more of both"
        raise UsageError(msg)
    if max_new_tokens is not None and max_new_tokens < 1:
        msg = f"answers of {max_new_tokens} tokens: wanted 1 or more"
        raise UsageError(msg)
    tokenizer = tokenizer or load_tokenizer(base)
    items = [_tokens(base, tokenizer, one, number) for number, one in enumerate(completions, 1)]
    room = max_new_tokens or _room(tokenizer, completions)
    models = Models.of(base, adapters, model, dtype)
    sums, _ = log_prob_sums(models, items, batch_tokens, unit="examples")
    written = _write(models, tokenizer, completions, room)
    return Answers(models.names, completions, written, -sums[:, :, 0], room)


def _write(
    models: Models, tokenizer: Tokenizer, completions: Sequence[Completion], max_new_tokens: int
) -> tuple[tuple[Written, ...], ...]:
    """Answer all prompts under each model; adapters of one shape, the base's of zeros, share the compiled programs."""
    prompts, names, found = [one.prompt for one in completions], models.names, []
    with track(models.count * len(prompts), "write answers", "answers") as bar:
        for place in range(models.count):
            generator = Generator(models.one(place), tokenizer, names[0], names[place] if place else None)
            found.append(tuple(generator.write(prompts, max_new_tokens, 0.0, jax.random.key(0), bar=bar)))
    return tuple(found)


def _tokens(base: BaseModel, tokenizer: Tokenizer, completion: Completion, number: int) -> Tokens:
    """Tokenize a prompt and its right answer, as a question with one choice."""
    if not completion.answer.strip():
        msg = f"example {number} has no answer: give the right one, which is what answers are compared with"
        raise UsageError(msg)
    found = read(tokenizer, completion)
    longest = base.config.get("max_position_embeddings")
    whole, prompt = ("with its answer", len(found.ids), longest), ("in front of its answer", found.answer, LONGEST)
    for what, length, most in (whole, prompt):
        if isinstance(most, int) and length > most:
            msg = f"example {number} has {length:,} tokens {what}, and at most {most:,} are read with {base.ref}: "
            raise UsageError(msg + "leave it out, or make it shorter")
    cut = found.answer - 1
    return Tokens(found.ids[:cut], (found.ids[cut:],), (1,))


def _room(tokenizer: Tokenizer, completions: Sequence[Completion]) -> int:
    """Count the tokens that an answer may have: those of the longest right one, and some more."""
    texts = [text for one in completions for text in (one.answer, *one.references)]
    return min(_MOST, _MORE + max(len(tokenizer.encode(text, special=False).ids) for text in texts))
