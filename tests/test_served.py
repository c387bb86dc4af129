"""A source behind a server: faults of servers, errors, keys, and answers that are kept."""

import json
import logging
import re
import time

import jax
import numpy as np
import pytest
from probe_bases import write_base
from source_server import BASE, MODEL, serving
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.distill.sources import ServedModel
from jcrosslora.distill.sources.client import Client, _stated_wait
from jcrosslora.distill.sources.served import ServedSource
from jcrosslora.errors import SourceError, UsageError

KEY = jax.random.key(0)
SECRET = "sk-this-is-a-secret"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("served") / "base", 30, bos=True, eos=1, layers=1))


@pytest.fixture(scope="module")
def servers(base):
    adapter = random_adapter(base, scale=0.3)
    with serving(base, adapter) as vllm, serving(base, adapter, "llamacpp") as llamacpp:
        yield {"vllm": vllm, "llamacpp": llamacpp}


@pytest.fixture
def server(servers):
    one = servers["vllm"]
    yield one
    one.faults, one.always, one.key, one.kind = [], None, None, "vllm"
    one.requests.clear()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited for, which pass at once."""
    found = []
    init = Client.__init__
    monkeypatch.setattr(Client, "__init__", lambda self, served: init(self, served, found.append))
    return found


def opened(server, base, answers=None, **settings):
    return ServedSource.open(ServedModel(server.url, MODEL, base.path, **{"requests": 1, **settings}), answers)


def write(source, count=2):
    return [one.text for one in source.write([f"Anna {n}" for n in range(count)], 3, 0.0, KEY)]


@pytest.mark.parametrize(
    "fault", [429, 500, 503, "half", "drop", "hang", ("wait", 429, "7"), ("wait", 503, "soon"), ("wait", 429, "0")]
)
def test_a_fault_that_passes_is_tried_again(server, base, waits, fault):
    source = opened(server, base, timeout=0.3 if fault == "hang" else 30.0)
    wanted = write(source)
    server.faults = [fault, fault, None]
    assert write(source) == wanted
    assert len(waits) == 2
    assert waits == [7.0, 7.0] if fault == ("wait", 429, "7") else 0 < waits[0] <= 0.5


def test_a_fault_that_does_not_pass_ends_the_run_soon(server, base, waits):
    source = opened(server, base, requests=4)
    server.always = 500
    with pytest.raises(SourceError, match=r"no answer in 6 attempts \(status 500: fault.*--source-requests"):
        source.write(["Anna"] * 500, 3, 0.0, KEY)
    assert len(server.requests) < 60


def test_a_date_says_how_long_to_wait():
    assert _stated_wait("3.5") == 3.5
    assert 50 < _stated_wait(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    assert _stated_wait("soon") == _stated_wait(None) == _stated_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_requests_run_side_by_side(server, base):
    """Eight answers, each of which takes a while, in much less than their sum."""
    source = opened(server, base, requests=8)
    handle, running, most = server.predict, [0], [0]

    def slow(*given):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return handle(*given)

    server.predict = slow
    try:
        write(source, 8)
    finally:
        server.predict = handle
    assert most[0] > 3


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_a_server_without_log_probabilities_is_named(servers, base, kind):
    servers[kind].always = "bare"
    try:
        with pytest.raises(SourceError, match=r"without log-probabilities.*--source with the weights"):
            opened(servers[kind], base)
    finally:
        servers[kind].always = None


def test_models_that_the_server_lacks_are_named(server, base):
    with pytest.raises(SourceError, match=r"has no model 'my-lara' \(did you mean 'my-lora'\?\): its models are base"):
        ServedSource.open(ServedModel(server.url, "my-lara", base.path))
    with pytest.raises(SourceError, match="has no model 'basis'"):
        opened(server, base, base_model="basis")
    server.kind = "other"
    with pytest.raises(SourceError, match=r"does not say which model is the base of my-lora.*--source-base-model"):
        opened(server, base)
    assert opened(server, base, base_model=BASE).name == BASE


def test_an_adapter_that_does_nothing_is_noticed(server, base, monkeypatch):
    monkeypatch.setattr(server, "adapted", lambda body: False)
    with pytest.raises(SourceError, match=r"my-lora predicts the same as base \(0 nats apart.*check that the server"):
        opened(server, base)


def permuted_tokenizer(base, folder):
    """The tokenizer of a base in which every character has the number of another."""
    made = json.loads((base.path / "tokenizer.json").read_text())
    vocab = made["model"]["vocab"]
    single = [token for token in vocab if len(token) == 1]
    numbers = [vocab[token] for token in single]
    vocab.update(zip(single, numbers[7:] + numbers[:7], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def test_a_tokenizer_of_another_model_is_noticed(server, base, tmp_path):
    server.kind = "other"
    other = permuted_tokenizer(base, tmp_path)
    with pytest.raises(SourceError, match="names other tokens than it was sent: check that --source-tokenizer"):
        ServedSource.open(ServedModel(server.url, MODEL, other, BASE))
    server.kind = "vllm"  # which names tokens by their ids
    with pytest.raises(SourceError, match=r"writes .* where its tokens are .*: check that --source-tokenizer"):
        ServedSource.open(ServedModel(server.url, MODEL, other))


def test_a_server_that_is_not_there_is_named(base, waits):
    with pytest.raises(SourceError, match=r"http://127.0.0.1:9/v1: gave no answer in 6 attempts \(.*refused"):
        ServedSource.open(ServedModel("http://127.0.0.1:9/v1", MODEL, base.path))


def test_a_key_goes_to_the_server_and_nowhere_else(server, base, waits, monkeypatch, caplog, tmp_path):
    server.key = SECRET
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.delenv("JCROSSLORA_SOURCE_KEY", raising=False)
    with pytest.raises(SourceError, match=r"refuses the request.*set JCROSSLORA_SOURCE_KEY or OPENAI") as refused:
        opened(server, base)
    assert "another" not in str(refused.value)
    monkeypatch.setenv("JCROSSLORA_SOURCE_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    source = opened(server, base, tmp_path / "answers")
    write(source)
    assert server.requests[-1][0]["Authorization"] == f"Bearer {SECRET}"
    server.always = 500
    with pytest.raises(SourceError) as failed:
        source.write(["Peter"], 3, 0.0, KEY)
    server.always = 400
    with pytest.raises(SourceError, match=r"status 400: fault, Bearer \*\*\*") as wrong:
        source.write(["Peter"], 3, 0.0, KEY)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json"))
    told = [
        str(failed.value),
        str(wrong.value),
        caplog.text,
        repr(source),
        repr(vars(source)),
        json.dumps(source.identity()),
    ]
    assert kept
    assert not any(SECRET in text for text in [*told, kept.decode()])


def test_a_redirect_is_not_followed(server, base, monkeypatch):
    """It would carry the key and the texts to another address."""
    monkeypatch.setenv("JCROSSLORA_SOURCE_KEY", SECRET)
    source = opened(server, base)
    sent = len(server.requests)
    server.always = 307
    with pytest.raises(SourceError, match="sends requests elsewhere"):
        write(source, 1)
    assert len(server.requests) == sent + 1


def test_a_stopped_run_goes_on_from_the_answers_it_has(server, base, tmp_path):
    source = opened(server, base, tmp_path / "answers")
    text = [source.tokenizer.encode("Anna and Peter").ids], [2], 3
    wanted, figures = write(source, 5), source.compare(*text)
    server.requests.clear()
    again = opened(server, base, tmp_path / "answers")
    sampled = len(server.requests)
    assert write(again, 5) == wanted
    np.testing.assert_array_equal(again.compare(*text), figures)
    assert len(server.requests) == sampled
    write(again, 6)
    assert len(server.requests) == sampled + 1
    for path in (tmp_path / "answers").rglob("??/*.json"):
        path.write_text(path.read_text()[:-3])  # as a full disk leaves it
    assert write(opened(server, base, tmp_path / "answers"), 5) == wanted


def test_answers_of_another_adapter_of_the_same_name_are_dropped(server, base, tmp_path, monkeypatch):
    source = opened(server, base, tmp_path / "answers")
    before = write(source, 3)
    monkeypatch.setattr(server, "sees", jax.tree.map(lambda x: 2 * x, server.sees))
    server_predict = server.predict
    server_predict.cache_clear()
    try:
        after = write(opened(server, base, tmp_path / "answers"), 3)
    finally:
        server_predict.cache_clear()
    assert after != before
    assert len(list((tmp_path / "answers").iterdir())) == 1


def test_long_waits_end_with_the_first_error(server, base):
    """Others that wait for another attempt give up at once."""
    source = opened(server, base, requests=4)
    server.faults = [("wait", 429, "60"), ("wait", 429, "60"), ("wait", 429, "60"), 400]
    begun = time.monotonic()
    with pytest.raises(SourceError, match="refuses the request"):
        source.write(["Anna", "Peter", "Water", "Plants"], 3, 0.0, KEY)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("host:8000/v1", "expected an address"),
        ("ftp://host/v1", "expected an address"),
        ("http://:80x/", "expected an address"),
    ]
    + [(f"https://{who}host/v1{more}", "do not belong there") for who, more in (("a:b@", ""), ("", "?key=b"))],
)
def test_addresses_are_checked(url, wrong):
    with pytest.raises(UsageError, match=wrong) as refused:
        ServedModel(url, MODEL, "tokenizer")
    assert not re.search("a:b@|key=b", str(refused.value))


def test_numbers_are_checked():
    for name in ("top_logprobs", "requests"):
        with pytest.raises(UsageError, match=f"source_{name} is 0"):
            ServedModel("http://host/v1", MODEL, "tokenizer", **{name: 0})


def test_sampling_is_the_models_own(server, base):
    write(opened(server, base))
    _, body = server.requests[-1]
    assert {body[name] for name in ("top_p", "repetition_penalty")} == {1.0}
    assert body["top_k"] == -1
    assert body["stop_token_ids"] == [1]


def test_prompts_are_sent_as_tokens(base, server):
    """Of a text the server might make others, and put a second token in front that begins it."""
    source = opened(server, base)
    write(source)
    assert server.requests[-1][1]["prompt"] == source.tokenizer.encode("Anna 1").ids.tolist()
