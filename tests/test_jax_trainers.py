"""LoRA of tunix and google-deepmind/gemma, in and out, against the logits of tunix's own models."""

import json
import shlex
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import main
from decoder_pairs import run
from flax import nnx
from full_set import full_except
from probe_bases import write_base as write_text_base
from tiny_bases import delta, mixed_ranks, random_adapter, write_llama
from tiny_models import torch, transformers
from tunix_models import (
    ALPHA,
    BASES,
    FIXTURES,
    RANK,
    TOKENS,
    restore_lora,
    save_lora,
    tunix_logits,
    tunix_model,
    with_lora,
    write_base,
)

import jcrosslora as jcl
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.errors import AdapterError, OutputError, UsageError

STORED = ("llama", "gemma3")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
Q, K, V = (f"model.layers.0.self_attn.{role}_proj" for role in "qkv")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that tunix wrote, without its alpha."""
    return shutil.copytree(FIXTURES / "llama" / "lora", tmp_path / "run")


def factors(rank: int = 2, parts: int | None = None, seed: int = 0):
    """a (6, rank) and b (rank, [parts,] 2, 4) of a parameter of width 6 with two heads of 4."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, rank)), rng.normal(size=(rank, *([parts] if parts else []), 2, 4))


@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_of_tunix_predicts_as_tunix_does(name):
    base = jcl.open_base(FIXTURES / name / "base")
    adapter = jcl.load_adapter(FIXTURES / name / "lora", base, alpha=ALPHA)
    assert {item.rank for item in adapter.modules.values()} == {RANK}
    assert len(adapter.modules) == 14
    want = np.load(FIXTURES / name / "logits.npy")
    np.testing.assert_allclose(run(load_model(base), TOKENS, adapter=stack_adapter(adapter, base)), want, **TOLERANCE)
    assert np.abs(run(load_model(base), TOKENS) - want).max() > 0.1


@pytest.mark.filterwarnings("ignore")  # of tunix and what it imports
@pytest.mark.parametrize("name", full_except(BASES, ["llama", "qwen3", "gemma3"]))
def test_tunix_and_peft_predict_alike_in_both_directions(name, tmp_path):
    pytest.importorskip("tunix")
    base = write_base(name, tmp_path / "base")
    model = with_lora(tunix_model(name, base), seed=2)
    want = tunix_logits(model)
    opened = jcl.open_base(base)
    decoder = load_model(opened)
    for given in (save_lora(model, tmp_path / "run"), nnx_state(model)):
        adapter = jcl.load_adapter(given, opened, alpha=ALPHA)
        np.testing.assert_allclose(run(decoder, TOKENS, adapter=stack_adapter(adapter, opened)), want, **TOLERANCE)
    jcl.save_adapter(adapter, tmp_path / "peft", base=opened)
    np.testing.assert_allclose(peft_logits(base, tmp_path / "peft"), want, **TOLERANCE)

    jcl.save_adapter(adapter, tmp_path / "out", base=opened, profile="tunix")
    settings = json.loads((tmp_path / "out" / "lora_config.json").read_text())
    restored = with_lora(tunix_model(name, base), path=settings.pop("module_path"), **settings)
    restore_lora(restored, tmp_path / "out")
    np.testing.assert_allclose(tunix_logits(restored), want, **TOLERANCE)
    live = with_lora(tunix_model(name, base), rank=RANK + 2, alpha=5.0)
    jcl.to_nnx(adapter, live, alpha=5.0)
    np.testing.assert_allclose(tunix_logits(live), want, **TOLERANCE)


def nnx_state(model):
    return nnx.state(model, nnx.LoRAParam)


def peft_logits(base, adapter) -> np.ndarray:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor(TOKENS)).logits.numpy()


def test_a_tree_of_qwix_is_read_by_its_names_and_shapes():
    (a, b), (o_a, o_b) = factors(rank=2, parts=2), (np.ones((2, 4, 3)), np.arange(18.0).reshape(3, 6))
    layer = {
        "kv_einsum": {"w_lora_a": a, "w_lora_b": b},
        "attn_vec_einsum": {"w_lora_a": {"value": o_a}, "w_lora_b": {"value": o_b}},
    }
    adapter = jcl.load_adapter({"layers": {0: {"attn": layer}}}, alpha=6)
    x = np.random.default_rng(1).normal(size=(3, 6))
    both = np.einsum("td,dr,rckh->ctkh", x, a, b).reshape(2, 3, 8)
    for name, want in ((K, both[0]), (V, both[1])):
        np.testing.assert_allclose(x @ delta(adapter.modules[name]).T, 6 / 2 * want)
    heads = np.random.default_rng(2).normal(size=(3, 2, 4))
    want = np.einsum("tnh,nhr,rd->td", heads, o_a, o_b)
    output = adapter.modules["model.layers.0.self_attn.o_proj"]
    np.testing.assert_allclose(heads.reshape(3, 8) @ delta(output).T, 6 / 3 * want)


@pytest.mark.parametrize("outer", ["", "params", "transformer"])
def test_a_tree_of_google_deepmind_gemma_has_scale_1(outer):
    (a, b), (gate_a, gate_b) = factors(rank=2), (np.ones((6, 4)), np.arange(40.0).reshape(4, 2, 5))
    layer = {
        "attn": {"q_einsum": {"_LoRAEinsum_0": {"lora": {"a": a, "b": b}}}},
        "mlp": {"_LoRAEinsum_gating_einsum": {"lora": {"a": gate_a, "b": gate_b}}},
    }
    adapter = jcl.load_adapter({outer: {"layer_0": layer}} if outer else {"layer_0": layer})
    x = np.random.default_rng(1).normal(size=(3, 6))
    np.testing.assert_allclose(x @ delta(adapter.modules[Q]).T, np.einsum("td,dr,rnh->tnh", x, a, b).reshape(3, 8))
    both = np.einsum("tf,fr,rnh->nth", x, gate_a, gate_b)
    for name, want in (("gate_proj", both[0]), ("up_proj", both[1])):
        np.testing.assert_allclose(x @ delta(adapter.modules[f"model.layers.0.mlp.{name}"]).T, want)


def tree_of(parameter: str, **sizes: int):
    return {f"{parameter}_lora_{side}": array for side, array in zip("ab", factors(**sizes), strict=True)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers.0.attn.q_proj.w_lora_a": np.ones((6, 2))}, r"layers.0.attn.q_proj.w has no a .* and b"),
        (tree_of("layers.0.x.w"), r"layers.0.x.w is not known"),
        (tree_of("layers.0.mlp.gate_proj"), r"layers.0.mlp.gate_proj is not known"),
        (tree_of("layers.0.attn.kv_einsum.w", parts=3), r"\(rank, 2, out...\)"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tree, message):
    with pytest.raises(AdapterError, match=message):
        jcl.load_adapter(tree, alpha=4)


def test_alpha_and_rank_come_from_lora_config(checkpoint, tmp_path, capsys):
    with pytest.raises(AdapterError, match=r"alpha is missing.*lora_config.json"):
        jcl.load_adapter(checkpoint)
    for folder in (checkpoint, checkpoint / "7"):
        (folder / "lora_config.json").write_text('{"rank": 3, "alpha": 6.0}')
        scales = {item.scale for item in jcl.load_adapter(checkpoint).modules.values()}
        assert scales == {ALPHA / RANK}
        (folder / "lora_config.json").unlink()
    (checkpoint / "lora_config.json").write_text('{"rank": 4, "alpha": 6.0}')
    with pytest.raises(AdapterError, match=r"states rank 4, the arrays have 3"):
        jcl.load_adapter(checkpoint)
    (checkpoint / "lora_config.json").unlink()
    with pytest.raises(SystemExit):
        main(["inspect", str(checkpoint)])
    assert "--alpha" in capsys.readouterr().err
    main(["inspect", str(checkpoint), "--alpha", "6"])
    assert "format of Orbax" in capsys.readouterr().out
    given = ["export", str(checkpoint), "--base", str(FIXTURES / "llama" / "base"), "--out", str(tmp_path / "out")]
    main([*given, "--alpha", "6"])
    with pytest.raises(UsageError, match="holds its own"):
        jcl.load_adapter(tmp_path / "out", alpha=6)


@pytest.mark.parametrize("prefix", ["", "ckpt_"])
def test_the_latest_step_is_read_and_of_a_whole_model_its_lora_alone(prefix, tmp_path):
    for step in (9, 10):
        a, b = factors(seed=step)
        tree = {"layers": {"0": {"attn": {"q_proj": {"w": np.ones((6, 8)), "w_lora_a": a, "w_lora_b": b}}}}}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / f"{prefix}{step}" / "default", tree)
    latest = tmp_path / f"{prefix}10"
    for folder in (tmp_path, latest, latest / "default"):
        np.testing.assert_array_equal(jcl.load_adapter(folder, alpha=2).modules[Q].a, factors(seed=10)[0].T)
    (latest / "default" / "_METADATA").write_text("{")
    with pytest.raises(AdapterError, match="is not a readable checkpoint of Orbax"):
        jcl.load_adapter(tmp_path, alpha=2)


@pytest.mark.parametrize("name", STORED)
def test_profile_tunix_holds_the_same_update(name, tmp_path):
    base = jcl.open_base(FIXTURES / name / "base")
    adapter = mixed_ranks(base)
    jcl.save_adapter(adapter, tmp_path / "out", base=base, profile="tunix")
    found = jcl.load_adapter(tmp_path / "out", base)
    assert found.modules.keys() == adapter.modules.keys()
    for module, item in adapter.modules.items():
        np.testing.assert_allclose(delta(found.modules[module]), delta(item), atol=1e-5)
    verdicts = {one.engine: one for one in jcl.check_engines(tmp_path / "out", base=base)}
    assert verdicts["tunix"].reads
    assert "--profile portable" in verdicts["vLLM"].reasons[0]
    assert "--profile gguf" in verdicts["llama.cpp"].reasons[0]


def test_only_updated_modules_are_in_the_module_path(tmp_path):
    base = jcl.open_base(FIXTURES / "gemma3" / "base")
    adapter = random_adapter(base, roles=("q_proj", "v_proj"))
    modules = {name: item for name, item in adapter.modules.items() if name != Q}
    jcl.save_adapter(jcl.Adapter(modules), tmp_path / "out", base=base, profile="tunix")
    path = json.loads((tmp_path / "out" / "lora_config.json").read_text())["module_path"]
    assert path == "layers/(0|1)/(attn/kv_einsum)|layers/(1)/(attn/q_einsum)"


def test_profile_tunix_refuses_what_tunix_has_no_class_for(tmp_path):
    base = jcl.open_base(write_llama(tmp_path / "llama", layers=1))
    adapter = random_adapter(base)
    with pytest.raises(OutputError, match="needs the base model"):
        jcl.save_adapter(adapter, tmp_path / "out", profile="tunix")
    with pytest.raises(OutputError, match="this one is of mistral"):
        jcl.save_adapter(
            adapter, tmp_path / "out", base=replace(base, family=replace(base.family, name="mistral")), profile="tunix"
        )
    other = jcl.Adapter({"model.layers.0.self_attn.x_proj": adapter.modules[Q]})
    with pytest.raises(AdapterError, match="x_proj the first, that the base"):
        jcl.save_adapter(other, tmp_path / "out", base=base, profile="tunix")
    assert not (tmp_path / "out").exists()


def live_model(rank: int, *, modules=("q_proj",)):
    """An `nnx` module with the LoRA variables of a layer of tunix's llama, width 6, two heads of 4."""

    class Node(nnx.Module):
        pass

    def node(**parts):
        made = Node()
        for key, part in parts.items():
            setattr(made, key, part)
        return made

    def variables():
        shapes = {"w_lora_a": (6, rank), "w_lora_b": (rank, 2, 4)}
        return node(**{key: nnx.LoRAParam(jnp.zeros(shape)) for key, shape in shapes.items()})

    return node(layers=nnx.List([node(attn=node(**{name: variables() for name in modules}))]))


def test_to_nnx_sets_the_same_update_in_place():
    adapter = jcl.load_adapter(tree_of("layers.0.attn.q_proj.w"), alpha=3)
    model = live_model(rank=5)
    jcl.to_nnx(adapter, model, alpha=4)
    found = jcl.load_adapter(nnx_state(model), alpha=4)
    np.testing.assert_allclose(delta(found.modules[Q]), delta(adapter.modules[Q]), rtol=1e-5, atol=1e-6)
    assert found.modules[Q].rank == 5


def test_to_nnx_refuses_a_model_that_differs_and_leaves_it():
    adapter = jcl.load_adapter(tree_of("layers.0.attn.q_proj.w"), alpha=3)
    for model, message in (
        (live_model(rank=1), "at rank 1, the adapter has one of 8 x 6 at rank 2"),
        (live_model(rank=2, modules=("q_proj", "k_proj")), "k_proj has LoRA in the model alone"),
        (live_model(rank=2, modules=("k_proj",)), "k_proj has LoRA in the model alone"),
        (live_model(rank=2, modules=()), "has no LoRA of qwix"),
    ):
        with pytest.raises(AdapterError, match=message):
            jcl.to_nnx(adapter, model, alpha=3)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(model)))


def test_alpha_may_be_given_to_move_and_to_judge(checkpoint, tmp_path, capsys):
    base = str(FIXTURES / "llama" / "base")
    ends = [str(checkpoint), "--source", base, "--target", base, "--method", "copy", "--effect", "never"]
    with pytest.raises(SystemExit):
        main(["transfer", *ends, "--out", str(tmp_path / "none")])
    assert "--alpha" in capsys.readouterr().err
    main(["transfer", *ends, "--out", str(tmp_path / "moved"), "--alpha", "6"])
    want = jcl.load_adapter(checkpoint, alpha=6)
    for found in (
        jcl.load_adapter(tmp_path / "moved"),
        jcl.transfer(checkpoint, base, base, "copy", alpha=6, effect="never").adapter,
    ):
        np.testing.assert_allclose(delta(found.modules[Q]), delta(want.modules[Q]), rtol=1e-5, atol=1e-6)
    recipe = json.loads((tmp_path / "moved" / "transfer_report.json").read_text())["recipe_toml"]
    assert "alpha = 6.0" in recipe

    plan = f'out = "{tmp_path / "batch"}"\n[bases]\none = "{base}"\n[adapters]\none = ["{checkpoint}"]\n'
    move = '[[moves]]\nfrom = "one"\nto = ["one"]\nmethods = ["copy"]\neffect = "never"\nalpha = 6\n'
    (tmp_path / "plan.toml").write_text(plan + move)
    main(["batch", str(tmp_path / "plan.toml")])
    (moved,) = (tmp_path / "batch").glob("**/adapter_config.json")
    np.testing.assert_allclose(delta(jcl.load_adapter(moved.parent).modules[Q]), delta(want.modules[Q]), rtol=1e-5)


def test_evaluate_gives_alpha_to_checkpoints_alone(tmp_path, capsys):
    base = jcl.open_base(write_text_base(tmp_path / "base", 4))
    jcl.save_adapter(random_adapter(base), tmp_path / "peft", base=base)
    jcl.save_adapter(random_adapter(base), tmp_path / "run", base=base, profile="tunix")
    alpha = json.loads((tmp_path / "run" / "lora_config.json").read_text())["alpha"]
    (tmp_path / "run" / "lora_config.json").unlink()
    (tmp_path / "task.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 0}))
    given = ["evaluate", "--base", str(base.path), "--data", str(tmp_path / "task.jsonl"), "--alpha", str(alpha)]
    main([*given, "--json", "--adapter", str(tmp_path / "run"), "--adapter", str(tmp_path / "peft")])
    _, run_scores, peft_scores = json.loads(capsys.readouterr().out)["models"]
    assert run_scores["nll_per_char"]["value"] == pytest.approx(peft_scores["nll_per_char"]["value"])
    with pytest.raises(SystemExit):
        main([*given, "--adapter", str(tmp_path / "peft")])
    assert "no adapter is a checkpoint of a JAX trainer" in capsys.readouterr().err


def test_the_next_step_to_a_checkpoint_as_target_is_export_for_tunix(checkpoint, tmp_path, capsys):
    base, target = FIXTURES / "llama" / "base", shutil.copytree(FIXTURES / "llama" / "model", tmp_path / "target")
    shutil.copy(base / "config.json", target)
    ends = ["--source", str(base), "--target", str(target), "--alpha", "6", "--out", str(tmp_path / "moved")]
    main(["transfer", str(checkpoint), *ends, "--method", "copy", "--effect", "never"])
    lines = capsys.readouterr().out.splitlines()
    assert not any("peft" in line for line in lines)
    command = next(line for line in lines if "jcrosslora export" in line)
    main(shlex.split(command)[1:])
    want = jcl.load_adapter(tmp_path / "moved").modules[Q]
    np.testing.assert_allclose(delta(jcl.load_adapter(tmp_path / "moved-tunix").modules[Q]), delta(want), rtol=1e-5)
