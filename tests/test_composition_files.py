"""A composition learns, is written, and is read again: here, by peft and torch, and as one adapter by peft."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composed_torch import torch
from test_composition import TOKENS, WEIGHTS, Case, drawn, run, run_shares

import jcrosslora as jcl
from jcrosslora.decoder import stack_adapter
from jcrosslora.errors import AdapterError, OutputError, UsageError
from jcrosslora.shelf.composition import Router, add_in_turn, loss_and_gradient, mean_divergence
from jcrosslora.text import Completion
from jcrosslora.training import Plan, TrainingSettings, encode, make_batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
TEXTS = [  # all of one width, which is one program
    [Completion("Anna and", " Peter"), Completion("Light and", " Anna")],
    [Completion("When and", " Where")],
    [],
]
SETTINGS = TrainingSettings(steps=25, batch=2, rate=0.05)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Case("llama", tmp_path_factory.mktemp("llama"))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.full
@pytest.mark.parametrize("how", ["gated", Router(rank=3)], ids=["gated", "router"])
def test_a_gate_learns_to_predict_what_the_owner_predicts(llama, how):
    composed = llama.compose(how)
    trained = composed.fit(TEXTS, SETTINGS)
    encoded, owners = [encode(composed.tokenizer, text) for texts in TEXTS for text in texts], np.array([0, 0, 1])
    losses, plan = [], Plan(encoded, SETTINGS.batch, SETTINGS.steps, SETTINGS.seed)
    for one in (composed, trained):
        arrays = {role: update.arrays for role, update in one.updates.roles.items()}
        batch = plan.batch(0)
        given = one.model, one.updates, arrays, batch
        losses.append(float(loss_and_gradient(*given, jnp.asarray(owners[batch.members], jnp.int32), False)[0]))
    assert losses[1] < 0.5 * losses[0]
    for role, one in llama.compose(how).updates.roles.items():  # the untrained one is as it was
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(composed.updates.roles[role].arrays[name], array)
        np.testing.assert_array_equal(trained.updates.roles[role].a, one.a)


def test_the_score_is_the_log_likelihood_of_the_answer(llama):
    composed = llama.compose("mixture")
    texts = [*TEXTS[0], *TEXTS[1]]
    weights = WEIGHTS[:3]
    found = composed.score(texts, weights=weights)
    for text, row, value in zip(texts, weights, found, strict=True):
        read = encode(composed.tokenizer, text)
        scores = jax.nn.log_softmax(jnp.asarray(run(composed, row[None], read.ids[None])[0]))
        wanted = sum(float(scores[place - 1, read.ids[place]]) for place in range(read.answer, len(read.ids)))
        assert abs(value - wanted) < 1e-3


def test_only_examples_of_every_adapter_train_a_gate(llama):
    with pytest.raises(UsageError, match="mixture has nothing to train"):
        llama.compose("mixture").fit(TEXTS)
    with pytest.raises(UsageError, match="examples of 2 adapters for 3"):
        llama.compose("router").fit(TEXTS[:2])
    with pytest.raises(UsageError, match="0 examples"):
        llama.compose("router").fit([[], [], []])


@pytest.mark.parametrize("how", ["gated", "router"])
def test_a_saved_composition_gives_the_same_logits_here_and_in_torch(llama, tmp_path, how):
    import composition_in_torch

    composed, _ = drawn(llama.compose(how))
    wanted = run(composed, WEIGHTS)
    composed.save(tmp_path / "out")
    again = jcl.load_composition(tmp_path / "out", llama.base, model=llama.ours)
    assert again.names == composed.names
    close(run(again, WEIGHTS), wanted)
    model = composition_in_torch.load(llama.base.path, tmp_path / "out")
    model.chosen = torch.tensor(WEIGHTS > 0).float()
    with torch.no_grad():
        close(model(torch.tensor(TOKENS)).logits.numpy(), wanted)


@pytest.mark.parametrize(("how", "rank"), [("select", 3), ("mixture", 6), ("stack", 6)])
def test_what_depends_on_weights_alone_is_an_adapter_of_peft(llama, tmp_path, how, rank):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    composed, _ = drawn(llama.compose(how))
    adapter = composed.save_adapter(tmp_path / "out", weights=WEIGHTS[1])
    assert max(factors.rank for factors in adapter.modules.values()) == rank
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.base.path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    with torch.no_grad():
        close(model(torch.tensor(TOKENS)).logits.numpy(), run(composed, WEIGHTS[[1, 1, 1, 1]]))


def test_a_rank_that_is_cut_says_what_it_loses(llama):
    composed = llama.compose("mixture")
    adapter = composed.as_adapter([1, 1, 0], out_rank=4)
    assert {factors.rank for factors in adapter.modules.values()} == {4, 3}
    assert 0 < adapter.info.lost < 0.5
    assert adapter.info.read_as.startswith("cut to ranks 3 to 4, which keeps ")
    whole = composed.as_adapter([1, 1, 0], out_rank=6)
    assert whole.info.lost < 1e-6


def test_the_rank_is_that_of_modules_as_the_base_stores_them_and_the_template_stays(tmp_path):
    case = Case("phi3", tmp_path)
    case.adapters = [
        dataclasses.replace(one, info=dataclasses.replace(one.info, chat_template="{{ messages }}"))
        for one in case.adapters
    ]
    composed = case.compose("mixture")
    composed.save_adapter(tmp_path / "out", [1, 1, 0], out_rank=4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    composed.save(tmp_path / "saved")
    for folder in (tmp_path / "out", tmp_path / "saved" / "adapters" / "0"):
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("how", ["gated", "router"])
def test_a_gate_is_no_adapter(llama, how):
    with pytest.raises(UsageError, match=f"{how} decides by token"):
        llama.compose(how).as_adapter([1, 0, 0])
    with pytest.raises(UsageError, match="the base alone"):
        llama.compose("mixture").as_adapter([0, 0, 0])


@pytest.mark.full
def test_adapters_added_in_turn_are_refitted_and_followed(llama):
    found = add_in_turn(llama.base, llama.adapters[:2], TEXTS[:2], dataclasses.replace(SETTINGS, steps=8))
    assert np.isnan(found.kl[0, 1])
    assert abs(found.kl[0, 0]) < 1e-6  # the first is the adapter itself
    plain = llama.compose("stack", llama.adapters[:2])
    given = plain.model, plain.tokenizer, plain.updates
    summed = sum(mean_divergence(*given, texts, place) for place, texts in enumerate(TEXTS[:2]))
    assert found.kl[1].sum() < 0.9 * summed
    shares = np.concatenate([np.ravel(one.arrays["share"]) for one in found.composed.updates.roles.values()])
    assert (shares != 1).mean() > 0.9
    assert [line.split()[0] for line in str(found).splitlines()] == ["KL", "+", "+"]
    with pytest.raises(UsageError, match="texts of 1 adapters for 2"):
        add_in_turn(llama.base, llama.adapters[:2], [TEXTS[0], []])


def damage(folder, **changes):
    facts = json.loads((folder / "composition.json").read_text())
    (folder / "composition.json").write_text(json.dumps(facts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition": "other"}, "composition 'other', which this version does not read"),
        ({"form": 2}, "of form 2"),
        ({"base_digest": "sha256:0"}, "was made for another base"),
        ({"settings": {"rank": 10**9}}, "states rank 1000000000, and no array"),
        ({"settings": {"rank": 3}}, "states rank 3, and no array"),
        ({"settings": {"rank": "4"}}, "does not read"),
        ({"adapters": ["one"]}, None),
        ({"adapters": []}, "does not read"),
    ],
)
def test_a_damaged_folder_is_refused(llama, tmp_path, changes, message):
    llama.compose(Router(rank=2)).save(tmp_path / "out")
    damage(tmp_path / "out", **changes)
    if message is None:
        assert len(jcl.load_composition(tmp_path / "out", llama.base, model=llama.ours).adapters) == 1
        return
    with pytest.raises(AdapterError, match=message):
        jcl.load_composition(tmp_path / "out", llama.base, model=llama.ours)


def test_a_flipped_bit_in_a_composition_is_noticed(llama, tmp_path):
    folder = llama.compose(Router(rank=2)).save(tmp_path / "out")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "composition.json"]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(AdapterError, match=rf"{path.name} is missing or was changed after writing"):
            jcl.load_composition(folder, llama.base, model=llama.ours)
        path.write_bytes(content)
    jcl.load_composition(folder, llama.base, model=llama.ours)


def test_arrays_that_are_missing_are_named(llama, tmp_path):
    llama.compose("gated").save(tmp_path / "out")
    (tmp_path / "out" / "composition.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"composition\.safetensors is missing or was changed"):
        jcl.load_composition(tmp_path / "out", llama.base, model=llama.ours)
    damage(tmp_path / "out", digests={})
    with pytest.raises(AdapterError, match=r"lacks model\.layers\.0\.mlp\.down_proj\.bias"):
        jcl.load_composition(tmp_path / "out", llama.base, model=llama.ours)
    with pytest.raises(AdapterError, match="holds no composition"):
        jcl.load_composition(tmp_path, llama.base, model=llama.ours)
    with pytest.raises(OutputError, match="exists already"):
        llama.compose("gated").save(tmp_path / "out")


@pytest.mark.full
def test_the_loss_is_zero_where_the_owner_is_alone(llama):
    composed = llama.compose("router", llama.adapters[:1])
    encoded = [encode(composed.tokenizer, one) for one in TEXTS[0]]
    batch = make_batch(encoded, np.array([0, 1]), 32, 32)
    arrays = {role: one.arrays for role, one in composed.updates.roles.items()}
    owners = jnp.zeros(2, jnp.int32)
    loss, _ = loss_and_gradient(composed.model, composed.updates, arrays, batch, owners)
    assert abs(float(loss)) < 1e-6
    alone = run_shares(composed.model, stack_adapter(llama.adapters[0], llama.base), TOKENS)
    close(run(composed, np.ones((4, 1))), alone)
