"""Llama 4 in the places beside the decoder's pass: gradients, padding, choice of experts, comparisons, multimodal."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import LLAMA3, random_model
from expert_models import EXPERT_VARIANTS, LLAMA4
from full_set import full_except
from gradients_of_both import gradients_of_both
from passes_of_both import run, theirs
from rewritten_base import rewritten
from safetensors.torch import load_file, save_file
from tiny_models import torch, transformers
from wrapped_models import save_wrapped, tiny_wrapped

import jcrosslora as jcl
from jcrosslora.architectures.blocks.experts import route
from jcrosslora.checkpoint import ROLE_PATHS, holder_of
from jcrosslora.decoder import load_model, settings_of, stack_adapter
from jcrosslora.errors import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
# All layers have experts, so that any of them can be left out.
SPARSE = ("llama4_text", LLAMA4 | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1], "hidden_size": 48})


def test_experts_in_fp8_are_refused_where_their_scales_are_not_read(tmp_path):
    """As fbgemm stores them: under their own names, each with a scale."""
    random_model(*EXPERT_VARIANTS["llama4"]).save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 448
        tensors[name], tensors[f"{name}_scale"] = (tensors[name] / scale).to(torch.float8_e4m3fn), scale
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fbgemm_fp8"}}))
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj' is FP8, and has no scale that"):
        jcl.open_base(tmp_path)


@pytest.mark.full
def test_gradients_through_the_scores_and_what_experts_read_are_those_of_torch(tmp_path):
    torch.manual_seed(1)
    random_model(*EXPERT_VARIANTS["llama4"]).save_pretrained(tmp_path)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False)
    config.target_parameters = PARAMETERS
    model = peft.get_peft_model(random_model(*EXPERT_VARIANTS["llama4"]), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    base = jcl.open_base(tmp_path)
    stacked = stack_adapter(jcl.load_adapter(tmp_path / "adapter", base), base)
    found, wanted = gradients_of_both(model, base, stacked, TOKENS)
    seen = set()
    for role in found.roles.keys() & ROLE_PATHS.keys():
        factors = found.roles[role]
        for layer, a, b in zip(base.layers_with(role), factors.a, factors.b, strict=True):
            for side, own in (("A", a), ("B", 1.5 * b)):  # the scale is part of our B
                name = (
                    f"base_model.model.model.layers.{layer}.{holder_of(base.family, role)}.lora_{side}.default.weight"
                )
                np.testing.assert_allclose(own, wanted[name], atol=2e-3, rtol=2e-3)
                seen.add(name)
    # peft holds the factors of the transposes: its A is our B, and its B, which has the scale, is our A.
    for role, inner in (("gate_up", ".base_layer"), ("down", "")):
        factors = found.roles[role]
        for layer, a, b in zip(base.layers_with("router"), factors.a, factors.b, strict=True):
            module = f"base_model.model.model.layers.{layer}.feed_forward.experts{inner}"
            sides = {
                "A": b.swapaxes(1, 2).reshape(-1, b.shape[1]),
                "B": 1.5 * a.transpose(2, 1, 0).reshape(a.shape[2], -1),
            }
            for side, own in sides.items():
                name = f"{module}.lora_{side}.default.weight"
                np.testing.assert_allclose(own, wanted[name], atol=2e-3, rtol=2e-3)
                seen.add(name)
    assert seen == set(wanted)


@pytest.mark.parametrize("name", full_except(["llama4", "llama4-plain"], ["llama4"]))
def test_positions_of_chunks_and_growth_count_no_padding(name, tmp_path):
    model = random_model(*EXPERT_VARIANTS[name])
    model.save_pretrained(tmp_path)
    base, left = jcl.open_base(tmp_path), 5
    padded = np.concatenate([np.zeros((2, left), np.int32), TOKENS], axis=1)
    mask = np.arange(padded.shape[1]) >= left
    found = run(base, padded, mask=np.stack([mask, mask]))[:, left:]
    np.testing.assert_allclose(found, theirs(model, TOKENS), **CLOSE)
    if name == "llama4-plain":  # the class counts padding in the growth of queries, though not in chunks
        given = torch.from_numpy(np.stack([mask, mask])).long()
        np.testing.assert_allclose(found, theirs(model, padded, attention_mask=given)[:, left:], **CLOSE)


def test_experts_are_chosen_before_their_scores_reach_one(tmp_path):
    random_model(*EXPERT_VARIANTS["llama4"]).save_pretrained(tmp_path)
    stack = settings_of(jcl.open_base(tmp_path)).stack
    own = next(layer.experts.routing for layer in stack if layer.experts is not None)
    router = jnp.asarray([[20.0], [60.0], [30.0], [90.0], [-1.0]])
    chosen, weights = route(own, jnp.ones((1, 1)), router, None, None)
    np.testing.assert_array_equal(chosen, [[3, 1]])
    np.testing.assert_array_equal(weights, [[1.0, 1.0]])


def test_rotary_frequencies_of_published_settings_are_those_of_transformers(tmp_path):
    """Scout's low and high frequencies are the same."""
    stated = {"rope_parameters": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0, "rope_theta": 5e5}}
    model = random_model("llama4_text", LLAMA4 | stated | {"head_dim": 32})
    model.save_pretrained(tmp_path)
    found = settings_of(jcl.open_base(tmp_path)).ropes
    np.testing.assert_allclose(found[0].frequencies, model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_layers_with_experts_that_cannot_be_read_are_refused(tmp_path):
    random_model(*EXPERT_VARIANTS["llama4"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_layers": ["1"]}))
    with pytest.raises(CheckpointError, match="config key 'moe_layers' is "):
        jcl.open_base(tmp_path)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A base whose layers all have experts, and an adapter of peft of attention and of experts."""
    folder = tmp_path_factory.mktemp("sparse")
    model = random_model(*SPARSE)
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False)
    config.target_parameters = PARAMETERS
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(folder / "adapter")
    base = jcl.open_base(folder / "base")
    return SimpleNamespace(
        folder=folder, base=base, adapter=jcl.load_adapter(folder / "adapter", base), wanted=theirs(adapted, TOKENS)
    )


def changed(case, out, change, layers=(0, 1, 2, 3)):
    """Write the files of a base again with these of its layers, and other tensors."""
    stated = json.loads((case.folder / "base" / "config.json").read_text())
    config = {key: [stated[key][layer] for layer in layers] for key in ("no_rope_layers", "layer_types")}
    config |= {"moe_layers": list(range(len(layers)))}
    return rewritten(case.folder / "base", out, config, layers, lambda name, x: (name, change(name, x)))


ORDER = [4, 2, 0, 1, 3]


def permuted(name, x):
    return x[ORDER] if "experts." in name or name.endswith("router.weight") else x


def trained(name, x):
    return x + 0.01 * np.random.default_rng(3).normal(size=x.shape).astype(np.float32) if "experts." in name else x


@pytest.mark.parametrize(
    ("change", "layers", "words", "method"),
    [
        (lambda _, x: x, (0, 1, 2, 3), ("same",), "copy"),
        (permuted, (0, 1, 2, 3), ("permuted",), "copy"),
        (trained, (0, 1, 2, 3), ("further trained",), "interpolated-copy"),
        (lambda _, x: x, (0, 2, 3), ("pruned",), "select"),
    ],
)
def test_relations_of_bases_are_recognised(sparse, tmp_path, change, layers, words, method):
    found = jcl.compare_bases(sparse.base, changed(sparse, tmp_path, change, layers))
    assert found.words == words, found.sentence
    assert found.choice.method == method, found.choice.reason


@pytest.mark.full
def test_an_adapter_of_experts_goes_with_its_experts_and_layers(sparse, tmp_path):
    (tmp_path / "permuted").mkdir()
    (tmp_path / "fewer").mkdir()
    other = changed(sparse, tmp_path / "permuted", permuted)
    moved = jcl.transfer(sparse.adapter, sparse.base, other, cache=False, effect="never")
    assert moved.report.recipe.method == "copy"
    np.testing.assert_allclose(run(other, TOKENS, adapter=moved.adapter), sparse.wanted, **CLOSE)
    fewer = changed(sparse, tmp_path / "fewer", lambda _, x: x, (1, 2, 3))
    moved = jcl.transfer(sparse.adapter, sparse.base, fewer, cache=False, effect="never")
    assert moved.report.recipe.method == "select"
    kept = {update.name: update for update in sparse.adapter.experts}
    assert len(moved.adapter.experts) == 6
    for update in moved.adapter.experts:
        old = kept[update.name.replace(f"layers.{update.layer}.", f"layers.{update.layer + 1}.")]
        np.testing.assert_allclose(update.b @ update.a, old.b @ old.a, **CLOSE)


def test_experts_of_the_multimodal_class_are_adapted_under_its_names(tmp_path):
    base = jcl.open_base(save_wrapped("llama4", tmp_path / "base"))
    torch.manual_seed(1)
    targets = r"language_model.*(q_proj|o_proj|shared_expert\.up_proj)"
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    config.target_parameters = PARAMETERS
    adapted = peft.get_peft_model(tiny_wrapped("llama4"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = jcl.load_adapter(tmp_path / "adapter", base)
    assert not adapter.info.ignored
    wanted = theirs(adapted.get_base_model().language_model, TOKENS)
    np.testing.assert_allclose(run(base, TOKENS, adapter=adapter), wanted, **CLOSE)
    out = jcl.save_adapter(adapter, tmp_path / "out", base=base, profile="peft")
    again = peft.PeftModel.from_pretrained(tiny_wrapped("llama4"), str(out)).eval()
    np.testing.assert_allclose(theirs(again.get_base_model().language_model, TOKENS), wanted, **CLOSE)


def test_the_class_in_memory_and_merged_files_hold_all_its_parts(tmp_path):
    base, model = jcl.open_base(save_wrapped("llama4", tmp_path / "base")), tiny_wrapped("llama4")
    live = jcl.open_base(model)
    assert live.modules.keys() == base.modules.keys()
    # A merge of what is not stored as the class has it writes these.
    widths = ("intermediate_size", "intermediate_size_mlp")
    assert [live.config[key] for key in widths] == [getattr(model.config.text_config, key) for key in widths]
    jax.tree.map(np.testing.assert_array_equal, load_model(live), load_model(base))
    rng = np.random.default_rng(2)
    adapter = jcl.Adapter(
        {
            name: jcl.LoRAFactors(
                rng.normal(size=(2, module.shape[1])).astype(np.float32),
                0.1 * rng.normal(size=(module.shape[0], 2)).astype(np.float32),
            )
            for name, module in base.modules.items()
        }
    )
    jcl.save_adapter(adapter, tmp_path / "adapter", base=base)
    jcl.merge(jcl.MergeSettings(base.ref, str(tmp_path / "adapter"), str(tmp_path / "merged")))
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(theirs(merged.language_model, TOKENS), run(base, TOKENS, adapter=adapter), **CLOSE)
    state = model.state_dict()
    assert all(torch.equal(merged.state_dict()[name], state[name]) for name in state if "vision" in name)
