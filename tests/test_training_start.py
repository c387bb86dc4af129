"""Training that goes on from an adapter: with the numbers of peft and torch, stopped and continued, and refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from probe_bases import QUESTIONS, chat_base, write_base
from safetensors import safe_open
from test_training_run import SETTINGS, same, stop_behind
from tiny_models import torch, transformers

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.cli.main import main
from jcrosslora.training import TrainingSettings, encode
from jcrosslora.training.batches import rate_at

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.24 by a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(MODULES), "task_type": "CAUSAL_LM"}
PLAIN: dict[str, Any] = {"steps": 3, "batch": 4, "rate": 1e-2, "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("base"), 60, bos=True, layers=2))


def peft_model(base, **config):
    """A model with an adapter of random numbers, of two ranks and scales unless the configuration says otherwise."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base.ref, dtype=torch.float32)
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 1}}
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA | patterns | config)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    peft_model(base).save_pretrained(out)
    return out


def torch_steps(model, base, settings):
    """Train on the first question as `train_lora` does; returns the loss in front of each step."""
    one = encode(load_tokenizer(base), QUESTIONS[0])
    ids = torch.from_numpy(one.ids).long()[None]
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1.0, weight_decay=0), []
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = float(rate_at(settings)(step))
        logs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        loss = -sum(logs[place - 1, ids[0, place]] for place in range(one.answer, len(one.ids))) / one.answer_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_steps_and_losses_are_those_of_peft_and_torch(base, folder, monkeypatch):
    settings, seen = TrainingSettings(**PLAIN | {"batch": 1}), []
    monkeypatch.setattr("jcrosslora.training.run.record", lambda figures, _: seen.append(figures["loss"]))
    found = jcl.train_lora(base, QUESTIONS[:1], settings, start=folder)
    model = peft_model(base)
    np.testing.assert_allclose(seen, torch_steps(model, base, settings), rtol=1e-4)
    wanted, before = jcl.load_adapter(model), jcl.load_adapter(folder)
    assert found.modules.keys() == set(MODULES)
    for name, one in found.modules.items():
        update, expected, start = (
            factors.scale * np.asarray(factors.b) @ np.asarray(factors.a)
            for factors in (one, wanted.modules[name], before.modules[name])
        )
        moved = np.abs(expected - start).max()
        assert moved > 1e-3
        # Adam divides by the gradient's own size: where that is near rounding, so is the sign of the step.
        assert np.quantile(np.abs(update - expected), 0.99) < 1e-2 * moved


def test_no_step_to_speak_of_leaves_the_update_as_it_was(base, folder):
    found = jcl.train_lora(base, QUESTIONS, TrainingSettings(**PLAIN | {"rate": 1e-30}), start=folder)
    for name, one in jcl.load_adapter(folder).modules.items():
        rank = one.rank
        np.testing.assert_array_equal(found.modules[name].a[:rank], one.a)
        np.testing.assert_array_equal(found.modules[name].b[:, :rank], np.float32(one.scale) * np.asarray(one.b))
        assert not found.modules[name].b[:, rank:].any()


@pytest.mark.parametrize("optimizer", ["adamw", "lora-rite"])
def test_a_stopped_run_continues_to_the_same_numbers(base, folder, tmp_path, monkeypatch, optimizer):
    settings = TrainingSettings(**PLAIN | {"optimizer": optimizer})
    undisturbed = jcl.train_lora(base, QUESTIONS, settings, start=folder)
    with monkeypatch.context() as patch:
        stop_behind(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            jcl.train_lora(base, QUESTIONS, settings, start=folder, checkpoints=tmp_path, every=1)
    made = stop_behind(monkeypatch, 99)
    # To name its modules makes no other run of it.
    stated = dataclasses.replace(settings, modules=("v_proj", "q_proj"))
    assert same(jcl.train_lora(base, QUESTIONS, stated, start=folder, checkpoints=tmp_path), undisturbed)
    assert made == [2]
    with pytest.raises(jcl.UsageError, match=r"checkpoints of another run \(start was '[0-9a-f]{64}' there"):
        jcl.train_lora(base, QUESTIONS, settings, start=undisturbed, checkpoints=tmp_path)
    with pytest.raises(jcl.UsageError, match=r"checkpoints of another run \(rank was None there and is 8 here"):
        jcl.train_lora(base, QUESTIONS, settings, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("config", "came"),
    [
        ({"use_dora": True}, "is a DoRA, and training goes on from a plain LoRA"),
        ({"init_lora_weights": "pissa"}, "is a PiSSA, and training goes on from a plain LoRA"),
        ({"alora_invocation_tokens": [5, 7]}, "acts only after its invocation tokens"),
        ({"trainable_token_indices": [3]}, r"more than updates of linear layers.*trained tokens"),
        ({"modules_to_save": ["norm"]}, r"more than updates of linear layers.*whole tensors"),
    ],
)
def test_other_kinds_are_refused_by_name(base, tmp_path, config, came):
    peft_model(base, **config).save_pretrained(tmp_path)
    with pytest.raises(jcl.AdapterError, match=came) as caught:
        jcl.train_lora(base, QUESTIONS, TrainingSettings(**PLAIN), start=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "came"),
    [
        ({"rank": 4}, "rank 4 was asked for, and .* has 2, 4: leave --rank out"),
        ({"alpha": 16.0}, "alpha 16 was asked for, and .* has 1, 8: leave --alpha out"),
        ({"modules": ("q_proj",)}, "modules q_proj was asked for, and .* has q_proj, v_proj: leave --modules out"),
    ],
)
def test_another_size_is_refused_and_its_own_is_not(base, folder, change, came):
    with pytest.raises(jcl.UsageError, match=came):
        jcl.train_lora(base, QUESTIONS, TrainingSettings(**PLAIN | change), start=folder)
    own = TrainingSettings(**PLAIN | {"steps": 1, "modules": ("v_proj", "q_proj")})
    assert jcl.train_lora(base, QUESTIONS, own, start=folder).modules.keys() == set(MODULES)


def test_an_adapter_of_another_base_is_refused(base, folder, tmp_path):
    other = jcl.open_base(write_base(tmp_path / "other", 60, bos=True, layers=1))
    with pytest.raises(jcl.AdapterError, match="give the base it was trained on"):
        jcl.train_lora(other, QUESTIONS, TrainingSettings(**PLAIN), start=folder)
    named = jcl.train_lora(base, QUESTIONS, SETTINGS)
    jcl.save_adapter(named, tmp_path / "named", base_name="owner/small-1b")
    # An opened base of a hub id has its name.
    held = dataclasses.replace(base, name="owner/small-7b")
    with pytest.raises(jcl.AdapterError, match="names owner/small-1b as its base, and owner/small-7b is another"):
        jcl.train_lora(held, QUESTIONS, SETTINGS, start=tmp_path / "named")


def stated_training(folder):
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return json.loads(file.metadata()["jcrosslora.training"])


def test_the_command_goes_on_in_the_adapters_template_and_tells_what_it_started_from(tmp_path, capsys):
    base = chat_base(tmp_path / "base")
    data, start, out = tmp_path / "data.jsonl", tmp_path / "start", tmp_path / "out"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    common = ["train", str(base.ref), "--data", str(data), "--steps", "1", "--batch", "1"]
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>")
    assert main([*common, "--rank", "2", "--out", str(start), "--template", str(template)]) is None
    assert main([*common, "--start", str(start), "--out", str(out)]) is None
    assert (out / "chat_template.jinja").read_text() == template.read_text()
    assert {one.rank for one in jcl.load_adapter(out).modules.values()} == {2}
    made, fresh = map(stated_training, (out, start))
    digest = jcl.load_adapter(start).info.digest
    assert made["start"] == {"name": "start", "digest": digest}
    assert (fresh["rank"], fresh["alpha"]) == (2, 16.0)
    assert "start" not in fresh
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--start", str(start), "--rank", "8", "--out", str(tmp_path / "no")])
    assert stopped.value.code == 2
    assert "rank 8 was asked for, and" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
