"""A base whose weights are another's after a known rotation of the stream and permutations of heads and neurons.

Both compute the same function, so an adapter has an exact counterpart, and cross-lora has to find it.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
import pytest
from full_set import full_except
from tiny_bases import delta, write_tokenizer
from tiny_models import tiny_model, torch

import jcrosslora as jcl
from jcrosslora import EvidenceKind
from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.methods import CrossLoRA

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS = 4, 2, 12, 48, 80, 2
DIMS = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
}


def source_model(seed):
    """A llama with the norm gains folded away, so that a rotation of the stream is an exact symmetry."""
    model = tiny_model("llama", seed=seed, **DIMS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    return model


def symmetries(seed):
    """For each module name: the maps of its outputs and inputs, (O, O) and (I, I), all orthogonal."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0]
    maps = {}
    for layer in range(LAYERS):
        groups = rng.permutation(KV_HEADS)
        within = rng.permutation(HEADS // KV_HEADS)
        heads = [group * (HEADS // KV_HEADS) + head for group in groups for head in within]
        query, key = heads_matrix(heads), heads_matrix(groups)
        neurons = np.eye(INTERMEDIATE)[rng.permutation(INTERMEDIATE)]
        prefix = f"model.layers.{layer}"
        maps[f"{prefix}.self_attn.q_proj"] = query, rotation
        maps[f"{prefix}.self_attn.k_proj"] = key, rotation
        maps[f"{prefix}.self_attn.v_proj"] = key, rotation
        maps[f"{prefix}.self_attn.o_proj"] = rotation, query
        maps[f"{prefix}.mlp.gate_proj"] = neurons, rotation
        maps[f"{prefix}.mlp.up_proj"] = neurons, rotation
        maps[f"{prefix}.mlp.down_proj"] = rotation, neurons
    return rotation, maps


def heads_matrix(order):
    return np.kron(np.eye(len(order))[list(order)], np.eye(HEAD_DIM))


def target_model(source, rotation, maps):
    model = tiny_model("llama", **DIMS)
    state = {name: tensor.double().numpy() for name, tensor in source.state_dict().items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ rotation.T
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name, (p_out, p_in) in maps.items():
        state[f"{name}.weight"] = p_out @ state[f"{name}.weight"] @ p_in.T
    model.load_state_dict({name: torch.tensor(array, dtype=torch.float32) for name, array in state.items()})
    return model


def logits(model, adapter=None):
    ids = torch.arange(3, 35).reshape(2, 16)
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, factors in (adapter.modules if adapter else {}).items():
        state[f"{name}.weight"] += torch.tensor(delta(factors), dtype=torch.float32)
    with torch.no_grad():
        return torch.func.functional_call(model, state, (ids,)).logits.numpy()


@pytest.fixture(params=full_except(range(3), [0]))
def pair(request, tmp_path):
    """Source and target as files with tokenizers, opened by us, beside the torch models and the true maps."""
    seed = request.param
    source = source_model(seed)
    rotation, maps = symmetries(seed + 100)
    target = target_model(source, rotation, maps)
    for model, name in ((source, "source"), (target, "target")):
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, model.config.vocab_size)
    np.testing.assert_allclose(logits(source), logits(target), atol=1e-3)
    return source, target, maps, tmp_path, seed


@dataclass(frozen=True)
class Scrambled(CrossLoRA):
    """cross-lora on decompositions with joint signs that are flipped at random: equally valid ones."""

    name: ClassVar[str] = "scrambled"
    requires: ClassVar[frozenset[EvidenceKind]] = CrossLoRA.requires | {EvidenceKind.RANDOM_KEY}

    def maps(self, evidence):
        def flipped(side, key):
            flips = jax.random.rademacher(key, side.svd.s.shape, side.svd.u.dtype)
            return side.replace(svd=side.svd.replace(u=side.svd.u * flips, v=side.svd.v * flips))

        sides = zip((evidence.src, evidence.tgt), jax.random.split(evidence.key), strict=True)
        src, tgt = (flipped(side, key) for side, key in sides)
        return super().maps(evidence.replace(src=src, tgt=tgt))


def full_rank_bases(model, name):
    weight = model.state_dict()[f"{name}.weight"].double().numpy()
    u, _, vt = np.linalg.svd(weight, full_matrices=False)
    return u, vt.T


def adapter_inside(source, maps, seed, rank=3):
    """An adapter whose updates lie in the row and column spaces of their modules."""
    rng = np.random.default_rng(seed)
    modules = {}
    for name in maps:
        u, v = full_rank_bases(source, name)
        b, a = u @ rng.normal(size=(u.shape[1], rank)), rng.normal(size=(rank, v.shape[1])) @ v.T
        modules[name] = LoRAFactors(a.astype(np.float32) / 7, b.astype(np.float32) / 7, scale=2.0)
    return Adapter(modules)


def move(folder, adapter, seed):
    source, target = jcl.open_base(folder / "source"), jcl.open_base(folder / "target")
    return jcl.shift(jcl.align(source, target, Scrambled(svd_rank=HIDDEN), seed=seed), adapter)


def test_adapter_inside_the_row_and_column_spaces_moves_exactly(pair):
    source, target, maps, folder, seed = pair
    adapter = adapter_inside(source, maps, seed)
    moved = move(folder, adapter, seed)
    effect = np.abs(logits(source, adapter) - logits(source)).max()
    assert effect > 0.1
    # Single vectors are known to eps / gap only, in float32, and how much of that is used up depends on the CPU.
    np.testing.assert_allclose(logits(target, moved.adapter), logits(source, adapter), atol=3e-3 * max(1.0, effect))
    assert moved.report.kept == pytest.approx(1, abs=1e-3)
    assert jcl.verdict(moved.report).level == "aligned"
    assert not moved.report.warnings


def test_report_gives_the_lost_share_of_any_adapter(pair):
    source, _, maps, folder, seed = pair
    rng = np.random.default_rng(seed)
    modules = {
        name: LoRAFactors(rng.normal(size=(3, i.shape[0])).astype("f"), rng.normal(size=(o.shape[0], 3)).astype("f"))
        for name, (o, i) in maps.items()
    }
    moved = move(folder, Adapter(modules), seed)
    rows = {row.target: row for row in moved.report.rows}
    for name, (p_out, p_in) in maps.items():
        u, v = full_rank_bases(source, name)
        update = delta(modules[name])
        inside = u @ u.T @ update @ v @ v.T
        np.testing.assert_allclose(delta(moved.adapter.modules[name]), p_out @ inside @ p_in.T, atol=3e-2)
        lost = np.sum((update - inside) ** 2) / np.sum(update**2)
        assert 1 - rows[name].kept == pytest.approx(lost, abs=1e-3)
        assert rows[name].norm_after == pytest.approx(np.linalg.norm(inside), rel=1e-3)
    # What is lost is real: k_proj's column space is only part of its inputs.
    assert min(row.kept for row in moved.report.rows) < 0.7


def test_report_warns_without_sign_anchors(pair):
    source, _, maps, folder, seed = pair
    (folder / "target" / "tokenizer.json").unlink()
    moved = move(folder, adapter_inside(source, maps, seed), seed)
    assert moved.report.recipe.signs == "rule"
    assert "not anchored" in moved.report.warnings[0]
    assert "tokenizer.json" in moved.report.warnings[0]
    assert jcl.verdict(moved.report).level == "unknown"
