"""Loss, gradients and updates against peft and torch on tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import save_tiny, torch, transformers

from jcrosslora.checkpoint import ROLE_PATHS, open_base
from jcrosslora.decoder import StackedAdapter, StackedFactors, load_model
from jcrosslora.text import Reading
from jcrosslora.training import Plan, TrainingSettings, first_factors, loss_and_gradient
from jcrosslora.training.batches import first_state, update

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.24 by a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RANK, ALPHA = 4, 8.0
ROLES = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
SETTINGS = TrainingSettings(
    steps=40, batch=3, rate=0.01, rank=RANK, alpha=ALPHA, modules=ROLES, weight_decay=0.1, clip=0.5, dtype="float32"
)
LENGTHS = ((21, 3), (9, 5), (14, 1))  # tokens of each example, and how many of them are the answer


def examples():
    rng = np.random.default_rng(4)
    ids = [rng.integers(3, 96, total).astype(np.int32) for total, _ in LENGTHS]
    return [Reading(own, own, own, len(own) - answer, stop=True) for own, (_, answer) in zip(ids, LENGTHS, strict=True)]


def factors_of(base) -> StackedAdapter:
    """As training starts, but for B, which must not be zero here: A would have no gradient."""
    rng = np.random.default_rng(5)
    first = first_factors(base, SETTINGS)
    roles = {
        role: StackedFactors(one.a, jnp.asarray(rng.normal(0, 0.1, one.b.shape).astype(np.float32)))
        for role, one in first.roles.items()
    }
    return StackedAdapter(roles)


def torch_model(folder, factors):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ROLES), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    model.eval()
    with torch.no_grad():
        for parameter, value in zip(parameters(model), leaves(factors), strict=True):
            parameter.copy_(torch.from_numpy(np.array(value)))
    return model


def parameters(model) -> list:
    """In the order of `leaves`: by role, A then B, by layer."""
    named = dict(model.named_parameters())
    prefix = "base_model.model.model.layers"
    layers = range(model.config.num_hidden_layers)
    return [
        named[f"{prefix}.{layer}.{ROLE_PATHS[role]}.lora_{side}.default.weight"]
        for role in ROLES
        for side in "AB"
        for layer in layers
    ]


def leaves(factors) -> list[np.ndarray]:
    stacks = [stack for role in ROLES for stack in (factors.roles[role].a, factors.roles[role].b)]
    return [np.asarray(layer) for stack in stacks for layer in stack]


def torch_loss(model):
    """The mean over all answer tokens; each example runs alone, so that nothing is padded."""
    total = torch.zeros(())
    for one in examples():
        ids = torch.from_numpy(one.ids).long()[None]
        logs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        total = total - sum(logs[place - 1, ids[0, place]] for place in range(one.answer, len(one.ids)))
    return total / sum(answer for _, answer in LENGTHS)


@pytest.fixture(scope="module", params=[("llama", False), ("gemma2", True)], ids=["llama", "gemma2-remat"])
def pair(request, tmp_path_factory):
    family, remat = request.param
    folder = save_tiny(family, tmp_path_factory.mktemp(family))
    base = open_base(folder)
    factors = factors_of(base)
    batch = Plan(examples(), 3, 1, 0).batch(0)

    def gradient(factors):
        return loss_and_gradient(load_model(base), factors, batch, ALPHA / RANK, remat)

    return torch_model(folder, factors), factors, gradient


def test_loss_and_gradients_are_those_of_peft(pair):
    model, factors, gradient = pair
    loss, found = gradient(factors)
    wanted = torch_loss(model)
    expected = [each.numpy() for each in torch.autograd.grad(wanted, parameters(model))]
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)
    scale = max(np.abs(each).max() for each in expected)
    for ours, theirs in zip(leaves(found), expected, strict=True):
        assert np.abs(theirs).max() > 1e-4 * scale
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale, rtol=1e-3)


def test_updates_are_those_of_torch(pair):
    model, factors, gradient = pair
    optimizer = torch.optim.AdamW(parameters(model), lr=1.0, weight_decay=SETTINGS.weight_decay)
    before = leaves(factors)
    state = first_state(jax.tree.map(jnp.array, factors), SETTINGS)
    for rate in (0.01 / 3, 0.02 / 3, 0.01):  # two of 40 steps rise, the third is the highest
        state = update(SETTINGS, state, gradient(state.trained)[1])
        optimizer.zero_grad()
        torch_loss(model).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters(model), SETTINGS.clip)
        assert norm > SETTINGS.clip
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert int(state.step) == 3
    moved = 0.0
    for ours, theirs, start in zip(leaves(state.trained), parameters(model), before, strict=True):
        # Adam divides by the gradient's own size: where that is near rounding, so is the sign of the step.
        apart = np.abs(ours - theirs.detach().numpy())
        assert np.quantile(apart, 0.99) < 2e-5
        assert apart.max() < 2e-3
        moved = max(moved, np.abs(ours - start).max())
    assert moved > 0.015
