"""A source behind a real server of llama.cpp: it writes and predicts what our decoder does from the same files."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_models import real_model

import jcrosslora as jcl
from jcrosslora.decoder import load_model
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.sources.served import ServedSource
from jcrosslora.distill.templates import compare
from jcrosslora.session.demo import SMOLLM2, SOURCE_ADAPTER, demo_questions, shipped
from jcrosslora.text import Completion

pytestmark = [pytest.mark.slow, pytest.mark.real]
KEY = jax.random.key(0)
# A process of its own, which nothing that llama.cpp does can end the tests with.
SERVE = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port, params.verbosity = 8192, 4, 0, 0, -1
params.warmup = params.fit_params = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.model_alias = {"smollm2"}
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    folder, path = tmp_path_factory.mktemp("llamacpp"), real_model(SMOLLM2.filename)
    base = jcl.open_base(path)
    with shipped(SOURCE_ADAPTER) as adapter:
        loaded = jcl.load_adapter(str(adapter), base)
    jcl.save_adapter(loaded, folder / "adapter", base=base, profile="gguf")
    command = [sys.executable, "-c", SERVE, str(path), str(folder / "adapter" / "adapter.gguf")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            served = jcl.ServedModel(f"{server.stdout.readline().strip()}/v1", "smollm2", path)
            yield DecoderSource.of(base, loaded, model=load_model(base, jnp.float32)), served, folder
        finally:
            server.stdin.close()
            server.wait(30)


def test_greedy_answers_are_those_of_our_decoder(sources):
    """llama.cpp multiplies with activations in 8 bits, so some answers part where two tokens are nearly as likely."""
    decoder, served, _ = sources
    source = ServedSource.open(served)
    prompts = [question.prompt for question in demo_questions()[:12]]
    for one, other, fewest in ((source, decoder, 9), (source.alone(), decoder.alone(), 5)):
        pairs = list(zip(one.write(prompts, 16, 0.0, KEY), other.write(prompts, 16, 0.0, KEY), strict=True))
        assert sum(a.text == b.text and a.ended == b.ended for a, b in pairs) >= fewest
    # The base alone never answers as the adapter does, whatever the server keeps of earlier requests.
    assert not any(a.text.startswith(' {"answer"') for a, _ in pairs)


def test_figures_are_those_of_our_decoder(sources):
    """The base holds the adapter's answers for so unlikely that their tokens are behind its likeliest 200."""
    decoder, served, _ = sources
    source = ServedSource.open(dataclasses.replace(served, top_logprobs=2000))
    texts = [Completion(question.prompt, ' {"answer": "water"}') for question in demo_questions()[:4]]
    for found, wanted in zip(compare(source, texts, 6), compare(decoder, texts, 6), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0.1)


def test_a_stopped_run_goes_on(sources):
    _, served, folder = sources
    prompts = [question.prompt for question in demo_questions()[:4]]
    wanted = ServedSource.open(served, folder / "answers").write(prompts, 8, 1.0, KEY)
    kept = {path.stat().st_mtime_ns for path in Path(folder / "answers").rglob("??/*.json")}
    assert ServedSource.open(served, folder / "answers").write(prompts, 8, 1.0, KEY) == wanted
    assert {path.stat().st_mtime_ns for path in Path(folder / "answers").rglob("??/*.json")} == kept
    shutil.rmtree(folder / "answers")
