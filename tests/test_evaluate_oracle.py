"""Scores against a plain loop over questions and choices in torch, for the base and for adapters merged into it."""

import numpy as np
import pytest
from tiny_models import save_tiny, torch, transformers
from tiny_tokenizers import KINDS, write_tokenizer

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.checkpoint import open_base
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import load_model
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.evaluate import Question, score
from jcrosslora.evaluate.log_probs import tokenize
from jcrosslora.evaluate.packing import packed

QUESTIONS = [
    Question("which of these is it?", ("the sun", "a star", "a wet stone in the river", "the"), 2),
    Question("é 日本 or the moon?", ("日本語", "él"), 0),
    Question("the " * 12, ("one long answer of many words, with a star", "x", "🎉 the", "the sun", "the sun and"), 4),
    Question("a", ("only this",), 0),
    Question("which star is it?", ("the sun", "the moon", "a stone", "é"), 1),
]


def adapter_of(base, rank, seed, roles=("q_proj", "v_proj", "down_proj")):
    rng = np.random.default_rng(seed)
    modules = {
        name: LoRAFactors(
            a=rng.standard_normal((rank, module.shape[1])).astype(np.float32) * 0.1,
            b=rng.standard_normal((module.shape[0], rank)).astype(np.float32) * 0.1,
            scale=0.7,
        )
        for name, module in base.modules.items()
        if module.role in roles
    }
    return Adapter(modules=modules, info=AdapterInfo(name=f"rank {rank}"))


def merged(folder, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            model.get_submodule(name).weight += torch.from_numpy(factors.scale * factors.b @ factors.a)
    return model


def plain_scores(model, tokenizer, question):
    """Log-probability and tokens of each choice: offsets of the tokenizers library, one forward pass a choice."""
    prompt = f"Question: {question.question}\nAnswer:"
    found = []
    for choice in question.choices:
        encoded = tokenizer(f"{prompt} {choice}", return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])[None]
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        answer = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
        found.append((sum(float(logs[i - 1, ids[0, i]]) for i in answer), len(answer)))
    return found


@pytest.fixture(
    scope="module",
    params=[("llama", "byte-level"), pytest.param(("gemma3_text", "sentencepiece"), marks=pytest.mark.full)],
)
def tiny(request, tmp_path_factory):
    family, kind = request.param
    folder = tmp_path_factory.mktemp("base")
    save_tiny(family, folder, vocab_size=330, max_position_embeddings=256)
    return write_tokenizer(folder, KINDS[kind]())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=330, max_position_embeddings=256)
    return write_tokenizer(folder, KINDS["byte-level-bos"]())


def test_scores_are_those_of_a_plain_loop_with_merged_weights(tiny):
    base = open_base(tiny)
    adapters = [adapter_of(base, 2, 1), adapter_of(base, 5, 2, ("gate_proj", "o_proj", "q_proj"))]
    found = score(base, QUESTIONS, adapters, batch_tokens=600)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tiny)
    for index, adapter in enumerate([Adapter(modules={}), *adapters]):
        model = merged(tiny, adapter)
        for number, question in enumerate(QUESTIONS):
            wanted = plain_scores(model, tokenizer, question)
            many = len(wanted)
            assert found.tokens[number].tolist() == [count for _, count in wanted] + [0] * (5 - many)
            np.testing.assert_allclose(
                found.log_probs[index, number, :many], [value for value, _ in wanted], atol=1e-3, rtol=1e-5
            )
            assert np.isnan(found.log_probs[index, number, many:]).all()
    assert found.names == (str(tiny), "rank 2", "rank 5")
    # The adapters change the scores by far more than the tolerance above.
    assert (
        np.nanmin(np.abs(found.log_probs[1:] - found.log_probs[0]).max(axis=-1, where=found.tokens > 0, initial=0))
        > 0.02
    )


def test_the_size_of_a_batch_does_not_matter(llama):
    base = open_base(llama)
    tokenizer, model = load_tokenizer(base), load_model(base)
    alike = [QUESTIONS[0], QUESTIONS[4], QUESTIONS[0]]
    one, other = (score(base, alike, batch_tokens=each, tokenizer=tokenizer, model=model) for each in (1, 2000))
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_bfloat16_scores_are_near_float32(llama):
    base = open_base(llama)
    near, exact = (score(base, QUESTIONS[:1], dtype=kind).nll_per_char() for kind in ("bfloat16", "float32"))
    np.testing.assert_allclose(near, exact, rtol=0.05)
    assert near != exact


def test_an_adapter_that_is_not_finite_is_named(llama):
    base = open_base(llama)
    bad = adapter_of(base, 1, 0)
    next(iter(bad.modules.values())).b[:] = 1e38
    with pytest.raises(AdapterError, match="rank 1: gives log-probabilities that are not finite"):
        score(base, QUESTIONS[:1], [bad])


def test_an_adapter_of_another_base_is_refused(llama):
    base = open_base(llama)
    other = Adapter(modules={"model.layers.9.self_attn.q_proj": LoRAFactors(np.ones((1, 48)), np.ones((48, 1)))})
    with pytest.raises(AdapterError, match=r"layers\.9"):
        score(base, QUESTIONS[:1], [other])


@pytest.mark.parametrize(("questions", "size"), [([], 100), (QUESTIONS[:1], 0)])
def test_no_questions_or_an_empty_batch_are_refused(llama, questions, size):
    with pytest.raises(UsageError, match="expected 1 or more"):
        score(open_base(llama), questions, batch_tokens=size)


def test_text_longer_than_the_bases_positions_is_refused(llama):
    long = Question("the " * 400, ("the sun", "x"), 0)
    with pytest.raises(UsageError, match=r"question 2 \('Question: the .*tokens with its longest choice, and .*256 at"):
        score(open_base(llama), [QUESTIONS[0], long])


def test_a_text_beyond_the_original_positions_uses_long_rotations_throughout(tmp_path):
    """Its prompt alone would take phi3's short factors, as the other questions do all along, one of them beside it."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
    rope = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors}}
    save_tiny(
        "phi3", tmp_path, vocab_size=330, max_position_embeddings=256, **rope, original_max_position_embeddings=32
    )
    write_tokenizer(tmp_path, KINDS["byte-level"]())
    long = Question("a", ("zebra quagga giraffe okapi ox", "okapi quagga zebra giraffe ox"), 0)
    beside = Question("a", ("zebra quagga giraffe", "quagga zebra giraffe"), 0)
    mixed = Question("a", ("zebra quagga giraffe okapi ox", "zebra quagga"), 0)
    questions = [long, beside, Question("a", ("x", "y"), 0), mixed]
    base = open_base(tmp_path)
    tokens = load_tokenizer(base)
    sizes = [[len(tokens.encode(f"{one.prompt} {choice}").ids) for choice in one.choices] for one in questions]
    assert len(tokens.encode(long.prompt).ids) < 32 < min(sizes[0])
    assert max(sizes[1] + sizes[2] + sizes[3][1:]) < 32 < sizes[3][0]
    assert len(list(packed([tokenize(tokens, one) for one in questions[:3]], 4096, share=False))) == 1
    found = score(base, questions)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    model = merged(tmp_path, Adapter(modules={}))
    for number, question in enumerate(questions):
        wanted = [value for value, _ in plain_scores(model, tokenizer, question)]
        np.testing.assert_allclose(found.log_probs[0, number], wanted, atol=1e-3, rtol=1e-5)
