"""A head that the weights hold is used, whatever the configuration says of it; transformers is the oracle."""

import json

import numpy as np
import pytest
from command_line import main
from decoder_pairs import TOLERANCE, random_tokens, run, torch_logits
from tiny_bases import random_adapter
from tiny_models import tiny_model, torch, transformers

import jcrosslora as jcl
from jcrosslora import MergeSettings, compare_bases, merge
from jcrosslora.checkpoint.opening import NOTE
from jcrosslora.decoder import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose configuration ties a head that the weights hold as another matrix."""
    folder = tmp_path_factory.mktemp("own-head")
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_stored_head_is_used_as_transformers_uses_it(folder, capsys):
    base = jcl.open_base(folder)
    assert not base.tied
    assert base.notes == (NOTE,)
    tokens = random_tokens(2, 12)
    found = run(load_model(base), tokens)
    np.testing.assert_allclose(found, torch_logits(loaded(folder), tokens), **TOLERANCE)
    main(["inspect", str(folder)])
    assert f"note: {NOTE}" in capsys.readouterr().out


def test_a_head_that_repeats_the_embedding_is_tied(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    for state in (model.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}):
        base = jcl.open_base(state, config=model.config.to_dict() | {"tie_word_embeddings": True})
        assert base.tied
        assert "lm_head.weight" not in base.store.names()
        assert not base.notes


def test_a_head_in_memory_is_followed_too():
    model = tiny_model("llama", tie_word_embeddings=False)
    base = jcl.open_base(model.state_dict(), config=model.config.to_dict() | {"tie_word_embeddings": True})
    assert not base.tied
    assert np.array_equal(base.tensor("lm_head.weight"), model.lm_head.weight.detach())


def test_a_head_of_another_shape_is_refused():
    model = tiny_model("llama", tie_word_embeddings=False)
    state = dict(model.state_dict()) | {"lm_head.weight": torch.ones(90, 48)}
    with pytest.raises(jcl.CheckpointError, match=r"lm_head.weight has shape \[90, 48\], config says \[96, 48\]"):
        jcl.open_base(state, config=model.config.to_dict() | {"tie_word_embeddings": True})


def test_comparison_and_report_say_so(folder, tmp_path):
    base = jcl.open_base(folder)
    assert f"target base: {NOTE}" in compare_bases(base, base).notes
    result = jcl.transfer(random_adapter(base, rank=2), base, base, method="copy")
    assert f"source base: {NOTE}" in result.report.warnings


def test_a_merged_base_has_its_own_head_in_every_engine(folder, tmp_path):
    base = jcl.open_base(folder)
    adapter = jcl.save_adapter(random_adapter(base, rank=2, scale=0.05), tmp_path / "adapter", base=base)
    merge(MergeSettings(str(folder), str(adapter), str(tmp_path / "merged")))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    again = jcl.open_base(tmp_path / "merged")
    assert np.array_equal(again.tensor("lm_head.weight"), base.tensor("lm_head.weight"))
