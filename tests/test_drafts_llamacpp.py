"""A draft in a real llama.cpp: it accepts as many drafted tokens as `judge_draft` says."""

import json
import subprocess
import sys

import pytest
from real_models import real_model

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.session.demo import SMOLLM2, SOURCE_ADAPTER, demo_questions, shipped
from jcrosslora.text.reading import prompt_ids

pytestmark = [pytest.mark.slow, pytest.mark.real]
DRAFTED, ANSWER = 4, 24
# A process of its own, which nothing that llama.cpp does can end the tests with.
DRAFT = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = params.speculative.draft.mparams.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port, params.verbosity = 2048, 1, 0, 0, -1
params.warmup = params.fit_params = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
params.speculative.draft.n_max, params.speculative.draft.p_min = int(sys.argv[3]), 0.0
params.speculative.draft.cpuparams.n_threads = params.speculative.draft.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
settings = {"temperature": 0, "n_predict": int(sys.argv[4]), "cache_prompt": False}
found = [server.handle_completions({"prompt": ids, **settings})["timings"] for ids in json.loads(sys.argv[5])]
print(json.dumps(found), flush=True)
"""


def test_llamacpp_accepts_what_we_count(tmp_path):
    pytest.importorskip("xllamacpp")
    path = real_model(SMOLLM2.filename)
    base = jcl.open_base(path)
    with shipped(SOURCE_ADAPTER) as folder:
        adapter = jcl.load_adapter(str(folder), base)
    jcl.save_adapter(adapter, tmp_path / "own", base=base, profile="gguf")
    prompts = [question.prompt for question in demo_questions()[:8]]
    ids = [prompt_ids(load_tokenizer(base), one).tolist() for one in prompts]
    given = [str(path), str(tmp_path / "own" / "adapter.gguf"), str(DRAFTED), str(ANSWER), json.dumps(ids)]
    run = subprocess.run([sys.executable, "-c", DRAFT, *given], capture_output=True, text=True, check=True)
    theirs = json.loads(run.stdout.splitlines()[-1])
    ours = jcl.judge_draft(base, base, prompts, adapter, drafted=DRAFTED, max_new_tokens=ANSWER)
    passes = [one["predicted_n"] - one["draft_n_accepted"] for one in theirs]
    # It computes activations in 8 bits, so an answer or two go on otherwise; and it drafts from the second token on.
    assert sum(one == found for one, found in zip(passes, ours.passes()[0], strict=True)) >= 4
    assert sum(passes) == pytest.approx(ours.passes().sum(), rel=0.1)
    assert sum(passes) < 0.6 * ours.tokens
