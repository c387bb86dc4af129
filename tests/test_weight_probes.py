"""Adapters found by their weights: the encoder against brute force, its loss against torch, and a trained shelf."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import main
from probe_bases import chat_base
from shelf_adapters import NEW, TASKS, conversations
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, LoRAFactors, save_adapter
from jcrosslora.errors import UsageError
from jcrosslora.shelf import ProbeSettings, weight_probes
from jcrosslora.text import COMPLETIONS, completion_lines


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module", autouse=True)
def two_roles():
    """Encode two of the seven roles, for less to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_probes, "dense_roles", lambda base: ["q_proj", "down_proj"])
        yield


def variant(base, task: int, seed: int) -> Adapter:
    """An adapter of a task: its own directions, with noise."""
    roles = {"q_proj", "down_proj"}
    adapter, noise = (random_adapter(base, rank=2, seed=one, roles=roles) for one in (task, 50 + seed))
    return Adapter(
        {
            name: LoRAFactors(a=one.a + np.float32(0.2) * noise.modules[name].a, b=one.b, scale=0.1)
            for name, one in adapter.modules.items()
        }
    )


def test_a_probe_is_normed_behind_the_update_and_neither_gauge_nor_size_nor_padding_matter(base, monkeypatch):
    adapter, parameters = variant(base, 0, 0), weight_probes.first_parameters(base, 8, 0)
    seen = []
    real = weight_probes._normed
    monkeypatch.setattr(weight_probes, "_normed", lambda x: seen.append(real(x)) or seen[-1])
    weights = weight_probes.adapter_weights(adapter, base, 2)
    encoded = weight_probes.encode_weights(parameters, weights)
    role = list(weights).index("down_proj")
    one = adapter.modules["model.layers.1.mlp.down_proj"]
    e = np.asarray(parameters["probe.down_proj"], np.float64)[1] @ np.asarray(one.a, np.float64).T @ one.b.T
    e = (e - e.mean(axis=-1, keepdims=True)) / e.std(axis=-1, keepdims=True)
    np.testing.assert_allclose(seen[role][1], e, atol=1e-4)
    assert np.linalg.norm(encoded) == pytest.approx(1, abs=1e-5)
    mix = np.array([[2.0, 1.0], [0.5, -1.0]], np.float32)
    turned = Adapter(
        {
            name: LoRAFactors(a=np.linalg.inv(mix) @ each.a, b=30 * each.b @ mix, scale=each.scale)
            for name, each in adapter.modules.items()
        }
    )
    np.testing.assert_allclose(
        weight_probes.encode_weights(parameters, weight_probes.adapter_weights(turned, base, 5)), encoded, atol=1e-4
    )


def test_the_loss_is_the_symmetric_cross_entropy_of_torch(base):
    torch = pytest.importorskip("torch")
    parameters = weight_probes.first_parameters(base, 8, 0)
    stacks = [weight_probes.adapter_weights(variant(base, task, 0), base, 2) for task in range(3)]
    weights = {role: tuple(np.stack([one[role][side] for one in stacks]) for side in (0, 1)) for role in stacks[0]}
    texts = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    adapters = np.stack([np.asarray(jax.jit(weight_probes.encode_weights)(parameters, one)) for one in stacks])
    scores = 10 * torch.tensor(np.asarray(weight_probes.encode_texts(parameters, jnp.asarray(texts))) @ adapters.T)
    loss = torch.nn.functional.cross_entropy
    wanted = (loss(scores, torch.arange(3)) + loss(scores.T, torch.arange(3))) / 2
    found = jax.jit(weight_probes.contrastive_loss)(parameters, weights, jnp.asarray(texts))
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """Two adapters of each task with samples, and probes trained on them."""
    folder = tmp_path_factory.mktemp("shelf")
    for place, (task, texts) in enumerate(TASKS.items()):
        for seed in range(2):
            said = {COMPLETIONS: completion_lines(conversations(texts))}
            save_adapter(variant(base, place, 3 * place + seed), folder / "out" / f"{task}{seed}", documents=said)
    made = jcl.Shelf(folder / "shelf", base)
    made.add(folder / "out")
    with pytest.raises(UsageError, match="no trained weight probes"):
        made.search("x", "weights")
    losses = made.train_probes(ProbeSettings(steps=40, rate=3e-3))
    assert np.mean(losses[-5:]) < losses[0] - 0.3
    return made


def test_an_adapter_that_was_not_trained_on_and_has_no_samples_is_found_by_its_weights(
    shelf, base, tmp_path, monkeypatch
):
    for place, task in enumerate(TASKS):
        save_adapter(variant(base, place, 20 + place), tmp_path / f"{task}-new")
    shelf = jcl.Shelf(shelf.folder)
    shelf.add(tmp_path)
    found = shelf.search([texts[0] for texts in NEW.values()], "weights")
    new = [shelf.names.index(f"{task}-new") for task in TASKS]
    assert found.scores[:, new].argmax(axis=1).tolist() == [0, 1, 2]
    assert np.isneginf(shelf.search(NEW["fox"][0]).scores[0, new]).all()  # by samples nothing is known of them
    # Their vectors were kept: no weights are read.
    again = jcl.Shelf(shelf.folder)
    monkeypatch.setattr(jcl.Shelf, "load", lambda *_: pytest.fail("an adapter was loaded"))
    np.testing.assert_allclose(again.search(NEW["fox"][:1], "weights").scores[0], found.scores[1], atol=1e-2)


def test_settings_out_of_range_and_too_few_adapters_are_refused(base, tmp_path):
    with pytest.raises(UsageError, match="expected 1 step"):
        weight_probes.ProbeSettings(steps=0).check()
    with pytest.raises(UsageError, match="a rate above 0"):
        weight_probes.ProbeSettings(rate=float("nan")).check()
    save_adapter(variant(base, 0, 0), tmp_path / "one")
    shelf = jcl.Shelf(tmp_path / "shelf", base)
    shelf.add(tmp_path / "one")
    with pytest.raises(UsageError, match="0 adapters with samples"):
        shelf.train_probes()
    with pytest.raises(UsageError, match="no adapter has samples"):
        shelf.search("x")


def test_a_loss_that_is_not_finite_ends_the_training(monkeypatch):
    def lost(parameters, _weights, _texts):
        return jnp.sum(parameters["x"]) * jnp.float32(np.nan)

    monkeypatch.setattr(weight_probes, "contrastive_loss", lost)
    one = np.ones((1, 1, 1), np.float32)
    with pytest.raises(UsageError, match="loss of the weight probes is nan at step 1: lower the rate"):
        weight_probes.train_encoder(
            {"x": jnp.ones(2)}, [one[0], one[0]], lambda _: {"role": (one, one)}, ProbeSettings(steps=3)
        )


def test_the_command_trains_and_evaluates(shelf, tmp_path, capsys):
    for task, texts in NEW.items():
        (tmp_path / task).write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "others").write_text("Peter and Anna\nPlants need light")
    labels = [part for task in TASKS for part in ("--samples", f"{task}0,{task}1={tmp_path / task}")]
    folder = str(shelf.folder)
    main(["shelf", "train", folder, "--steps", "2"])
    assert "2 steps, loss" in capsys.readouterr().out
    judged = ["shelf", "evaluate", folder, *labels, "--unrelated", str(tmp_path / "others")]
    main([*judged, "--by", "tfidf", "--by", "weights", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 26
    assert found["by"].keys() == {"tfidf", "weights"}
    assert found["by"]["tfidf"]["top1"]["value"] == 1
    assert found["by"]["tfidf"]["false"]["value"] == 0
    main([*judged, "--by", "tfidf"])
    assert "1.000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["shelf", "evaluate", folder, "--samples", "fox"])
    assert "write NAME=FILE" in capsys.readouterr().err
