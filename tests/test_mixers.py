"""The mixers of hybrid models against transformers' own modules in torch, with padding and in pieces."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_set import full_except
from hybrid_models import NEMOTRON
from tiny_models import torch, transformers

from jcrosslora.architectures.blocks import DeltaRule, Mamba2, ShortConvolution
from jcrosslora.architectures.blocks.recurrent import Inside
from jcrosslora.architectures.ops import linear
from jcrosslora.checkpoint import FAMILIES, holder_of

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
B, T, WIDTH, EPS = 3, 21, 12, 1e-3
LEFT = np.arange(T) >= np.array([0, 3, 8])[:, None]
RIGHT = LEFT[:, ::-1]

CONV = ("lfm2", "Lfm2ShortConv", {"conv_L_cache": 4, "layer_types": ["conv"], "num_attention_heads": 3})
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_d_conv": 3}
GRANITE = MAMBA | {"mamba_expand": 2, "mamba_chunk_size": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
FALCON = MAMBA | {
    "mamba_d_ssm": 24,
    "mamba_chunk_size": 8,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "ssm_multipliers": [0.5, 1.5, 2.0, 0.7, 1.2],
    "mamba_conv_bias": False,
    "time_step_limit": [0.2, 0.9],
}
ALONE = NEMOTRON | {
    "use_conv_bias": False,
    "time_step_limit": [0.6, 0.8],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "layers_block_type": ["mamba"],
}
DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention"],
}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}  # a model of one kind is refused
HEADS = {"taps": 3, "heads": 6, "groups": 2, "key_size": 5, "value_size": 4}
SCALED = {"factors": tuple(FALCON["ssm_multipliers"]), "step_limits": tuple(FALCON["time_step_limit"])}
# Name -> (model_type, class, settings, ours).
CASES = {
    "convolution": (*CONV, ShortConvolution(WIDTH, 4)),
    "convolution-bias": (*CONV[:2], CONV[2] | {"conv_bias": True}, ShortConvolution(WIDTH, 4, conv_bias=True)),
    "delta": (
        *("qwen3_5_text", "Qwen3_5GatedDeltaNet", DELTA),
        DeltaRule(WIDTH, 3, heads=6, groups=2, key_size=4, value_size=6),
    ),
    "delta-separate": (
        *("olmo_hybrid", "OlmoHybridGatedDeltaNet", DELTA | {"num_attention_heads": 3, "pad_token_id": 0} | BOTH),
        DeltaRule(
            *(WIDTH, 3),
            **{"heads": 6, "groups": 2, "key_size": 4, "value_size": 6},
            form="separate",
            beta_limit=2.0,
            eps=1e-5,
        ),
    ),
    "mamba": (
        *("granitemoehybrid", "GraniteMoeHybridMambaLayer", GRANITE | {"layer_types": ["linear_attention"]}),
        Mamba2(WIDTH, **HEADS, conv_bias=True, norm="behind the gate"),
    ),
    "mamba-limit": (
        *("nemotron_h", "NemotronHMamba2Mixer", ALONE),
        Mamba2(WIDTH, **HEADS, norm="behind the gate", step_limits=(0.6, 0.8), holder="mixer"),
    ),
    "mamba-gate": ("falcon_h1", "FalconH1Mixer", FALCON, Mamba2(WIDTH, **HEADS, **SCALED)),
    "mamba-norm": (
        *("falcon_h1", "FalconH1Mixer", FALCON | {"mamba_rms_norm": True}),
        Mamba2(WIDTH, **HEADS, **SCALED, norm="before the gate"),
    ),
}


def torch_mixer(kind, name, settings):
    """Make a mixer with random parameters."""
    eps = {{"lfm2": "norm_eps", "nemotron_h": "layer_norm_epsilon"}.get(kind, "rms_norm_eps"): EPS}
    layers = {} if kind == "nemotron_h" else {"num_hidden_layers": len(settings.get("layer_types", [kind]))}
    config = transformers.AutoConfig.for_model(kind, hidden_size=WIDTH, **layers, **eps, **settings)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0]
    found = next(part for part in module.modules() if type(part).__name__ == name)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
    return found.eval()


@pytest.fixture(scope="module", params=full_except(CASES, ["convolution-bias", "delta", "mamba"]))
def case(request):
    """A mixer in torch; ours with its modules and tensors, and as a jitted function; and inputs."""
    kind, name, settings, mixer = CASES[request.param]
    module = torch_mixer(kind, name, settings)
    held = {key: value.detach().numpy() for key, value in module.named_parameters()}
    tensors = {name: held[tensor.path.split(".", 1)[1]] for name, tensor in mixer.tensors().items()}
    assert {name: tensor.shape for name, tensor in mixer.tensors().items()} == {n: x.shape for n, x in tensors.items()}
    tensors["conv"] = tensors["conv"][:, 0]
    paths = {role: holder_of(FAMILIES[kind], role).split(".", 1)[1] for role in mixer.shapes()}
    assert {role: held[f"{path}.weight"].shape for role, path in paths.items()} == mixer.shapes()

    def project(role, x):
        return linear(x, held[f"{paths[role]}.weight"]) + held.get(f"{paths[role]}.bias", np.float32(0))

    inside = Inside(project, tensors, jax.nn.silu, EPS)
    x = np.random.default_rng(1).normal(size=(B, T, WIDTH)).astype(np.float32)
    return module, (mixer, inside), jax.jit(partial(mixer.mix, inside)), x


def test_every_tensor_of_the_module_is_known(case):
    module, layer, _, _ = case
    linears = {name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    others = {name for name, _ in module.named_parameters() if name.rpartition(".")[0] not in linears}
    assert {tensor.path.split(".", 1)[1] for tensor in layer[0].tensors().values()} == others


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
def test_the_output_is_that_of_transformers(case, mask):
    module, layer, run, x = case
    if mask is LEFT and isinstance(layer[0], ShortConvolution) and layer[0].conv_bias:
        pytest.skip("transformers' padding reaches the tokens by the bias of in_proj")
    given = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        wanted = module(torch.from_numpy(x), attention_mask=given)
    valid = np.ones((B, T), bool) if mask is None else mask
    out, _ = run(x, layer[0].first_state(B), valid)
    np.testing.assert_allclose(np.asarray(out)[valid], wanted.numpy()[valid], **CLOSE)


def test_padding_changes_neither_the_output_nor_the_state(case):
    _, layer, run, x = case
    lengths = RIGHT.sum(axis=1)
    padded = np.where(RIGHT[..., None], x, 5).astype(np.float32)
    out, state = run(padded, layer[0].first_state(B), RIGHT)
    shifted = np.stack([np.roll(row, T - length, axis=0) for row, length in zip(padded, lengths, strict=True)])
    left, after = run(shifted, layer[0].first_state(B), LEFT)
    np.testing.assert_allclose(np.asarray(out)[RIGHT], np.asarray(left)[LEFT], **CLOSE)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(found, wanted, **CLOSE)


def test_pieces_of_a_text_give_what_the_whole_gives(case):
    """Each piece stands beside one of padding alone, and behind as much padding."""
    _, layer, run, x = case
    whole, last = run(x, layer[0].first_state(B), np.ones((B, T), bool))
    both = layer[0].first_state(2 * B)
    for start in range(0, T, 7):
        piece = x[:, start : start + 7]
        padded = np.concatenate([np.full_like(piece, 3), piece]).repeat(2, axis=1)
        valid = np.zeros((2 * B, 14), bool)
        valid[B:, 7:] = True
        padded[B:, 7:] = piece
        out, both = run(padded, both, valid)
        np.testing.assert_allclose(out[B:, 7:], whole[:, start : start + 7], **CLOSE)
    assert not any(np.asarray(leaf[:B]).any() for leaf in jax.tree.leaves(both))
    state = jax.tree.map(lambda leaf: leaf[B:], both)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(found, wanted, **CLOSE)


def test_the_gradient_by_the_input_is_that_of_torch(case):
    module, layer, _, x = case
    given = torch.from_numpy(x).requires_grad_()
    (module(given) ** 2).sum().backward()
    state, valid = layer[0].first_state(B), np.ones((B, T), bool)
    found = jax.jit(jax.grad(lambda x: jnp.sum(layer[0].mix(layer[1], x, state, valid)[0] ** 2)))(x)
    wanted = given.grad.numpy()
    np.testing.assert_allclose(found / np.abs(wanted).max(), wanted / np.abs(wanted).max(), atol=5e-5)


def test_a_batch_of_inputs_runs_under_vmap(case):
    _, layer, run, x = case
    state, valid = layer[0].first_state(B), np.ones((B, T), bool)
    both, _ = jax.jit(jax.vmap(lambda x: layer[0].mix(layer[1], x, state, valid)))(np.stack([x, 2 * x]))
    np.testing.assert_allclose(both[1], run(2 * x, state, valid)[0], **CLOSE)


def test_the_output_has_the_dtype_of_the_input(case):
    _, layer, _, _ = case

    def project(role, x):
        return jnp.zeros((B, T, layer[0].shapes()[role][0]), x.dtype)

    half = dataclasses.replace(layer[1], project=project)
    x, valid = jnp.zeros((B, T, WIDTH), jnp.bfloat16), np.ones((B, T), bool)
    out, state = jax.eval_shape(partial(layer[0].mix, half), x, layer[0].first_state(B), valid)
    assert (out.dtype, state.inputs.dtype, state.matrices.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
