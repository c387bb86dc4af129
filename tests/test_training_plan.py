"""What is trained on: files of examples, where answers begin, batches, their order; settings that are refused."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_bases import write_base

from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Question, read_task
from jcrosslora.evaluate.log_probs import tokenize
from jcrosslora.text import Completion, Message, Reading
from jcrosslora.training import Plan, TrainingSettings, encode, read_examples
from jcrosslora.training.batches import digest, rate_at


def example(length: int, answer: int, seed: int = 0) -> Reading:
    ids = np.random.default_rng([length, answer, seed]).integers(1, 1000, length).astype(np.int32)
    return Reading(ids, ids, ids, length - answer, stop=True)


EXAMPLES = st.lists(
    st.integers(2, 70).flatmap(lambda length: st.builds(example, st.just(length), st.integers(1, length - 1))),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(examples=EXAMPLES, batch=st.integers(1, 5), steps=st.integers(1, 20), seed=st.integers(0, 3))
def test_a_batch_holds_its_examples_and_scores_their_answers_alone(examples, batch, steps, seed):
    plan = Plan(examples, batch, steps, seed)
    for step in range(steps):
        found, members = plan.batch(step), [examples[index] for index in plan.members[step]]
        tokens, mask, used = np.asarray(found.tokens), np.asarray(found.mask), np.asarray(found.used).astype(bool)
        assert [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)] == [
            one.ids.tolist() for one in members
        ]
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()
        wanted = np.concatenate([one.ids[one.answer :] for one in members])
        np.testing.assert_array_equal(np.asarray(found.wanted)[used], wanted)
        np.testing.assert_array_equal(tokens.reshape(-1)[np.asarray(found.picked)[used] + 1], wanted)
        assert tokens.shape == (batch, plan.widths[step])
        assert tokens.shape[1] % 16 == len(used) % 16 == 0


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), batch=st.integers(1, 5), steps=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_example_comes_once_before_any_repeats(count, batch, steps, seed):
    plan = Plan([example(4 + index, 2) for index in range(count)], batch, steps, seed)
    times = np.bincount(plan.members.reshape(-1), minlength=count)
    # Batches of like length mix passes where a window of 16 batches reaches into the next pass, so counts are enough.
    assert times.sum() == batch * steps
    assert times.max() - times.min() <= 1


def test_shapes_stay_few_and_most_of_a_batch_is_text():
    lengths = np.random.default_rng(0).gamma(6.0, 7.0, 1200).astype(int) + 6
    plan = Plan([example(int(length), 4) for length in lengths], 8, 160, 0)
    batches = [plan.batch(step) for step in range(160)]
    assert len({(batch.tokens.shape[1], len(batch.used)) for batch in batches}) <= 6
    text = lengths[plan.members].sum()
    assert text > 0.7 * 8 * plan.widths.sum()


def test_the_seed_decides_the_order():
    examples = [example(10 + index % 7, 3, index) for index in range(50)]
    one, again, other = (Plan(examples, 4, 30, seed).members for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_a_longer_run_keeps_the_order_of_earlier_passes():
    examples = [example(10 + index % 7, 3, index) for index in range(64)]
    first = np.sort(Plan(examples, 4, 16, 5).members.reshape(-1))
    np.testing.assert_array_equal(first, np.arange(64))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(open_base(write_base(tmp_path_factory.mktemp("base"), 60, bos=True)))


def test_answers_begin_where_evaluate_scores_them(tokenizer):
    question = Question("Where does Water boil?", ("in Köln", "at 100 degrees", "Anna"), 1)
    found, scored = encode(tokenizer, question), tokenize(tokenizer, question)
    whole = np.concatenate([scored.prefix, scored.tails[1]])
    np.testing.assert_array_equal(found.ids, whole)
    assert found.answer == len(scored.prefix) + scored.scored[1]
    assert tokenizer.decode(found.ids[found.answer :]).strip() == "at 100 degrees"
    assert found.answer_tokens == len(found.ids) - found.answer > 0


def test_a_given_prompt_is_used_as_it_is(tokenizer):
    found = encode(tokenizer, Completion("Say where: Anna", " the dog"))
    assert tokenizer.decode(found.ids) == "Say where: Anna the dog"
    assert tokenizer.decode(found.ids[found.answer :]) == " the dog"


def test_digests_tell_examples_apart():
    pair = [example(9, 3), example(8, 3)]
    shifted = [dataclasses.replace(pair[0], answer=5), pair[1]]
    assert len({digest(pair), digest(pair[::-1]), digest(shifted), digest(pair[:1])}) == 4
    assert digest(pair) == digest([example(9, 3), example(8, 3)])


def test_the_end_of_an_answer_is_part_of_it(tmp_path):
    ending = load_tokenizer(open_base(write_base(tmp_path / "base", 60, eos=1)))
    whole, cut = (encode(ending, Completion("Say where: Anna", " the dog", ended)) for ended in (True, False))
    assert whole.ids.tolist() == [*cut.ids.tolist(), 1]
    assert (whole.answer, whole.answer_tokens) == (cut.answer, cut.answer_tokens + 1)
    assert encode(ending, Question("Who?", ("Anna", "Peter"), 1)).ids[-1] == 1


def test_a_conversation_is_read_in_the_chat_template(tmp_path):
    ending = load_tokenizer(open_base(write_base(tmp_path / "base", 60, eos=1)))
    found = encode(ending, Completion((Message("user", "Who is Anna?"),), "a friend"))
    assert ending.decode(found.ids[: found.answer]) == "User:\nWho is Anna?\n\nAssistant:\n"
    assert ending.decode(found.ids[found.answer :]) == "a friend"
    assert found.ids[-1] == 1


def test_all_kinds_of_files_are_read(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "prompt"], "answer": 1}\n')
    assert read_examples(path) == read_task(path)
    path.write_text('\n{"prompt": "Say é: ", "answer": "é", "id": 3}\n{"prompt": "p", "answer": "b"}', encoding="utf-8")
    assert read_examples(path) == [Completion("Say é: ", " é"), Completion("p", " b")]
    assert read_examples(str(path))[0].prompt == "Say é: "
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_examples(path)[0].prompt == "Say é: "
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": [*turns, *turns]}))
    user, assistant = Message("user", "u"), Message("assistant", "a")
    assert read_examples(path) == [Completion((user,), "a"), Completion((user, assistant, user), "a")]
    path.write_text('{"prompt": "p", "answer": "a", "references": ["b", "c"]}')
    assert read_examples(path) == [Completion("p", " a", references=("b", "c"))]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "messages is 'text'"),
        ([], r"messages is \[\]"),
        ([{"role": "user", "content": "u"}], "do not end with an answer"),
        ([{"role": "assistant", "content": "a"}], "do not end with an answer"),
        ([{"role": "tool", "content": "u"}], "a message is .*'tool'"),
        ([{"role": "user", "content": " "}], "a message is "),
        ([{"role": "user", "content": [{"type": "image"}]}], "a message is "),
        ([3], "a message is 3"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(tmp_path, messages, reason):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UsageError, match=reason):
        read_examples(path)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[" * 100_000,
        b'"prompt"',
        b'{"prompt": "p"}',
        b'{"prompt": "p", "answer": 0}',
        b'{"prompt": "p", "answer": " "}',
        b'{"prompt": "\\ud800", "answer": "a"}',
        b'{"prompt": "\xff", "answer": "a"}',
        b'{"question": "q", "choices": ["a"], "answer": 0}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "task.jsonl"
    path.write_bytes(json.dumps({"prompt": "p", "answer": "a"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(UsageError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:2: is ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "references": "b"},
            "b",
        ),
        ({"prompt": "p", "answer": "a", "references": ["b", " "]}, r"\['b', ' '\]"),
    ],
)
def test_references_that_are_no_texts_are_refused(tmp_path, line, reason):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(UsageError, match=f"task.jsonl:1: references is .*{reason}.*, expected a list of texts"):
        read_examples(path)


def test_a_file_of_no_kind_is_told_all_kinds(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"text": "a"}')
    with pytest.raises(UsageError, match=r'expected {"messages".*"prompt".*"question"'):
        read_examples(path)


def test_files_without_examples_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no question"):
        read_examples(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("change", "came"),
    [
        ({"steps": 0}, "steps 0"),
        ({"batch": 0}, "batch 0"),
        ({"rank": -1}, "rank -1"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"rate": float("nan")}, "rate nan"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"clip": -1.0}, "clip -1.0"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 32}, "seed 4294967296"),
        ({"modules": ()}, r"modules \(\)"),
        ({"modules": ("q_proj", "lm_head")}, "lm_head"),
        ({"modules": ("q_proj", "q_proj")}, "modules"),
        ({"modules": ["q_proj"]}, r"modules \['q_proj'\]"),
    ],
)
def test_settings_out_of_range_are_refused(change, came):
    TrainingSettings().check()
    with pytest.raises(UsageError, match=f"training with .*{came}.*: expected "):
        TrainingSettings(**change).check()


@pytest.mark.parametrize("change", [{"optimizer": "sgd"}, {"dtype": "float16"}])
def test_choices_that_do_not_exist_are_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(UsageError, match=f"{name} is '{value}'; expected '"):
        TrainingSettings(**change)


def test_the_rate_rises_then_falls():
    rates = np.array([rate_at(TrainingSettings(steps=100, rate=0.1))(step) for step in range(100)])
    np.testing.assert_allclose(rates[:6], [0.1 * part / 6 for part in range(1, 7)], rtol=1e-6)
    assert (np.diff(rates[5:]) < 0).all()
    np.testing.assert_allclose(rates[5 + 95 // 2], 0.05, rtol=0.03)
    assert 0 < rates[-1] < 1e-3 * 0.1
    np.testing.assert_allclose(rate_at(TrainingSettings(steps=1, rate=0.1))(0), 0.1)
