"""Compare every family beyond the first seven, hybrids and experts too, with transformers and peft, on tiny models."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import VARIANTS, random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import HYBRIDS, TARGETS
from safetensors.numpy import load_file
from tiny_models import torch

import jcrosslora as jcl
from jcrosslora.adapter import load_adapter, save_adapter
from jcrosslora.architectures import ATTENTION, LATENT
from jcrosslora.architectures.blocks import BLOCKS, ROLES, MlpAndExperts, Parallel
from jcrosslora.checkpoint import describe_base, open_base
from jcrosslora.decoder import (
    extend_cache,
    forward,
    init_cache,
    load_model,
    logits,
    stack_adapter,
)
from jcrosslora.decoder.layout import Layout

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAMILIES = VARIANTS | HYBRIDS | EXPERT_VARIANTS
# Together they have every part that a layer may have.
QUICK = (
    *("gemma4", "gemma4-experts", "qwen3_next", "granite-experts", "lfm2", "olmo_hybrid", "nemotron_h-latent"),
    *("falcon_h1", "deepseek_v3", "deepseek_v3-direct", "cohere2_moe-routed"),
)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
# A random adapter is larger than the weights: with it, float32 in torch and here are each up to 1e-4 from float64.
ADAPTED = {"atol": 5e-4, "rtol": 5e-4}
LENGTH, PIECE = 20, 5  # tokens, beyond every window and original length; and those of one step with a cache
TOKENS = np.random.default_rng(0).integers(3, 64, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module", params=full_except(FAMILIES, QUICK))
def case(request, tmp_path_factory):
    """A model in torch, alone and with an adapter that peft made, and what is read from the same files."""
    folder = tmp_path_factory.mktemp(request.param)
    made = random_model(*FAMILIES[request.param])
    made.save_pretrained(folder / "base")
    load = partial(type(made).from_pretrained, folder / "base", dtype=torch.float32)
    model = load(attn_implementation="eager").eval()
    torch.manual_seed(1)
    targets = TARGETS.get(request.param, [*ATTENTION, *LATENT] if request.param in EXPERT_VARIANTS else "all-linear")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(load(attn_implementation="eager"), config).eval()
    adapted.save_pretrained(folder / "adapter")
    base = open_base(folder / "base")
    adapter = load_adapter(folder / "adapter", base)
    return SimpleNamespace(
        folder=folder,
        model=model,
        adapted=adapted,
        base=base,
        adapter=adapter,
        stacked=stack_adapter(adapter, base),
        ours=load_model(base),
    )


@jax.jit
def run(ours, tokens, adapter):
    output = forward(ours.with_adapter(adapter), tokens, capture=frozenset({"residual"}))
    return logits(ours, output.hidden), output.captured["residual"]


@jax.jit
def run_piece(ours, cache, tokens, positions, adapter):
    hidden, cache = extend_cache(ours.with_adapter(adapter), cache, tokens, Layout(positions))
    return logits(ours, hidden), cache


def torch_run(model):
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(TOKENS).long(), use_cache=False, output_hidden_states=True)
    return out.logits.numpy(), torch.stack(out.hidden_states).numpy()


def test_logits_and_residual_stream_match_torch_with_and_without_an_adapter_of_peft(case):
    nothing = jax.tree.map(jnp.zeros_like, case.stacked)
    (plain, stream), (wanted, hidden) = run(case.ours, TOKENS, nothing), torch_run(case.model)
    np.testing.assert_allclose(plain, wanted, **CLOSE)
    np.testing.assert_allclose(stream[:-1], hidden[:-1], **CLOSE)  # transformers ends with the final norm
    found, _ = run(case.ours, TOKENS, case.stacked)
    wanted, _ = torch_run(case.adapted)
    np.testing.assert_allclose(found, wanted, **ADAPTED)
    assert np.abs(np.asarray(found) - np.asarray(plain)).max() > 0.05


def test_decoding_with_a_cache_equals_the_whole_pass(case):
    whole, _ = run(case.ours, TOKENS, case.stacked)
    cache = init_cache(case.ours.settings, len(TOKENS), LENGTH)
    for start in range(0, LENGTH, PIECE):
        positions = jnp.broadcast_to(jnp.arange(start, start + PIECE, dtype=jnp.int32), (len(TOKENS), PIECE))
        piece = TOKENS[:, start : start + PIECE]
        found, cache = run_piece(case.ours, cache, piece, positions, case.stacked)
        np.testing.assert_allclose(found, whole[:, start : start + PIECE], **CLOSE)


def test_the_residual_stream_has_the_dtype_of_bfloat16_weights(case):
    def half(array):
        return jax.ShapeDtypeStruct(array.shape, jnp.bfloat16)

    names = ("embedding", "head", "weights", "biases")
    halves = {name: jax.tree.map(half, getattr(case.ours.params, name)) for name in names}
    ours = dataclasses.replace(case.ours, params=dataclasses.replace(case.ours.params, **halves))
    scores, stream = jax.eval_shape(run, ours, TOKENS, case.stacked)
    assert (scores.dtype, stream.dtype) == (jnp.float32, jnp.bfloat16)


def test_a_written_adapter_has_the_tensors_of_peft(case, tmp_path):
    held = [whole for whole, parts in case.base.fused.items() if len(parts) > 1]
    split = jcl.Adapter({name: f for name, f in case.adapter.modules.items() if name not in held})
    save_adapter(split, tmp_path / "out", base=describe_base(case.base, digest=""))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = load_file(case.folder / "adapter" / "adapter_model.safetensors")
    assert set(found) == {key for key in wanted if not any(whole in key for whole in held)}
    for key in (key for key in found if key.endswith("lora_A.weight")):
        other = key.replace("lora_A", "lora_B")
        np.testing.assert_allclose(found[other] @ found[key], 1.5 * wanted[other] @ wanted[key], atol=1e-5)


def test_the_quick_cases_have_every_part_of_a_layer():
    bases = [open_base(random_model(*FAMILIES[name])) for name in QUICK]
    blocks = {type(block) for base in bases for layer in base.architecture.stack for block in layer.blocks}
    assert blocks >= {*BLOCKS, MlpAndExperts, Parallel}
    roles = {role for base in bases for role in base.architecture.role_shapes}
    assert {*ROLES} - roles <= {"in_proj_qkv"}  # of the delta rule in a third form


def test_every_tensor_of_the_model_is_known(case):
    stored = set(case.base.store.names())
    optional = {name for name in stored if name.endswith(("act_fn.beta", "act_fn.eps"))}
    assert set(case.base.tensor_shapes()) == stored - optional
