"""Exports loaded by peft on a tiny model of each family: merged weights are W + dW, logits those of the decoder.

Without warnings of peft, in particular of keys that it misses.
"""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from adapter_folders import CONFIG, base_of, delta, write_folder
from adapters_of_all import adapter_of_all
from command_line import main
from dense_models import VARIANTS, random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import HYBRIDS
from probe_bases import QUESTIONS, save_tokenizer
from tiny_models import FAMILIES, tiny_model, torch

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, LoRAFactors, check_engines, load_adapter, save_adapter, split_fused
from jcrosslora.checkpoint import FAMILIES as TABLE
from jcrosslora.checkpoint import describe_base
from jcrosslora.decoder import forward, load_model, logits, stack_adapter
from jcrosslora.errors import OutputError, UsageError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft looks for the patterns of parameters among its modules; the ranks are used all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

MODELS = {name: (name, settings) for name, settings in FAMILIES.items()} | VARIANTS | HYBRIDS | EXPERT_VARIANTS
# One of each family, and those with modules that the first of their family lacks.
EVERY = [
    *{family: name for name, (family, _) in reversed(MODELS.items())}.values(),
    *("qwen3_moe-mixed", "gemma4-experts", "nemotron_h-latent"),
]
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
EPS = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-10}


def linear_modules(model) -> dict[str, tuple[int, int]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def random_adapter(shapes, ranks, scale=1.7, seed=0) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for place, (name, (rows, width)) in enumerate(shapes.items()):
        rank = ranks[place % len(ranks)]
        a, b = rng.normal(size=(rank, width)), rng.normal(size=(rows, rank))
        # Transposed views, as a transfer may leave them.
        modules[name] = LoRAFactors(a=np.ascontiguousarray(a.T).T, b=np.ascontiguousarray(b.T).T, scale=scale)
    return Adapter(modules)


def merged_by_peft(model, folder) -> dict[str, np.ndarray]:
    wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    return {name: value.numpy() for name, value in wrapped.merge_and_unload().state_dict().items()}


def assert_merged(base, merged, updates, dtype) -> None:
    for name, weight in base.items():
        if name.removesuffix(".weight") not in updates:
            np.testing.assert_array_equal(merged[name], weight)
            continue
        factors = updates[name.removesuffix(".weight")]
        size = abs(factors.scale) * np.abs(factors.b) @ np.abs(factors.a) + np.abs(weight)
        error = np.abs(merged[name] - (weight.astype(np.float64) + delta(factors)))
        assert (error <= 4 * EPS[dtype] * size).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("profile", ["portable", "peft"])
@pytest.mark.parametrize("dtype", list(EPS))
def test_peft_merges_the_written_update(tmp_path, family, profile, dtype):
    model = tiny_model(family, num_hidden_layers=2)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    shapes = linear_modules(model)
    # Every third module has no update, so that exclude_modules is needed.
    chosen = {name: shape for place, (name, shape) in enumerate(shapes.items()) if place % 3}
    adapter = random_adapter(chosen, ranks=(3, 1, 4))
    out = save_adapter(adapter, tmp_path / "o", profile=profile, dtype=dtype, base=base_of(shapes))
    assert_merged(base, merged_by_peft(model, out), adapter.modules, dtype)


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_layers_1_and_11_are_told_apart(tmp_path, profile):
    model = tiny_model("llama", num_hidden_layers=12)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    shapes = linear_modules(model)
    chosen = {name: shape for name, shape in shapes.items() if name.split(".")[2] in ("1", "11", "10")}
    del chosen["model.layers.1.self_attn.q_proj"], chosen["model.layers.11.mlp.up_proj"]
    adapter = random_adapter(chosen, ranks=(2, 5, 2, 3))
    out = save_adapter(adapter, tmp_path / "o", profile=profile, base=base_of(shapes))
    assert_merged(base, merged_by_peft(model, out), adapter.modules, "float32")


PHI3_PARTS = {
    "self_attn.qkv_proj": (("self_attn.q_proj", 0, 48), ("self_attn.k_proj", 48, 72), ("self_attn.v_proj", 72, 96)),
    "mlp.gate_up_proj": (("mlp.gate_proj", 0, 80), ("mlp.up_proj", 80, 160)),
}
PHI3_FUSED = {
    f"model.layers.{layer}.{name}": tuple((f"model.layers.{layer}.{part}", start, stop) for part, start, stop in parts)
    for layer in range(2)
    for name, parts in PHI3_PARTS.items()
}


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_updates_of_logical_modules_reach_the_rows_of_phi3(tmp_path, profile):
    model = tiny_model("phi3", num_hidden_layers=2)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    parts = {part: (holder, start, stop) for holder, rows in PHI3_FUSED.items() for part, start, stop in rows}
    del parts["model.layers.1.self_attn.k_proj"]
    adapter = random_adapter({part: (stop - start, 48) for part, (_, start, stop) in parts.items()}, ranks=(2, 3))
    every = [name for name in linear_modules(model) if name not in PHI3_FUSED] + [
        part for rows in PHI3_FUSED.values() for part, _, _ in rows
    ]
    out = save_adapter(adapter, tmp_path / "o", profile=profile, base=base_of(every, fused=PHI3_FUSED))
    merged = merged_by_peft(model, out)
    want = {name: weight.astype(np.float64) for name, weight in base.items()}
    for part, (holder, start, stop) in parts.items():
        want[f"{holder}.weight"][start:stop] += delta(adapter.modules[part])
    for name, weight in want.items():
        np.testing.assert_allclose(merged[name], weight, rtol=1e-5, atol=1e-5)


def test_a_phi3_adapter_is_split_and_written_back(tmp_path):
    model = tiny_model("phi3", num_hidden_layers=2)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv_proj", "gate_up_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    split = split_fused(adapter, PHI3_FUSED)
    assert len(split.modules) == 10
    out = save_adapter(split, tmp_path / "o", base=base_of([], fused=PHI3_FUSED))
    assert {factors.rank for factors in load_adapter(out).modules.values()} == {3}
    assert_merged(base, merged_by_peft(tiny_model("phi3", num_hidden_layers=2), out), adapter.modules, "float32")


@jax.jit
def run(ours, adapter):
    return logits(ours, forward(ours.with_adapter(adapter), TOKENS).hidden)


def run_torch(model) -> np.ndarray:
    # transformers cuts what layers that share keys read, and fails without inputs by layer; not if all is asked for.
    with torch.no_grad():
        ids = torch.from_numpy(TOKENS).long()
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).logits.numpy()


def by_peft(model, folder) -> np.ndarray:
    adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    found = run_torch(adapted)
    adapted.unload()
    return found


def judged_by_check(folder, base):
    return next(verdict for verdict in check_engines(folder, base=base) if verdict.engine == "PEFT")


def made(name, folder, **settings):
    """A model in torch, its logits, and its base."""
    model = random_model(MODELS[name][0], MODELS[name][1] | settings)
    model.save_pretrained(folder / "base")
    model.set_attn_implementation("eager")
    return model, run_torch(model), jcl.open_base(folder / "base")


def without_experts(adapter):
    """The same in form, so that it runs in the same program."""
    silent = [dataclasses.replace(update, b=0 * update.b) for update in adapter.experts]
    return jcl.Adapter(adapter.modules, experts=tuple(silent))


def test_the_table_has_every_family():
    assert {MODELS[name][0] for name in EVERY} == set(TABLE)


@pytest.mark.parametrize("name", full_except(EVERY, ["llama", "deepseek_v3", "lfm2", "gemma4-experts", "qwen3_5"]))
def test_peft_computes_what_an_adapter_of_all_modules_does(name, tmp_path):
    model, plain, base = made(name, tmp_path)
    adapter, ours = adapter_of_all(base), load_model(base)
    # On one CPU this one's delta rule was 1.24e-4 apart in float32.
    close = CLOSE | ({"atol": 2e-4} if name == "qwen3_next" else {})
    for profile, held in {"portable": without_experts(adapter), "peft": adapter}.items():
        written = adapter if profile == "peft" else jcl.Adapter(adapter.modules)
        out = jcl.save_adapter(written, tmp_path / profile, base=base, profile=profile)
        wanted = by_peft(model, out)
        np.testing.assert_allclose(run(ours, stack_adapter(held, base)), wanted, **close)
        assert np.abs(wanted - plain).max() > 0.3
        verdict = judged_by_check(out, base)
        assert verdict.reads, verdict.reasons
    again = jcl.load_adapter(out, base)
    np.testing.assert_allclose(run(ours, stack_adapter(again, base)), wanted, **close)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A base of dense layers and experts with a tokenizer, and its model in torch."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "base").mkdir()
    vocab = save_tokenizer(folder / "base", 0, bos=True)
    return made("qwen3_moe-mixed", folder, vocab_size=vocab)


@pytest.mark.full
def test_transfer_export_and_train_write_what_peft_loads(mixed, tmp_path):
    model, plain, base = mixed
    adapter, ours = adapter_of_all(base), load_model(base)
    moved = jcl.transfer(adapter, base, base, cache=False, effect="never").save(tmp_path / "moved", profile="peft")
    wanted = run(ours, stack_adapter(adapter, base))
    np.testing.assert_allclose(by_peft(model, moved), wanted, **CLOSE)
    # Without the base, in the form of the file.
    for place, given in enumerate(({"base": str(base.path)}, {})):
        out = tmp_path / f"out{place}"
        jcl.export_adapter(jcl.ExportSettings((str(moved),), str(out), **given))
        alone = run(ours, stack_adapter(without_experts(adapter), base))
        np.testing.assert_allclose(by_peft(model, out), alone, **CLOSE)
        assert judged_by_check(out, base).reads
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"prompt": one.prompt, "answer": one.choices[0]}) + "\n" for one in QUESTIONS))
    options = ("--steps", "3", "--batch", "2", "--rank", "2", "--rate", "0.1", "--out", str(tmp_path / "trained"))
    main(["train", str(base.path), "--data", str(data), *options])
    trained = jcl.load_adapter(tmp_path / "trained", base)
    assert trained.modules.keys() == base.modules.keys()
    found = by_peft(model, tmp_path / "trained")
    np.testing.assert_allclose(found, run(ours, stack_adapter(trained, base)), **CLOSE)
    assert np.abs(found - plain).max() > 0.3


def test_an_adapter_is_put_into_a_live_model_with_its_dense_modules(mixed):
    model, _, base = mixed
    adapter = adapter_of_all(base)
    live = jcl.transfer(adapter, base, base, cache=False, effect="never").to_peft(model)
    found = run_torch(live.eval())
    live.unload()
    np.testing.assert_allclose(found, run(load_model(base), stack_adapter(adapter, base)), **CLOSE)


def test_check_says_no_to_dense_modules_that_peft_takes_for_experts(mixed, tmp_path):
    model, _, base = mixed
    adapter = adapter_of_all(base, experts=False)
    out = jcl.save_adapter(adapter, tmp_path / "out", base=base)
    config = json.loads((out / "adapter_config.json").read_text())
    del config["target_parameters"]
    config["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    (out / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = by_peft(model, out)
    wanted = run(load_model(base), stack_adapter(adapter, base))
    assert np.abs(lost - wanted).max() > 0.3
    [reason] = judged_by_check(out, base).reasons
    assert "model.layers.0.mlp.down_proj (12 such modules)" in reason
    assert jcl.export_adapter(jcl.ExportSettings((str(out),), str(tmp_path / "mended"), base=str(base.path)))
    assert judged_by_check(tmp_path / "mended", base).reads
    np.testing.assert_allclose(by_peft(model, tmp_path / "mended"), wanted, **CLOSE)


def test_weights_that_peft_was_told_to_adapt_are_read_with_their_ranks_and_scales(mixed, tmp_path):
    model, _, base = mixed
    dense = "model.layers.0.mlp."
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["layers.0.mlp.gate_proj.weight", f"{dense}down_proj.weight"],
        rank_pattern={r"down_proj\.weight": 4},
        alpha_pattern={r"layers\.0\.mlp\.gate_proj\.weight": 20, "gate_proj": 7},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    wanted = run_torch(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload()
    adapter = jcl.load_adapter(tmp_path / "adapter", base)
    assert (adapter.modules[f"{dense}down_proj"].rank, adapter.modules[f"{dense}gate_proj"].scale) == (4, 10)
    np.testing.assert_allclose(run(load_model(base), stack_adapter(adapter, base)), wanted, **CLOSE)
    assert judged_by_check(tmp_path / "adapter", base).reads


def test_what_peft_does_not_know_of_parameters_is_refused(mixed, tmp_path):
    _, _, base = mixed
    adapter = adapter_of_all(base, experts=False)
    active = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation=(3, 4)))
    with pytest.raises(OutputError, match=r"'model\.layers\.0\.mlp\.down_proj' of this base \(12 in all\).*aLoRA"):
        jcl.save_adapter(active, tmp_path / "out", base=base)
    rows = {name: np.ones(module.shape[0], np.float32) for name, module in base.modules.items()}
    with pytest.raises(OutputError, match=r"for which it knows no magnitudes \(DoRA\): use another profile"):
        save_adapter(adapter, tmp_path / "out", base=describe_base(base, digest=""), profile="peft", magnitudes=rows)
    # As a file of another tool.
    out = jcl.save_adapter(adapter, tmp_path / "out", base=base)
    config = json.loads((out / "adapter_config.json").read_text())
    for change, kind in (({"use_dora": True}, "DoRA"), ({"alora_invocation_tokens": [3]}, "aLoRA")):
        (out / "adapter_config.json").write_text(json.dumps(config | change))
        assert kind in judged_by_check(out, base).reasons[0]


@pytest.mark.full
def test_a_sum_without_its_base_names_the_weights_that_its_adapters_name(tmp_path):
    """Of some families with experts peft takes the names of dense modules for those of the experts."""
    _, _, base = made("glm4_moe", tmp_path)
    for place in range(2):
        made_of = adapter_of_all(base, seed=place, experts=False)
        save_adapter(made_of, tmp_path / f"a{place}", base=describe_base(base))
    refs = tuple(str(tmp_path / f"a{place}") for place in range(2))
    named = []
    for name, given in {"with": {"base": str(base.path)}, "without": {}}.items():
        jcl.export_adapter(jcl.ExportSettings(refs, str(tmp_path / name), **given))
        named.append(json.loads((tmp_path / name / "adapter_config.json").read_text())["target_parameters"])
    assert named[0]
    assert sorted(named[0]) == sorted(named[1])


@pytest.mark.parametrize(("profile", "count"), [("portable", 1), ("mlx", 1), ("portable", 2)])
def test_an_export_keeps_the_chat_template_of_the_adapter(tmp_path, profile, count):
    name = "model.layers.0.self_attn.q_proj"
    adapter = Adapter({name: LoRAFactors(a=np.ones((2, 6), np.float32), b=np.ones((5, 2), np.float32))})
    save_adapter(adapter, tmp_path / "a", documents={"chat_template.jinja": "{{ messages[0]['content'] }}"})
    refs = (str(tmp_path / "a"),) * count
    jcl.export_adapter(jcl.ExportSettings(refs, str(tmp_path / "o"), profile=profile))
    assert load_adapter(tmp_path / "o").info.chat_template == "{{ messages[0]['content'] }}"


def test_documents_of_an_adapter_are_exported_without_paths(tmp_path):
    base = "/home/ann lee/secret/models/base"
    folder = write_folder(tmp_path / "a", CONFIG | {"base_model_name_or_path": base})
    card = f"---\nbase_model: {base}  # mine\ntags:\n- base_model:adapter:{base}\n---\n"
    text = "On [{base}](https://huggingface.co/{base}), of {data} and/or 1/2/3, see https://example.org/a/b/c.\n"
    (folder / "README.md").write_text(card + text.format(base=base, data="C:\\secret\\d\\data.jsonl"))
    report = {"adapter": {"name": base, "lost": 0.5}, "recipe_toml": f'source = "{base}"\n', "notes": ["a/b of c"]}
    (folder / "transfer_report.json").write_text(json.dumps(report))
    (folder / "completions.jsonl").write_text('{"prompt": "ls /usr/bin/env"}\n')
    jcl.export_adapter(jcl.ExportSettings((str(folder),), str(tmp_path / "o")))
    found = {path.name: path.read_bytes().decode(errors="replace") for path in (tmp_path / "o").iterdir()}
    assert not [name for name, text in found.items() if "secret" in text or "ann lee" in text]
    assert found["README.md"] == card.replace(base, "base") + text.format(base="base", data="data.jsonl")
    public = {"adapter": {"name": "base", "lost": 0.5}, "recipe_toml": 'source = "base"\n', "notes": ["a/b of c"]}
    assert json.loads(found["transfer_report.json"]) == public
    assert found["completions.jsonl"] == '{"prompt": "ls /usr/bin/env"}\n'


def test_a_revision_without_its_base_is_refused(tmp_path):
    with pytest.raises(UsageError, match="base_revision main was given without a base"):
        jcl.export_adapter(jcl.ExportSettings((str(tmp_path / "a"),), str(tmp_path / "o"), base_revision="main"))
