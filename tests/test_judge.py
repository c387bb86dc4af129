"""The label-free judge of a fit: which greedy answers of the source the target writes as well."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from probe_bases import CORPUS, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import Generator, load_model, stack_adapter
from jcrosslora.distill.distillation import end_tokens
from jcrosslora.distill.judge import answers_in_columns, batch_answers, count_agreed
from jcrosslora.distill.output_columns import find_columns
from jcrosslora.distill.sources.decoder import RestrictedModel
from jcrosslora.text import Completion

TOKENS = 3
PROMPTS = sorted({text[:length] for text in CORPUS for length in range(4, 60)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("base"), 90, bos=True, eos=1, layers=2))


def written(base, adapter):
    """The tokens of prompts with what follows them, temperature 0."""
    generator = Generator.of(base, adapter, model=load_model(base))
    prompts = [generator.tokenizer.encode(text).ids for text in PROMPTS]
    rows = generator.continue_tokens(prompts, TOKENS, 0.0, jax.random.key(0))
    return [(*prompt, *row) for prompt, row in zip(prompts, rows, strict=True)]


def judged(base, answers, adapter):
    """Count the answers that the base with an adapter writes too, all of whose tokens are compared, and all."""
    tokenizers = load_tokenizer(base), load_tokenizer(base)
    batches = batch_answers(answers, tokenizers)
    columns = find_columns(base, base, batches, 10_000, end_tokens(tokenizers, answers))
    model = RestrictedModel.of(load_model(base), columns.head_rows(1), len(columns.ends[1]))
    student = model.with_adapter(stack_adapter(adapter, base))
    return count_agreed(student, [answers_in_columns(batch, columns) for batch in batches])


def test_agreement_is_the_share_of_equal_greedy_answers(base):
    source, other = (random_adapter(base, scale=scale) for scale in (0.3, 0.32))
    tokenizer, answers, equal, ended = load_tokenizer(base), [], [], []
    for prompt, one, two in zip(PROMPTS, written(base, source), written(base, other), strict=True):
        text = tokenizer.decode(one)
        # Only a text that is tokenized as it was written has the same tokens in one pass.
        if len(text) > len(prompt) and text.startswith(prompt) and tuple(tokenizer.encode(text).ids) == one:
            answers.append(Completion(prompt, text[len(prompt) :], ended=False))
            equal.append(one == two)
            ended.append(len(one) < len(tokenizer.encode(prompt).ids) + TOKENS)
    assert len(answers) >= 8
    assert 0 < np.mean(equal) < 1
    assert judged(base, answers, source) == (len(answers), len(answers))
    assert judged(base, answers, other) == (sum(equal), len(answers))
    assert judged(base, [replace(one, ended=True) for one in answers], source) == (sum(ended), len(answers))


def test_without_answers_there_is_no_figure():
    assert batch_answers([], ()) == []
    assert count_agreed(None, []) == (0, 0)
