"""Moves by weights between bases with latent attention, where some modules neither read nor write the stream."""

import numpy as np
import pytest
from dense_models import random_model
from expert_models import EXPERT_VARIANTS
from tiny_bases import random_adapter
from tiny_tokenizers import byte_level, write_tokenizer

import jcrosslora as jcl


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("bases"), byte_level(bos=True)
    family, settings = EXPERT_VARIANTS["deepseek_v3"]
    bases = []
    for seed in range(2):
        model = random_model(family, settings | {"vocab_size": tokenizer.get_vocab_size()}, seed=seed)
        model.save_pretrained(folder / str(seed))
        write_tokenizer(folder / str(seed), tokenizer)
        bases.append(jcl.open_base(folder / str(seed)))
    return bases


def test_vectors_inside_the_attention_are_not_compared_by_tokens(pair):
    adapter = random_adapter(pair[0], rank=2)
    found = jcl.transfer(adapter, *pair, "cross-lora", effect="never")
    assert found.adapter.modules.keys() == adapter.modules.keys()
    ratios = {row.role: row.vector_ratio for row in found.report.rows}
    assert {role for role, ratio in ratios.items() if ratio is None} == {"q_b_proj", "kv_b_proj"}
    assert all(np.isfinite(factors.b).all() for factors in found.adapter.modules.values())
