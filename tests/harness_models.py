"""Parts of lm-evaluation-harness that the tests call, and its torch model of the same files as ours."""

import pytest
from tiny_bases import random_adapter
from tiny_models import save_tiny, torch, transformers
from tiny_tokenizers import KINDS, write_tokenizer

from jcrosslora.checkpoint import open_base

lm_eval = pytest.importorskip("lm_eval")
Instance = pytest.importorskip("lm_eval.api.instance").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
get_model = pytest.importorskip("lm_eval.api.registry").get_model

PROMPT = "which of these is it?\nAnswer:"


def requests(kind, arguments):
    return [Instance(kind, {}, each if isinstance(each, tuple) else (each,), 0) for each in arguments]


def torch_lm(folder, adapter=None, **settings):
    """The harness's own model, with the adapter merged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, factors in ({} if adapter is None else adapter.modules).items():
            model.get_submodule(name).weight += torch.from_numpy(factors.scale * factors.b @ factors.a)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **settings)


def written_tokens(lm, prompt, length):
    """Token ids that the torch model writes behind those of the prompt, the likeliest at each place."""
    with torch.no_grad():
        found = lm.model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


def write_tiny(folder, kind):
    save_tiny("llama", folder, vocab_size=330, max_position_embeddings=76)
    return write_tokenizer(folder, KINDS[kind]())


def adapter_of(folder):
    return random_adapter(open_base(folder), rank=2, seed=3, roles=("q_proj", "down_proj"), scale=0.05)
