"""Retrieval: vectors, words and thresholds against brute force, and the whole on a tiny base."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from probe_bases import chat_base
from shelf_adapters import NEW, TASKS, write_adapter, write_tasks

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import retrieve

import jcrosslora as jcl
from jcrosslora.decoder import forward, load_model
from jcrosslora.errors import UsageError
from jcrosslora.shelf import accuracy, encoders, retrieval, searching
from jcrosslora.text import Message

UNRELATED = ["Peter and Anna", "Plants need light", "naïve readers say where"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    made = jcl.Shelf(folder / "shelf", base)
    made.add(write_tasks(folder / "out", base))
    return made


def of_samples(*counts: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(samples=("x",) * count) for count in counts]


def clusters(rng, count: int, width: int, *means: float) -> np.ndarray:
    """Vectors of adapters around means, with a covariance that is far from a multiple of the identity."""
    spread = np.diag(np.linspace(0.1, 3, width))
    return np.concatenate(
        [mean * np.eye(width)[n] + rng.normal(size=(count, width)) @ spread for n, mean in enumerate(means)]
    )


def test_scores_are_cosines_in_the_metric_of_the_shrunk_covariance():
    rng = np.random.default_rng(0)
    vectors = clusters(rng, 10, 6, 2.0, 3.0, 4.0).astype(np.float32)
    parts = [(of_samples(10, 0), vectors[:10]), (of_samples(10, 10), vectors[10:]), (of_samples(0), np.zeros((0, 0)))]
    fitted = retrieval.fit_means(lambda: parts)
    means = vectors.reshape(3, 10, 6).mean(axis=1, dtype=np.float64)
    centred = (vectors.reshape(3, 10, 6) - means[:, None]).reshape(30, 6)
    scatter, shrink = centred.T @ centred, 6 / (6 + 27)
    inverse = np.linalg.inv((1 - shrink) * scatter / 27 + shrink * np.trace(scatter) / (27 * 6) * np.eye(6))
    asked = rng.normal(size=(5, 6)).astype(np.float32)
    one, other = asked - means.mean(axis=0), means - means.mean(axis=0)
    size = np.sqrt(np.einsum("pd,de,pe->p", one, inverse, one))[:, None] * np.sqrt(
        np.einsum("nd,de,ne->n", other, inverse, other)
    )
    found = fitted.scores(asked)
    np.testing.assert_allclose(found[:, [0, 2, 3]], one @ inverse @ other.T / size, atol=1e-4)
    assert np.isneginf(found[:, [1, 4]]).all()  # of which there is no sample


def test_95_percent_of_new_prompts_of_a_task_are_accepted_though_the_samples_are_few_beside_the_width():
    rng = np.random.default_rng(1)
    width, means = 96, (3.0, 4.0, 5.0, 6.0)
    fitted = retrieval.fit_means(
        lambda: [(of_samples(*(24,) * 4), clusters(rng_of(), 24, width, *means).astype(np.float32))]
    )
    new = clusters(rng, 200, width, *means).reshape(4, 200, width)
    accepted = [(fitted.scores(part)[:, place] >= fitted.thresholds[place]).mean() for place, part in enumerate(new)]
    assert 0.85 < np.mean(accepted) <= 1


def rng_of():
    return np.random.default_rng(2)


def test_the_similarity_of_a_vector_to_the_others_is_that_without_it():
    rows = np.random.default_rng(3).normal(size=(5, 4))
    total = rows.sum(axis=0)
    found = retrieval.similarity_to_others(rows @ total, (rows**2).sum(axis=1), total @ total)
    for place, row in enumerate(rows):
        others = np.delete(rows, place, axis=0).mean(axis=0)
        assert found[place] == pytest.approx(row @ others / np.linalg.norm(row) / np.linalg.norm(others))


def test_a_threshold_leaves_out_a_twentieth_and_few_samples_take_that_of_the_shelf():
    many, few = np.linspace(0, 1, 41), np.array([0.9, 0.9])
    found = retrieval.thresholds_of([many, few, np.zeros(0)])
    assert found[0] == pytest.approx(0.05)
    np.testing.assert_allclose(found[1:], np.quantile(np.concatenate([many, few]), 0.05), rtol=1e-6)
    assert np.isinf(retrieval.thresholds_of([np.zeros(0)])).all()


def test_words_are_weighed_as_scikit_learn_weighs_them():
    texts = [["a cat sat", "A cat ran"], ["the dog ran ran"], []]
    retriever = retrieval.word_retriever([SimpleNamespace(samples=tuple(part)) for part in texts])
    # By hand: columns a, cat, sat, ran, the, dog; smooth idf over 3 samples; all vectors of length 1.
    counts = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 2, 1, 1]], float)
    idf = np.log(4 / (1 + (counts > 0).sum(axis=0))) + 1
    rows = counts * idf / np.linalg.norm(counts * idf, axis=1, keepdims=True)
    means = np.stack([rows[:2].mean(axis=0), rows[2]])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    asked = np.array([0, 1, 0, 1, 0, 0]) * idf
    found = retriever.scores(["the unknown", "Cat ran!", "nothing known"])
    np.testing.assert_allclose(found[1, :2], means @ asked / np.linalg.norm(asked), rtol=1e-6)
    assert np.isneginf(found[2]).all()
    assert np.isneginf(found[:, 2]).all()


def test_hidden_states_are_the_mean_behind_the_middle_layer_whatever_stands_beside(base):
    encoder = encoders.HiddenStates.of(base)
    texts = ["Water boils at 100 degrees.", "The fox"]
    found = encoder.encode(texts)
    ours = load_model(base, encoder.model.params.embedding.dtype)
    behind = forward(ours, encoder.tokenizer.encode(texts[0]).ids, capture=frozenset({"residual"}))
    states = np.asarray(behind.captured["residual"][base.dims.layers // 2, 0, 1:], np.float64)
    mean = (states / np.sqrt((states**2).mean(axis=1, keepdims=True))).mean(axis=0)
    np.testing.assert_allclose(found[0], mean / np.sqrt((mean**2).mean()), atol=2e-2)
    # Alone, in another shape, and as a message.
    for place, text in enumerate(texts):
        np.testing.assert_allclose(encoder.encode([text])[0], found[place], atol=1e-2)
    np.testing.assert_allclose(encoder.encode([(Message("user", texts[1]),)]), found[1:], atol=1e-2)


@pytest.mark.parametrize("by", ["text", "tfidf"])
def test_prompts_find_their_adapter_and_others_find_none(shelf, by):
    new = [(task, prompt) for task, prompts in NEW.items() for prompt in prompts]
    found = shelf.search([prompt for _, prompt in new] + UNRELATED, by)
    assert [shelf.names[place] for place in found.scores[: len(new)].argmax(axis=1)] == [task for task, _ in new]
    best = found.best()
    assert best[len(new) :] == [[]] * len(UNRELATED)
    # About one in twenty of an adapter's own prompts counts as none.
    accepted = [bool(one) for one in best[: len(new)]]
    assert np.mean(accepted) > 0.8
    weights = found.weights()
    assert weights.shape == (len(new) + len(UNRELATED), 3)
    np.testing.assert_array_equal(weights.sum(axis=1), [*accepted, *[0] * len(UNRELATED)])
    assert shelf.search(UNRELATED[0], by).scores.shape == (1, 3)


def test_a_shelf_is_searched_from_what_was_kept_and_a_change_makes_it_anew(shelf, monkeypatch):
    calls = []
    real = searching.fit_means
    monkeypatch.setattr(searching, "fit_means", lambda blocks: calls.append(0) or real(blocks))
    fresh = jcl.Shelf(shelf.folder)
    (shelf.folder / "text.safetensors").unlink(missing_ok=True)
    first = fresh.search(NEW["fox"])
    kept = jcl.Shelf(shelf.folder).search(NEW["fox"])
    assert len(calls) == 1
    np.testing.assert_array_equal(kept.scores, first.scores)
    np.testing.assert_array_equal(kept.thresholds, first.thresholds)


def test_weights_are_equal_over_the_best_accepted():
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, -np.inf]], np.float32)
    found = jcl.Retrieved(("a", "b", "c"), scores, np.array([0.5, 0.5, -np.inf], np.float32))
    # The best of those that are accepted, though another one, with a higher threshold, has a better score.
    behind = jcl.Retrieved(("a", "b"), scores[:1, :2], np.array([0.95, 0.5], np.float32))
    np.testing.assert_array_equal(behind.weights(), [[0, 1]])
    np.testing.assert_array_equal(found.weights(1), [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found.weights(2), [[0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.weights(3), [[1 / 3, 1 / 3, 1 / 3], [0, 0, 0]], rtol=1e-6)
    assert found.best(2) == [[("a", pytest.approx(0.9)), ("b", pytest.approx(0.8))], []]
    with pytest.raises(UsageError, match="0 adapters"):
        found.weights(0)


def test_accuracy_counts_tasks_of_several_adapters_and_adapters_for_unrelated_prompts():
    scores = np.array([[9, 8, 7, 6], [6, 9, 8, 7], [9, 7, 8, 6], [1, 1, 1, 9], [1, 9, 1, 1]], np.float32)
    found = jcl.Retrieved(("a", "b", "c", "d"), scores, np.array([5, 20, 5, 5], np.float32))
    judged = accuracy(found, [("a",), ("c", "d"), ("d",), (), ()])
    # Second prompt: b is best, and not accepted; c is then the best that is. Fifth: none is accepted.
    assert (judged.top1.value, judged.top3.value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert judged.answered.value == pytest.approx(2 / 3)
    assert judged.false is not None
    assert judged.false.value == 0.5
    assert accuracy(found, [("a",)] * 5).false is None
    with pytest.raises(UsageError, match="no adapter 'e'"):
        accuracy(found, [("e",)] * 5)
    with pytest.raises(UsageError, match="expected one for each, and"):
        accuracy(found, [("a",)])


def test_encoders_are_checked_by_name_and_the_extra_is_named(base, monkeypatch):
    assert encoders.check_encoder("sentences:some/model") == "sentences:some/model"
    assert encoders.check_encoder("sentences").startswith("sentences:sentence-transformers/")
    with pytest.raises(UsageError, match="did you mean 'hidden'"):
        encoders.check_encoder("hiden")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(UsageError, match=r"install jcrosslora\[sentences\]"):
        encoders.open_encoder("sentences:x/y", base)


def test_sentence_encoders_are_called_with_texts(base, monkeypatch):
    class Model:
        def __init__(self, name, trust_remote_code, model_kwargs):
            assert (name, trust_remote_code) == ("x/y", False)
            assert model_kwargs == {"use_safetensors": True, "attn_implementation": None}

        def encode(self, texts, show_progress_bar):
            return np.array([[len(text), 0.0] for text in texts])

    package = SimpleNamespace(SentenceTransformer=Model, __version__="6.2.0")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", package)
    found = encoders.open_encoder("sentences:x/y", base)(["ab", (Message("user", "abc"),)])
    np.testing.assert_allclose(found, [[np.sqrt(2), 0]] * 2, rtol=1e-6)


def test_sentence_encoders_with_code_of_their_own_are_refused(base, monkeypatch):
    def model(name, trust_remote_code, model_kwargs):
        msg = f"{name} references own.Pooling. Please pass the argument `trust_remote_code=True`"
        raise ValueError(msg)

    for version, said in (("6.2.0", "which is not run"), ("5.6.0", "5.6.0 would run the model's code")):
        package = SimpleNamespace(SentenceTransformer=model, __version__=version)
        monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", package)
        with pytest.raises(UsageError, match=said):
            encoders.open_encoder("sentences:./own", base)


def test_a_shelf_finds_its_sentence_encoder_where_both_have_moved_to(base, tmp_path, monkeypatch):
    asked = []

    def model(name, trust_remote_code, model_kwargs):
        asked.append(name)
        return SimpleNamespace(encode=lambda texts, show_progress_bar: np.ones((len(texts), 2)))

    package = SimpleNamespace(SentenceTransformer=model, __version__="6.2.0")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", package)
    (tmp_path / "here" / "encoder").mkdir(parents=True)
    adapter = write_adapter(tmp_path / "here" / "adapter", base, texts=["a b", "c d"])
    name = f"sentences:{tmp_path / 'here' / 'encoder'}"
    jcl.Shelf(tmp_path / "here" / "shelf", base, encoder=name).add([adapter])
    assert str(tmp_path) not in (tmp_path / "here" / "shelf" / "shelf.json").read_text()
    (tmp_path / "here").rename(tmp_path / "there")
    jcl.Shelf(tmp_path / "there" / "shelf", base).search(["a"])
    assert asked == [str(tmp_path / one / "encoder") for one in ("here", "there")]


def test_the_experiment_judges_every_way_on_the_same_prompts(base, tmp_path, capsys, monkeypatch):
    tasks = []
    for seed, task in enumerate(TASKS):
        write_adapter(tmp_path / task, base, seed=seed)
        for part, texts in (("train", TASKS[task]), ("test", NEW[task])):
            lines = [json.dumps({"prompt": text, "answer": "x"}) for text in texts]
            (tmp_path / f"{task}_{part}").write_text("\n".join(lines), encoding="utf-8")
        tasks += ["--task", f"{task}:{tmp_path / task}_train:{tmp_path / task}_test:{tmp_path / task}"]
    (tmp_path / "other").write_text(json.dumps({"prompt": "Peter and Anna", "answer": "x"}))
    places = [str(tmp_path / "shelf"), "--base", str(base.path), "--unrelated", str(tmp_path / "other")]
    monkeypatch.setattr("sys.argv", ["retrieve.py", *places, *tasks, "--by", "tfidf", "text"])
    retrieve.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 adapters, 24 prompts of their tasks, 1 unrelated ones"
    assert lines[3].startswith("| tfidf | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] |")
    assert lines[4].startswith("| text | ")
    assert "| 0.000 [0.000, 0.000] |" in lines[3]
