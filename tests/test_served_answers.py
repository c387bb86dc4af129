"""Answers of a server that are none: what is refused, what is told, what ends in time, and whose answers are kept."""

import json
import time

import jax
import numpy as np
import pytest
from full_set import full_except
from probe_bases import write_base
from source_server import MODEL, serving
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.distill.sources.client import Client
from jcrosslora.distill.sources.served import ServedSource
from jcrosslora.errors import SourceError

FIT = jcl.methods.Distill(completions=22, passes=1, fit_rank=2, answer_tokens=4, compared_tokens=300)
DEEP = "[" * 100_000 + "]" * 100_000  # the limit of newer versions of Python is above 5,000
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("answers") / "base", 30, bos=True, eos=1, layers=1))


@pytest.fixture(scope="module")
def servers(base):
    adapter = random_adapter(base, scale=0.3)
    with serving(base, adapter) as vllm, serving(base, adapter, "llamacpp") as llamacpp:
        yield {"vllm": vllm, "llamacpp": llamacpp}


@pytest.fixture
def server(servers):
    yield servers["vllm"]
    for one in servers.values():
        one.always, one.pages, one.drips, one.padding, one.noise = None, {}, 0.0, 0, 0.0


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    init = Client.__init__
    monkeypatch.setattr(Client, "__init__", lambda self, served: init(self, served, lambda seconds: None))


def move(server, base, **settings):
    """Move the adapter from the server, which fails before the fit in most of these tests."""
    served = jcl.ServedModel(server.url, MODEL, base.path, **settings)
    prompts = [f"{name} {n}" for name in ("Anna", "Peter") for n in range(11)]
    return jcl.transfer(None, served, base.path, FIT, prompts=prompts)


def opened(server, base, answers=None, **settings):
    return ServedSource.open(jcl.ServedModel(server.url, MODEL, base.path, **settings), answers)


@pytest.mark.parametrize("repeats", [True, False])
def test_an_adapter_that_was_not_loaded_is_noticed_through_noise(server, base, monkeypatch, repeats):
    """Whether the server is as wrong in the same way again or in another."""
    monkeypatch.setattr(server, "adapted", lambda body: False)
    if repeats:
        random = np.random.default_rng
        monkeypatch.setattr(np.random, "default_rng", lambda seed=7: random(seed))
    server.noise = 1e-3
    with pytest.raises(SourceError, match=r"the same as base \(\S+ nats apart, .*check that the server loaded"):
        move(server, base)


def changed(name, value, inside=None):
    """An answer in which a field of the first choice, or of one inside it, has another value."""

    def change(answer):
        (choice,) = answer["choices"]
        (choice if inside is None else choice[inside])[name] = value
        return answer

    return change


def likeliest(make):
    """An answer in which `make` made the likeliest tokens of each position of others."""

    def change(answer):
        found = answer["choices"][0].get("logprobs")
        if found is not None:
            found["top_logprobs"] = [None if one is None else make(one) for one in found["top_logprobs"]]
        return answer

    return change


FAULTS = {
    "no text": (changed("text", None), r"Expected `str`, got `null` - at `\$.choices\[0\].text`"),
    "list": (changed("logprobs", [1]), r"Expected `object \| null`, got `array` - at `\$.choices.*logprobs`"),
    "no numbers": (changed("token_logprobs", ["a"], "logprobs"), r"got `str` - at `\$.choices.*token_logprobs"),
    "one number": (changed("token_logprobs", [None], "logprobs"), r"have \[\d+, 1, \d+\] entries"),
    "certain": (likeliest(lambda one: dict.fromkeys(one, 0.0)), r"probabilities that sum to 2\d, expected 1 at most"),
    "doubled": (
        likeliest(lambda one: {name: 2 * value for name, value in one.items()}),
        r"sum to 0\.\d+ at most, expected",
    ),
    "above 1": (likeliest(lambda one: one | {next(iter(one)): 0.5}), r"Expected `float` <= 0.001"),
    "negative": (likeliest(lambda one: one | {"token_id:-5": -9.0}), r"called 'token_id:-5', expected token_id: with"),
    "enormous": (likeliest(lambda one: one | {"token_id:99999999999": -9.0}), r"has the id 99999999999, and the token"),
    "infinite": (lambda answer: json.dumps(answer).replace("null", "-1e999"), r"Number out of range"),
    "deep": (lambda answer: json.dumps(answer)[:-1] + f', "usage": {DEEP}}}', r"recursion"),
    "nothing": (lambda answer: {}, r"missing required field `choices`"),
    "none": (lambda answer: {"choices": []}, r"choices have the indices \[\], expected 0 to 0"),
    "two": (lambda answer: {"choices": 2 * answer["choices"]}, r"choices have the indices \[0, 0\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_none_are_refused_in_one_line(server, base, fault):
    server.always, wrong = FAULTS[fault]
    with pytest.raises(SourceError, match=wrong) as refused:
        move(server, base)
    assert str(refused.value).startswith(f"{server.url}: ")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("number", [-5, 1 << 40, 1 << 30, 1.5])
def test_ids_that_no_token_has_are_refused(server, servers, base, number):
    def change(answer):
        answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["id"] = number
        return answer

    servers["llamacpp"].always = change
    # A drawn token that is likely, and no longer among the likeliest, is told of by the sum.
    with pytest.raises(SourceError, match=r"has the id|Expected `int|sum to"):
        move(servers["llamacpp"], base)


@pytest.mark.parametrize("content", ["[1", "null", '{"data": 1}', '{"data": [{"id": 1}]}', DEEP, '{"data": [1]}'])
def test_lists_that_are_none_are_refused(server, servers, base, content):
    for one, path in ((server, "/v1/models"), (servers["llamacpp"], "/lora-adapters")):
        one.pages = {path: content}
        with pytest.raises(SourceError, match=r"not the one that was asked for"):
            move(one, base)


def test_errors_of_odd_forms_are_told(server, base):
    """A page of an error that is nested deeply, and a date on which no clock will be."""
    server.always = ("wait", 429, "1 Jan 99999999999999999999 00:00:00 GMT")
    with pytest.raises(SourceError, match="status 429: too many"):
        move(server, base)


@pytest.mark.full
def test_fewer_tokens_than_were_asked_for_are_told(server, base, caplog):
    """Some servers give 5 whatever they are asked for."""
    server.always = likeliest(lambda one: dict(sorted(one.items(), key=lambda pair: -pair[1])[:5]))
    found = move(server, base)
    assert "for the 20 likeliest tokens (it told 5.0 on average) at each position" in found.report.fit.note
    assert "tells the 5 likeliest tokens at most, and was asked for 20" in caplog.text
    server.always = None
    caplog.clear()
    assert "for the 20 likeliest tokens at each position" in move(server, base).report.fit.note
    assert not caplog.text


def test_a_drawn_token_bounds_no_other(server, base):
    """vLLM tells it behind the likeliest ones, however unlikely it is."""
    source = opened(server, base, top_logprobs=3)
    ids = source.tokenizer.encode("Anna and Peter").ids
    dialect = source._connection.dialect
    for top in source._connection.predict(dialect.adapted, ids, list(range(len(ids) - 1))):
        assert top.bound == np.sort(top.log_probs)[-3]


def test_answers_of_a_slightly_different_adapter_are_dropped(server, base, tmp_path, monkeypatch):
    opened(server, base, tmp_path).write(["Anna"], 3, 0.0, KEY)
    kept = list(tmp_path.rglob("??/*.json"))
    monkeypatch.setattr(server, "sees", jax.tree.map(lambda x: 1.002 * x, server.sees))
    server.predict.cache_clear()
    try:
        opened(server, base, tmp_path)
    finally:
        server.predict.cache_clear()
    assert kept
    assert not any(path.exists() for path in kept)


def test_an_adapter_that_the_server_changes_in_the_middle_is_noticed(server, base, tmp_path, monkeypatch):
    served = opened(server, base, tmp_path)
    served.check_same()
    served.write(["Anna"], 3, 0.0, KEY)
    kept = list(tmp_path.rglob("??/*.json"))
    monkeypatch.setattr(server, "sees", jax.tree.map(lambda x: 0.5 * x, server.sees))
    server.predict.cache_clear()
    try:
        with pytest.raises(SourceError, match=r"predicts otherwise than at the beginning: .* run the command again"):
            served.check_same()
    finally:
        server.predict.cache_clear()
    assert kept
    assert not any(path.exists() for path in kept)


def test_a_server_that_has_stopped_leaves_a_doubt_and_loses_no_fit(server, base, tmp_path, monkeypatch):
    served = opened(server, base, tmp_path)

    def stopped():
        msg = "does not answer"
        raise SourceError(msg)

    monkeypatch.setattr(served, "_sample", stopped)
    assert served.check_same() == (
        "it is not known whether the source stayed the same while the adapter was moved (does not answer)"
    )


def test_answers_are_kept_through_noise(server, base, tmp_path):
    server.noise = 0.01
    opened(server, base, tmp_path).write(["Anna"], 3, 0.0, KEY)
    kept = list(tmp_path.rglob("??/*.json"))
    opened(server, base, tmp_path)
    assert kept
    assert all(path.exists() for path in kept)


def test_damaged_answers_on_disk_are_asked_for_again(server, base, tmp_path):
    source = opened(server, base, tmp_path)
    ids, places = source.tokenizer.encode("Anna and Peter").ids, [2, 3]

    def ask(source):
        found = source._connection.predict(source._connection.dialect.adapted, ids, places)
        return source.write(["Anna"], 3, 0.0, KEY), [top.log_probs.tolist() for top in found]

    wanted = ask(source)
    for content in ("[]", "{}", "[1]", DEEP, '[[1,5.0,{"-5":0.0},null]]'):
        for path in tmp_path.rglob("*.json"):
            path.write_text(content)
        assert ask(opened(server, base, tmp_path)) == wanted


@pytest.mark.parametrize("first", full_except([True, False], [True]))
def test_an_answer_that_trickles_in_has_a_deadline(server, base, first):
    """Of the list of models and of a completion; each byte comes in time."""
    source = None if first else opened(server, base, timeout=0.3)
    server.drips = 0.02
    begun = time.monotonic()
    with pytest.raises(SourceError, match=r"no answer in 6 attempts \(.*(seconds|timed out)"):
        source.write(["Anna"], 3, 0.0, KEY) if source else move(server, base, timeout=0.3)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("first", [True, False])
def test_an_answer_without_end_is_given_up(server, base, first):
    source = None if first else opened(server, base)
    server.padding = 23 << 20
    with pytest.raises(SourceError, match="answers with more than 21 MB"):
        source.write(["Anna"], 3, 0.0, KEY) if source else move(server, base)


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(server, base, monkeypatch):
    monkeypatch.setenv("JCROSSLORA_SOURCE_KEY", "geheim\nschlüssel")
    with pytest.raises(jcl.JCrossLoRAError, match="holds characters that no header can hold") as refused:
        move(server, base)
    assert "geheim" not in str(refused.value)
