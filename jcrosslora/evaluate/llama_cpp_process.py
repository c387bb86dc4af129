"""Run llama.cpp in a separate process, because its failed assertions end the process: JSON on stdin and stdout.

In: [base, adapter or null, token ids of each text, the token to write]. Out: for each text the log-probabilities of the
likeliest next tokens, by id. The script imports nothing of this package.
"""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

_LIKELIEST = 200


def likeliest(base: str, adapter: str | None, texts: Sequence[list[int]], written: int) -> list[dict[int, float]]:
    """Return the log-probabilities of the likeliest next tokens of each text, by id."""
    xllamacpp: Any = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = base
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 256, 1, 0, 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    found = []
    for tokens in texts:
        # The server returns none with an EOS token or part of a character, so another token is forced.
        wanted = {"prompt": tokens, "max_tokens": 1, "temperature": 0.0, "logprobs": _LIKELIEST}
        answer = server.handle_completions(wanted | {"logit_bias": [[written, 1000.0]]})
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({entry["id"]: entry["logprob"] for entry in entries})
    return found


if __name__ == "__main__":
    json.dump(likeliest(*json.load(sys.stdin)), sys.stdout)
