"""Answers of a base and its adapters: what is written, the likelihood of the right ones, figures and intervals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from probe_bases import CORPUS, QUESTIONS, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer, pad_right
from jcrosslora.decoder import Generator, Written, forward, load_model, logits, stack_adapter
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.evaluate import ANSWER_FIGURES, Answers, answer, lift_recovered
from jcrosslora.text import Completion, Message, read

CHAT = (Message("user", "What jumps?"),)
EXAMPLES = [
    Completion("Water boils at", " 100 degrees"),
    Completion(CHAT, "the dog", references=("The quick brown fox", "dog")),
    Completion("Anna and", " Peter"),
    Completion((Message("system", "Be brief."), *CHAT), "Anna"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # A conversation in the plain template has more tokens than the 64 that tiny bases state.
    folder = write_base(tmp_path_factory.mktemp("base"), 60, bos=True, eos=1, layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return jcl.open_base(folder)


@pytest.fixture(scope="module")
def tokenizer(base):
    """One whose answers end soon: a third of all tokens ends them."""
    return dataclasses.replace(load_tokenizer(base), stops=tuple(range(1, 300, 3)))


@pytest.fixture(scope="module")
def adapters(base):
    return [random_adapter(base, seed=1, scale=0.3), random_adapter(base, seed=2, scale=0.3)]


@pytest.fixture(scope="module")
def found(base, tokenizer, adapters):
    return answer(base, EXAMPLES, adapters, max_new_tokens=8, tokenizer=tokenizer)


def made(texts, references, *, ended=True, nll=None):
    """Answers of given texts, (A, n)."""
    examples = tuple(Completion("p", own[0], references=tuple(own[1:])) for own in references)
    written = tuple(tuple(Written(text, 3, ended) for text in row) for row in texts)
    nll = np.ones((len(texts), len(examples))) if nll is None else np.array(nll)
    return Answers(tuple(f"model {row}" for row in range(len(texts))), examples, written, nll, 20)


# What is written


def test_each_model_writes_what_a_generator_of_its_own_writes(base, tokenizer, adapters, found):
    prompts = [one.prompt for one in EXAMPLES]
    ours = load_model(base)
    for row, adapter in zip(found.written, [None, *adapters], strict=True):
        alone = Generator.of(base, adapter, model=ours, tokenizer=tokenizer)
        assert list(row) == alone.write(prompts, 8, 0.0, jax.random.key(0))
    assert len(set(found.texts)) == 3
    assert found.names == (base.name, *(one.info.name for one in adapters))
    assert found.max_new_tokens == 8


def test_a_right_answer_that_a_model_writes_is_read_and_not_written(base, adapters, monkeypatch):
    """Answers that begin as a right one go on as they would without it."""
    plain, ids = load_tokenizer(base), [40, 41, 42, 43, 44]
    prompts = [plain.decode(ids[:count]) for count in range(1, 6)]
    own = Generator.of(base, adapters[0], model=load_model(base), tokenizer=plain)
    texts = [one.text for one in own.write(prompts, 8, 0.0, jax.random.key(0))]
    written = []

    def noted(self, *given, run=Generator.extend):
        written.append(1)
        return run(self, *given)

    monkeypatch.setattr(Generator, "extend", noted)
    wrong = [Completion(prompt, " 100 degrees") for prompt in prompts]
    known = [Completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    without = answer(base, wrong, adapters, max_new_tokens=8, tokenizer=plain)
    found = answer(base, known, adapters, max_new_tokens=8, tokenizer=plain)
    assert found.written == without.written
    assert found.texts[1] == tuple(text.strip() for text in texts)


def test_answers_are_cut_off_behind_the_longest_right_one(base):
    own = load_tokenizer(base)
    longest = len(own.encode("The quick brown fox", special=False).ids)
    found = answer(base, EXAMPLES[:2], tokenizer=dataclasses.replace(own, stops=()))
    assert found.max_new_tokens == longest + 16
    assert all(one.tokens == longest + 16 and not one.ended for one in found.written[0])


def test_an_answer_is_exact_only_if_it_ends(base, tokenizer, adapters):
    prompt, one = "Anna and Peter", adapters[0]
    endless = Generator.of(base, one, tokenizer=dataclasses.replace(tokenizer, stops=()))
    (row,) = endless.continue_tokens([endless.tokenizer.encode(prompt).ids], 8, 0.0, jax.random.key(0))
    # The last token that was not written before shall end the answers; what was written before it is right.
    count = max(place for place in range(1, 8) if row[place] not in row[:place])
    ending = dataclasses.replace(tokenizer, stops=(int(row[count]),))
    right = [Completion(prompt, endless.decode(row[:count]))]
    whole, cut = (answer(base, right, [one], max_new_tokens=room, tokenizer=ending) for room in (count + 1, count))
    assert whole.texts[1] == cut.texts[1] == (right[0].answer.strip(),)
    assert (whole.ended[1], whole.by_example("exact")[1]) == (True, 1)
    assert (cut.ended[1], cut.by_example("exact")[1]) == (False, 0)


def test_the_likelihood_is_that_of_the_answer_and_the_token_that_ends_it(base, adapters):
    ours, tokenizer = load_model(base), load_tokenizer(base)
    found, run = answer(base, EXAMPLES, adapters, max_new_tokens=1), jax.jit(forward)
    for place, adapter in enumerate(adapters, 1):
        stacked = stack_adapter(adapter, base)
        for nll, completion in zip(found.nll[place], EXAMPLES, strict=True):
            reading = read(tokenizer, completion)
            assert reading.ids[-1] == tokenizer.eos == 1
            tokens, mask = pad_right([reading.ids], (1, 64))
            hidden = run(ours.with_adapter(stacked), tokens, mask=mask).hidden
            logs = np.asarray(jax.nn.log_softmax(logits(ours, hidden)[0], -1), np.float64)
            places = np.arange(reading.answer, len(reading.ids))
            assert nll == pytest.approx(-logs[places - 1, reading.ids[places]].sum(), rel=1e-4)
    lengths = [len(one.answer.strip()) for one in EXAMPLES]
    np.testing.assert_allclose(found.by_example("nll_per_char"), found.nll / lengths)
    alone = answer(base, EXAMPLES, max_new_tokens=1)
    np.testing.assert_allclose(alone.nll[0], found.nll[0], rtol=1e-4)


@pytest.mark.parametrize("count", [3, 40])
def test_what_examples_begin_with_is_read_once_and_changes_no_likelihood(base, adapters, count):
    """In their row if all of them fit in one, else in front of their rows."""
    instruction = " ".join(CORPUS)[:120]
    asked = [Completion(f"{instruction}. {number}", " Anna and Peter"[: 6 + number % 7]) for number in range(count)]
    examples = [*asked, Completion("Anna and", " Peter")]
    found = answer(base, examples, adapters, max_new_tokens=1)
    for place in (0, count - 1, count):
        alone = answer(base, [examples[place]], adapters, max_new_tokens=1)
        np.testing.assert_allclose(alone.nll[:, 0], found.nll[:, place], rtol=1e-4)


def test_questions_are_answered_in_writing_too(base, tokenizer):
    found = answer(base, QUESTIONS[:2], max_new_tokens=3, tokenizer=tokenizer)
    assert found.references == (("at 100 degrees",), ("the light",))


def test_a_file_and_paths_are_read(base, adapters, tmp_path):
    jcl.save_adapter(adapters[0], tmp_path / "one", base_name="org/base")
    lines = [
        {
            "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
            "references": ["b", "a"],
        }
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = jcl.answer(str(base.ref), tmp_path / "task.jsonl", [tmp_path / "one"], max_new_tokens=2)
    assert found.references == (("a", "b"),)
    assert len(found.names) == 2


@pytest.mark.parametrize(
    ("examples", "settings", "reason"),
    [
        ([], {}, "0 examples"),
        (EXAMPLES, {"max_new_tokens": 0}, "answers of 0 tokens"),
        (EXAMPLES, {"batch_tokens": 0}, "batches of 0 tokens"),
        ([EXAMPLES[0], Completion("p", " ")], {}, "example 2 has no answer"),
        ([Completion("Anna " * 400, "a")], {}, "example 1 has .* tokens with its answer, and at most 256"),
    ],
)
def test_what_cannot_be_answered_is_refused(base, examples, settings, reason):
    with pytest.raises(UsageError, match=reason):
        answer(base, examples, **settings)


def test_an_adapter_that_is_not_finite_is_named(base):
    bad = random_adapter(base)
    next(iter(bad.modules.values())).b[:] = 1e38
    with pytest.raises(AdapterError, match="not finite"):
        answer(base, EXAMPLES[:1], [bad], max_new_tokens=2)


# Figures


def test_the_nearest_of_several_right_answers_counts():
    found = made([["b", "a", "c", " b\n"]], [["a", "b"]] * 4)
    assert found.by_example("exact").tolist() == [[1, 1, 0, 1]]
    assert made([['{"a": 1}']], [['{"a": 2}', '{"a":1}']]).by_example("json").tolist() == [[1]]


def test_texts_that_were_cut_off_count_for_overlap_alone():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    found = made([["3"]], [["3"]], ended=False)
    values = {figure: float(found.by_example(figure)[0, 0]) for figure in ANSWER_FIGURES}
    assert values == {"exact": 0, "json": 0, "chrf": 100, "rouge_l": 1, "ended": 0, "nll_per_char": 1}


def test_json_is_a_figure_where_all_right_answers_are_json():
    assert "json" in made([["x"]], [['{"a": 1}', "[]"]]).figures
    assert "json" not in made([["x"]], [['{"a": 1}', "yes"]]).figures
    assert {"exact", "ended", "nll_per_char"} <= set(made([["x"]], [["yes"]]).figures)
    with pytest.raises(UsageError, match="'bleu' is not known; known: exact, json"):
        made([["x"]], [["x"]]).by_example("bleu")


def test_differences_are_over_the_same_examples():
    # Each model is right where the base is, and on one more in ten: every resample has a gain of 0 or more.
    rng = np.random.default_rng(0)
    right = rng.uniform(size=200) < 0.5
    more = right | (np.arange(200) % 10 == 0)
    found = made([np.where(row, "a", "b") for row in (right, more)], [["a"]] * 200)
    own, other = found.bootstrap("exact", draws=2000)
    same, change = found.differences("exact", draws=2000)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert change.value == pytest.approx(other.value - own.value)
    assert 0 < change.low < change.high < own.high - own.low


def test_lift_is_the_share_of_the_trained_adapters_gain():
    rng = np.random.default_rng(1)
    order = rng.uniform(size=400)
    texts = [np.where(order < share, "a", "b") for share in (0.2, 0.5, 0.8)]
    nll = np.stack([np.full(400, 3.0), 3.0 - order, 3.0 - 2 * order])
    found = made(texts, [["a"]] * 400, nll=nll)
    job = found.lift("exact", 1, 2, draws=2000)
    gains = [found.bootstrap("exact")[place].value - found.bootstrap("exact")[0].value for place in (1, 2)]
    assert job.value == pytest.approx(gains[0] / gains[1])
    assert job.low < job.value < job.high
    # Every resample of the likelihoods gives a half; the figure is what `lift_recovered` says.
    likelihood = found.lift("nll_per_char", 1, 2, draws=2000)
    assert (likelihood.value, likelihood.low, likelihood.high) == pytest.approx((0.5, 0.5, 0.5))
    assert likelihood == lift_recovered(*found.by_example("nll_per_char"), draws=2000)


def test_lift_without_a_gain_or_without_such_a_model_is_refused():
    found = made([["a", "b"], ["a", "b"]], [["a"]] * 2)
    with pytest.raises(UsageError, match="an interval above 0"):
        found.lift("exact", 1, 1)
    for places in ((0, 1), (1, 2)):
        with pytest.raises(UsageError, match="counted from 1"):
            found.lift("exact", *places)
