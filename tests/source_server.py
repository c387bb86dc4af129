"""A server of the OpenAI API in this process: our decoder with an adapter and without, and faults on demand."""

import json
import threading
import time
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import forward, load_model, logits, stack_adapter

MODEL, BASE = "my-lora", "base"
WIDTH = 256  # tokens of a text; longer ones are cut in front


class Server(ThreadingHTTPServer):
    """It speaks as "vllm", "sglang", "llamacpp" or "other" does.

    Attributes:
        faults: one for each of the next completion requests: a status, ("wait", status, seconds), "half", "drop",
            "hang", "bare" (no log-probabilities), a function of the answer that returns another, as JSON or text, or
            None for none.
        always: the fault of all further ones.
        pages: path -> text that is the answer in place of the list of models or adapters.
        drips: seconds between two bytes of the beginnings of headers and contents.
        padding: spaces in front of every answer.
        noise: the standard deviation by which logits are wrong, each time in another way.
        requests: the headers and bodies of all completion requests so far.
        key: the key that is wanted, or None.
    """

    daemon_threads = True

    def __init__(self, base, adapter, kind):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.faults, self.requests, self.key, self.always = kind, [], [], None, None
        self.pages, self.drips, self.padding, self.noise = {}, 0.0, 0, 0.0
        self.tokenizer, self.lock, self.sees = load_tokenizer(base), threading.Lock(), stack_adapter(adapter, base)
        ours = load_model(base)

        @jax.jit
        def run(adapter, tokens):
            return jax.nn.log_softmax(logits(ours, forward(ours.with_adapter(adapter), tokens).hidden))

        @lru_cache(maxsize=4096)
        def predict(ids, adapted):
            row = np.zeros((1, WIDTH), np.int32)
            row[0, : len(ids)] = ids
            scale = 1.0 if adapted else 0.0
            with self.lock:
                adapter = jax.tree.map(lambda x: x * jnp.float32(scale), self.sees)
                return np.asarray(run(adapter, jnp.asarray(row)))[0, : len(ids)]

        self.predict = predict

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def models(self):
        if self.kind == "llamacpp":
            return [{"id": MODEL, "aliases": [], "owned_by": "llamacpp"}]
        parent = {"parent": BASE} if self.kind == "vllm" else {}
        return [{"id": BASE, "owned_by": self.kind}, {"id": MODEL, "owned_by": self.kind, **parent}]

    def adapted(self, body):
        if self.kind == "llamacpp":
            return body.get("lora", [{"scale": 1.0}])[0]["scale"] > 0
        return body["model"] == MODEL

    def handle_error(self, *_):  # a client that went away
        pass


class Dripping:
    """A file to which the first 150 bytes of each writing are given one by one."""

    def __init__(self, file, seconds):
        self.file, self.seconds = file, seconds

    def write(self, data):
        for byte in data[:150]:
            self.file.write(bytes([byte]))
            time.sleep(self.seconds)
        self.file.write(data[150:])

    def __getattr__(self, name):
        return getattr(self.file, name)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.refused():
            return
        if self.path in self.server.pages:
            self.answer(200, self.server.pages[self.path])
        elif self.path == "/v1/models":
            self.answer(200, {"data": self.server.models()})
        elif self.path == "/lora-adapters" and self.server.kind == "llamacpp":
            self.answer(200, [{"id": 0, "path": "/somewhere/adapter.gguf", "scale": 1.0}])
        else:
            self.answer(404, {"error": {"message": "no such page"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        with self.server.lock:
            self.server.requests.append((dict(self.headers), body))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if isinstance(fault, int):
            self.answer(fault, {"error": {"message": f"fault, {self.headers.get('Authorization')}"}})
        elif isinstance(fault, tuple):
            self.answer(fault[1], {"detail": "too many"}, {"Retry-After": fault[2]})
        elif fault == "drop":
            self.close_connection = True
        elif fault == "hang":
            time.sleep(1.0)
        elif callable(fault):
            self.answer(200, fault(self.complete(body, bare=False)))
        else:
            text = json.dumps(self.complete(body, bare=fault == "bare"))
            self.answer(200, text[: len(text) // 2] if fault == "half" else text)

    def refused(self):
        if self.server.key is not None and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.answer(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
            return True
        return False

    def answer(self, status, content, headers=None):
        data = b" " * self.server.padding + (content if isinstance(content, str) else json.dumps(content)).encode()
        self.wfile = Dripping(self.wfile, self.server.drips) if self.server.drips else self.wfile
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def complete(self, body, *, bare):
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        return {"choices": [{"index": n, **self.choice(body, prompt, bare)} for n, prompt in enumerate(prompts)]}

    def choice(self, body, prompt, bare):
        tokenizer, adapted = self.server.tokenizer, self.server.adapted(body)
        rng, row, stopped = np.random.default_rng(body.get("seed")), list(prompt), False
        while len(row) < len(prompt) + body["max_tokens"]:
            found = self.server.predict(tuple(row[-WIDTH:]), adapted)[-1].astype(np.float64)
            warm = np.exp((found - found.max()) / max(body["temperature"], 1e-6))
            biased = body.get("logit_bias")
            row.append(biased[0][0] if biased else int(rng.choice(len(warm), p=warm / warm.sum())))
            if row[-1] in tokenizer.stops and not body.get("ignore_eos"):
                stopped = True
                break
        text = tokenizer.backend.decode(row[: len(row) - stopped], skip_special_tokens=True)
        choice = {"text": text[len(tokenizer.decode(prompt)) :], "finish_reason": "stop" if stopped else "length"}
        # As llama.cpp does where the first part of a character was drawn.
        bare = bare or (self.server.kind == "llamacpp" and "\ufffd" in tokenizer.decode(row[len(prompt) :]))
        if "logprobs" in body and not bare:
            echo = body.get("echo") and self.server.kind != "llamacpp"
            first = 0 if echo else len(prompt)
            choice["logprobs"] = self.log_probs(row, first, body, adapted)
        return choice

    def log_probs(self, row, first, body, adapted):
        found = self.server.predict(tuple(row), adapted)
        if self.server.noise:
            found = found + self.server.noise * np.random.default_rng().standard_normal(found.shape)
            found = found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
        rows = [None if place == 0 else found[place - 1] for place in range(first, len(row))]
        top = [None if one is None else np.argsort(-one)[: body["logprobs"]].tolist() for one in rows]
        if self.server.kind == "vllm":  # which adds the token itself to the likeliest
            top = [None if one is None else [*one, token] for one, token in zip(top, row[first:], strict=True)]
        own = [None if one is None else float(one[token]) for one, token in zip(rows, row[first:], strict=True)]
        if self.server.kind == "llamacpp":
            return {
                "content": [
                    {
                        "id": token,
                        "token": "?",
                        "logprob": value,
                        "top_logprobs": [{"id": index, "token": "?", "logprob": float(one[index])} for index in likely],
                    }
                    for token, value, one, likely in zip(row[first:], own, rows, top, strict=True)
                ]
            }

        def name(token):
            if body.get("return_tokens_as_token_ids"):
                return f"token_id:{token}"
            return self.server.tokenizer.backend.decode([token], skip_special_tokens=False)

        likely = [
            None if one is None else {name(index): float(one[index]) for index in each}
            for one, each in zip(rows, top, strict=True)
        ]
        return {"tokens": [name(token) for token in row[first:]], "token_logprobs": own, "top_logprobs": likely}


@contextmanager
def serving(base, adapter, kind="vllm"):
    server = Server(base, adapter, kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
