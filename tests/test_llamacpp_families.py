"""llama.cpp runs the tiny GGUF files of the tests: its next tokens are those of our decoder, from the same files."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import random_model
from gguf_files import write_gguf
from gguf_forms import FORMS, SPARSE_FORMS, metadata_of, stored_tensors

import jcrosslora as jcl
from jcrosslora.decoder import extend_cache, forward, init_cache, load_model, logits
from jcrosslora.decoder.layout import Layout

pytestmark = pytest.mark.slow
# A process of its own, which nothing that llama.cpp does can end the tests with.
RUN = """
import json
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = int(sys.argv[3]), 1, 0, 3
params.warmup = params.fit_params = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = 0  # float32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
for tokens in json.loads(sys.argv[2]):
    request = {"prompt": tokens, "n_predict": 1, "n_probs": 64, "samplers": [], "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print("FOUND", json.dumps({one["id"]: one["logprob"] for one in found}), flush=True)
"""
PROMPTS = [[7, 3], [5, 12, 19, 26, 33, 40, 47, 54, 61, 8, 15, 22, 29, 36, 43, 50]]
# llama.cpp knows by the number of layers whether there are windows, scores groups of experts by two of each, where
# DeepSeek V2 does by one, and needs a bias of the convolution of Mamba 2 and none beside it.
NOT_RUN = {"exaone4", "deepseek_v2-groups", "nemotron_h-biases"}
# It knows by the number of layers that files state no rank of queries that are not from latents.
DIRECT = {"deepseek_v3-direct", "deepseek_v2-direct", "mistral4-growing"}
# Its activations by tables of float16, whose errors grow from layer to layer.
ROUGH = {"gemma": 3e-3, "phi": 3e-3, "starcoder2": 3e-3, "gemma4": 2e-2, "gemma4-experts": 2e-2}
# Tensors behind the activations.
BEHIND = (".ffn_down.weight", ".ffn_down_exps.weight", ".proj.weight")
LONG, PIECE = 8320, 320  # tokens of a long text, and of a piece of it
TOKENS = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(61))]
VOCABULARY = {
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.merges": ['! "'],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.mark.parametrize("name", sorted((FORMS | SPARSE_FORMS).keys() - NOT_RUN))
def test_llama_cpp_has_the_numbers_of_our_decoder(name, tmp_path):
    model, form = _model(name)
    metadata = metadata_of(model, form) | ({"attention.q_lora_rank": 0} if name in DIRECT else {})
    _compare(form, metadata, stored_tensors(model, form), tmp_path, ROUGH.get(name, 2e-5))


@pytest.mark.parametrize("name", sorted(ROUGH))
def test_llama_cpp_has_our_numbers_beside_what_its_tables_round(name, tmp_path):
    """What the activations lead to is made zero."""
    model, form = _model(name)
    stored = {
        key: (0 * array if key.endswith(BEHIND) else array, kind)
        for key, (array, kind) in stored_tensors(model, form).items()
    }
    _compare(form, metadata_of(model, form), stored, tmp_path, 1e-4)


def _model(name):
    form = (FORMS | SPARSE_FORMS)[name]
    return random_model(form.family, form.settings), form


def _compare(form, metadata, stored, tmp_path, atol):
    """Compare the next tokens of a file."""
    base, found = _answers(form, metadata, stored, tmp_path, PROMPTS)
    own = load_model(base, jnp.float32)
    for prompt, theirs in zip(PROMPTS, found, strict=True):
        last = forward(own, jnp.asarray([prompt])).hidden[:, -1]
        ours = np.asarray(jax.nn.log_softmax(logits(own, last)))[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def _answers(form, metadata, stored, tmp_path, prompts, room=128):
    """Return the base of a file, and what llama.cpp says of the tokens behind each prompt, (64,) log-probabilities."""
    pytest.importorskip("xllamacpp")
    tokens = "gpt2", TOKENS, [3, 3, 3, *[1] * 61]
    path = write_gguf(tmp_path / "model.gguf", form.arch, metadata | VOCABULARY, stored, tokens)
    command = [sys.executable, "-c", RUN, str(path), json.dumps(prompts), str(room)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == len(prompts), run.stderr[-4000:]
    return jcl.open_base(path), [[theirs[str(token)] for token in range(64)] for theirs in found]


def test_llama_cpp_has_our_chunks_and_growth_of_queries_of_llama4(tmp_path):
    """No file states them; both begin behind 8191 tokens."""
    model, form = _model("llama4")
    metadata = metadata_of(model, form) | {"context_length": LONG}
    tokens = np.random.default_rng(0).integers(3, 64, LONG).astype(np.int32)
    lengths = (8191, 8192, LONG - 60)
    prompts = [tokens[:length].tolist() for length in lengths]
    base, found = _answers(form, metadata, stored_tensors(model, form), tmp_path, prompts, LONG)
    own = load_model(base, jnp.float32)
    run = jax.jit(extend_cache)
    cache, hidden = init_cache(own.settings, 1, LONG), []
    for start in range(0, LONG, PIECE):
        places = jnp.arange(start, start + PIECE, dtype=jnp.int32)[None]
        part, cache = run(own, cache, tokens[None, start : start + PIECE], Layout(places))
        hidden.append(part[0])
    last = jnp.concatenate(hidden)[np.array(lengths) - 1]
    ours = np.asarray(jax.nn.log_softmax(logits(own, last)))
    np.testing.assert_allclose(ours, found, rtol=0, atol=1e-4)
