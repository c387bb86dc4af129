"""A dense target learns from a source with experts, and a target with experts from a dense source."""

import pytest
from dense_models import random_model
from probe_bases import CORPUS, save_tokenizer, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.fit.distill.run import distill
from jcrosslora.fit.distill.settings import DistillSettings

SMALL = DistillSettings(
    fit_rank=4,
    passes=1,
    rate=1e-2,
    completions=48,
    answer_tokens=6,
    discovery=0,
    compared_tokens=400,
    teacher_weight=0.0,
    contrast_weight=1.0,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A dense base, and one whose first layer is dense and whose others have experts and shared ones."""
    folder = tmp_path_factory.mktemp("bases")
    dense = jcl.open_base(write_base(folder / "dense", 30, bos=True, layers=2))
    vocab = save_tokenizer(folder, 60, True)
    settings = {
        "vocab_size": vocab,
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    random_model("glm4_moe", settings).save_pretrained(folder)
    return dense, jcl.open_base(folder)


@pytest.mark.parametrize("direction", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_bases_with_and_without_experts_learn_from_each_other(bases, direction):
    source, target = bases[::direction]
    adapter = random_adapter(source, roles=("q_proj", "v_proj", "o_proj"), scale=1.0)
    found = distill(source, target, adapter, prompts=CORPUS, settings=SMALL)
    assert found.looks[-1].divergence < found.looks[0].divergence
    assert set(found.adapter.modules) == set(target.modules)
