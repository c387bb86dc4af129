"""Adapters in memory: pytrees, stacks, and live peft models in both directions against peft's own logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_folders import CONFIG, Q, V, adapter_of, delta, tensors, write_folder
from flax import nnx
from kind_cases import MADE, TARGETS, lora, peft, random_peft
from tiny_models import save_tiny, tiny_model, torch

import jcrosslora as jcl
from jcrosslora.adapter import (
    Adapter,
    AdapterInfo,
    ExpertUpdate,
    LoRAFactors,
    ReplacedTensors,
    TokenUpdate,
    adapter_from_peft,
    from_pytree,
    load_adapter,
    stack_adapters,
    to_peft,
    to_pytree,
    unstack_adapters,
)
from jcrosslora.errors import AdapterError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUIET_PEFT = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
TOKENS = torch.tensor([[5, 9, 41, 7, 22, 60, 3]])


def rows(**changes) -> TokenUpdate:
    given = {"table": "lm_head", "kind": "tokens", "size": 9, "ids": np.array([1, 4]), "rows": np.ones((2, 6))}
    return TokenUpdate(**given | changes)


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def live(config):
    """A peft model whose trained parameters are random."""
    return random_peft(config).eval()


def merged(adapter: Adapter):
    """The tiny base with the updates added to its weights."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            model.get_submodule(name).weight.add_(torch.from_numpy(delta(factors).astype(np.float32)))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(save_tiny("llama", tmp_path_factory.mktemp("base")))


def test_an_adapter_prints_on_one_line_and_as_a_table():
    adapter = adapter_of({Q: 2, V: 3})
    assert repr(adapter) == "Adapter(made: LoRA, 2 modules, ranks 2 to 3, 55 numbers)"
    hostile = dataclasses.replace(adapter, info=AdapterInfo(name="<script>"))
    html = hostile._repr_html_()
    assert "<script>" not in html
    assert all(text in html for text in ("q_proj", "v_proj", "norm of dW", "&lt;script&gt;"))
    assert repr(rows()) == "TokenUpdate(lm_head, tokens, rows for 2 of 9 tokens)"


def whole(seed: int = 0) -> Adapter:
    """An adapter with every kind of change."""
    rng = np.random.default_rng(seed)

    def of(*shape):
        return rng.normal(size=shape).astype(np.float32)

    factors = LoRAFactors(a=of(2, 6), b=of(2, 2))
    return Adapter(
        adapter_of({Q: 2}, seed=seed).modules,
        AdapterInfo(name=f"whole {seed}"),
        tokens=(
            rows(rows=of(2, 6), energy=float(seed)),
            rows(table="embed_tokens", kind="embedding", rows=None, factors=factors, share=0.1 * seed),
        ),
        replaced=(ReplacedTensors("full", {"model.norm.weight": of(6)}, share=0.1 * seed),),
        experts=(ExpertUpdate("model.layers.0.mlp.experts.down_proj", 0, "down", of(2, 3, 6), of(2, 5, 3)),),
    )


def test_all_arrays_of_an_adapter_are_leaves():
    """Gradients, updates and stacks reach all of them, and none of the places of rows."""
    first, second = whole(1), whole(2)
    assert len(jax.tree.leaves(first)) == 2 + 1 + 2 + 1 + 2
    slope = jax.grad(lambda adapter: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(adapter)) / 2)(first)
    jax.tree.map(np.testing.assert_array_equal, slope, first)
    np.testing.assert_array_equal(slope.tokens[0].ids, [1, 4])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    back = unstack_adapters(jax.vmap(lambda adapter: jax.tree.map(jnp.negative, adapter))(both))
    for one, wanted in zip(back, (first, second), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(-x, y), one, wanted)


def test_one_program_serves_adapters_with_every_kind_of_change(tmp_path):
    traces = []

    @jax.jit
    def doubled(adapter):
        traces.append(adapter)
        return jax.tree.map(lambda leaf: 2 * leaf, adapter)

    for adapter in (whole(1), whole(2)):
        found = doubled(adapter)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), found, adapter)
        assert (found.tokens[0].energy, found.tokens[1].share, found.replaced[0].share) == (0.0, 0.0, None)
        by_hand = jax.tree.map(lambda leaf: 2 * leaf, adapter)
        assert by_hand.tokens[0].energy == adapter.tokens[0].energy
        files = [jcl.save_adapter(one, tmp_path / name, overwrite=True) for name, one in (("a", found), ("b", by_hand))]
        one, other = ((file / "adapter_model.safetensors").read_bytes() for file in files)
        assert one == other
    assert len(traces) == 1


def test_static_parts_compare_by_value():
    one, two = (AdapterInfo(name="a", config={"r": 2, "x": [1]}) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != dataclasses.replace(one, config={"r": 3})


def from_files(tmp_path):
    """Read two adapters of one shape and invocation from different files."""
    for name, seed in (("one", 0), ("two", 7)):
        write_folder(tmp_path / name, CONFIG | {"alora_invocation_tokens": [5, 7]}, tensors(seed=seed))
    return [dataclasses.replace(load_adapter(tmp_path / name), tokens=(rows(),)) for name in ("one", "two")]


def test_adapters_of_one_shape_are_combined_by_tree_map(tmp_path):
    first, second = from_files(tmp_path)
    assert first.info != second.info
    assert jax.tree.structure(first) == jax.tree.structure(second)
    total = jax.tree.map(jnp.add, first, second)
    np.testing.assert_array_equal(total.modules[Q].a, first.modules[Q].a + second.modules[Q].a)
    assert total.info == first.info
    plain = jax.tree.map(jnp.add, to_pytree(first), to_pytree(second))
    np.testing.assert_array_equal(plain[V]["b"], total.modules[V].b)


@pytest.mark.parametrize(
    "changes",
    [
        {"info": AdapterInfo(invocation=(1,))},
        {"info": AdapterInfo(invocation_target=(1,))},
        {"tokens": ()},
        {"tokens": (rows(ids=np.array([1, 5])),)},
        {"tokens": (rows(table="embed_tokens"),)},
        {"modules": {}},
        {"modules": adapter_of({Q: 2, V: 2}, scale=7.0).modules},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_adapters_that_compute_otherwise_have_another_structure(changes):
    first = dataclasses.replace(adapter_of({Q: 2, V: 2}), tokens=(rows(),))
    assert jax.tree.structure(dataclasses.replace(first, **changes)) != jax.tree.structure(first)


def test_a_jitted_function_is_compiled_once_for_adapters_of_one_shape(tmp_path):
    """Its result has no provenance: that of the adapter it was compiled with would be wrong for the others."""
    traces = []

    @jax.jit
    def doubled(adapter):
        traces.append(adapter.info)
        return jax.tree.map(lambda leaf: 2 * leaf, adapter)

    for adapter in from_files(tmp_path):
        found = doubled(adapter)
        np.testing.assert_array_equal(found.modules[Q].b, 2 * adapter.modules[Q].b)
        np.testing.assert_array_equal(found.tokens[0].rows, 2 * adapter.tokens[0].rows)
        assert found.info == AdapterInfo(invocation=(5, 7))
    assert traces == [AdapterInfo(invocation=(5, 7))]


def test_a_stack_is_mapped_over_and_taken_apart():
    adapters = [adapter_of({Q: 2, V: 3}, seed=seed) for seed in (0, 3, 9)]
    adapters = [dataclasses.replace(one, info=AdapterInfo(name=str(place))) for place, one in enumerate(adapters)]
    stacked = stack_adapters(adapters)
    assert stacked.modules[V].a.shape == (3, 3, 6)
    assert (stacked.modules[V].rank, stacked.modules[V].shape) == (3, (5, 6))
    assert repr(stacked).startswith("Adapter(stack of 3 adapters: LoRA, 2 modules")
    deltas = jax.vmap(lambda adapter: adapter.modules[Q].scale * adapter.modules[Q].b @ adapter.modules[Q].a)(stacked)
    for place, (one, back) in enumerate(zip(adapters, unstack_adapters(stacked), strict=True)):
        np.testing.assert_allclose(deltas[place], delta(one.modules[Q]), atol=1e-5)
        assert back.info == one.info
        assert back.modules[V].scale == one.modules[V].scale
        np.testing.assert_array_equal(back.modules[V].b, one.modules[V].b)


def test_scales_that_differ_are_folded_into_b():
    adapters = [adapter_of({Q: 2}, scale=scale, seed=3) for scale in (0.5, -2.0)]
    stacked = stack_adapters(adapters)
    assert stacked.modules[Q].scale == 1.0
    for one, back in zip(adapters, unstack_adapters(stacked), strict=True):
        np.testing.assert_allclose(delta(back.modules[Q]), delta(one.modules[Q]), rtol=1e-6)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (adapter_of({V: 2}), "q_proj"),
        (adapter_of({Q: 3}), "rank 2 in made"),
        (adapter_of({Q: 2}, width=7), r"\(5, 7\)"),
        (dataclasses.replace(adapter_of({Q: 2}), info=AdapterInfo(invocation=(1,))), "invocation"),
        (dataclasses.replace(adapter_of({Q: 2}), tokens=(rows(),)), "lm_head"),
    ],
)
def test_a_stack_names_the_first_difference(other, named):
    with pytest.raises(AdapterError, match=named):
        stack_adapters([adapter_of({Q: 2}), other])


def test_stacks_of_nothing_and_single_adapters_are_refused():
    with pytest.raises(AdapterError, match="at least one"):
        stack_adapters([])
    with pytest.raises(AdapterError, match="not a stack"):
        unstack_adapters(adapter_of({Q: 2}))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, lambda value: torch.from_numpy(np.asarray(value))])
def test_a_tree_of_any_arrays_is_an_adapter(convert):
    adapter = adapter_of({Q: 2, V: 3})
    tree = to_pytree(adapter)
    for parts in tree.values():
        parts |= {"a": convert(parts["a"]), "b": convert(parts["b"])}
    for back in (from_pytree(tree, name="mine"), load_adapter(tree)):
        for name, factors in adapter.modules.items():
            np.testing.assert_array_equal(delta(back.modules[name]), delta(factors))
    assert from_pytree(tree, name="mine").info.name == "mine"


def test_an_nnx_state_with_nested_names_is_an_adapter():
    wanted = adapter_of({Q: 2}).modules[Q]
    parts = {"a": nnx.Param(jnp.asarray(wanted.a)), "b": nnx.Param(jnp.asarray(wanted.b)), "scale": nnx.Param(1.5)}
    state = nnx.State({"model": {"language_model": {"layers": {0: {"self_attn": {"q_proj": parts}}}}}})
    np.testing.assert_allclose(delta(load_adapter(state).modules[Q]), delta(wanted), rtol=1e-6)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({}, "no update in the tree"),
        ({Q: {"a": np.ones((2, 6))}}, "not part of an update"),
        ({Q: {"a": np.ones((2, 6)), "b": np.ones((5, 3))}}, r"\[5, 3\]"),
        ({Q: {"a": np.ones((2, 6)), "b": np.ones((5, 2)), "alpha": 2.0}}, "'alpha'"),
    ],
)
def test_a_tree_that_holds_no_updates_is_refused(tree, named):
    with pytest.raises(AdapterError, match=named):
        from_pytree(tree)


def test_a_state_dict_is_read_with_its_configuration(tmp_path):
    adapter = load_adapter(tensors(), config=CONFIG)
    assert (adapter.info.form, adapter.info.kind, list(adapter.modules)) == (None, "LoRA", [Q, V])
    assert adapter.info.digest == load_adapter(dict(reversed(tensors().items())), config=CONFIG).info.digest
    assert adapter.info.digest != load_adapter(tensors(rank=2, rows=7), config=CONFIG).info.digest
    half = {name: torch.from_numpy(value).to(torch.bfloat16) for name, value in tensors().items()}
    assert load_adapter(half, config=CONFIG).modules[Q].b.dtype.name == "bfloat16"
    with pytest.raises(AdapterError, match="config="):
        load_adapter(tensors())
    with pytest.raises(AdapterError, match=r"state dict: module .* lora_A without its lora_B"):
        load_adapter({name: value for name, value in tensors().items() if "lora_A" in name}, config=CONFIG)
    with pytest.raises(AdapterError, match="dtype"):
        load_adapter({f"base_model.model.{Q}.lora_A.weight": np.array(["text"])}, config=CONFIG)
    with pytest.raises(UsageError, match="config was given for a str"):
        load_adapter("somewhere", config=CONFIG)


def test_an_adapter_is_loaded_as_it_is():
    adapter = adapter_of({Q: 2})
    assert load_adapter(adapter) is adapter


# An aLoRA is active only from its invocation tokens on, so that there are no merged logits.
LIVE = [pytest.param(kind, label, marks=QUIET_PEFT) for kind, made in MADE.items() for label in made if kind != "aLoRA"]


@pytest.mark.parametrize(("kind", "label"), LIVE)
def test_a_live_peft_model_of_every_kind_is_read_like_its_files(base, kind, label):
    config = MADE[kind][label]()
    if kind == "AdaLoRA":
        config.rank_pattern = None  # it prunes the state dict alone, which here was not trained to be pruned
    model = live(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = load_adapter(model, base, rank=48)
    assert adapter.info.kind == kind
    assert adapter.info.digest is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if "lm_head" in str(sorted(model.peft_config["default"].target_modules)):
        return  # its change of the head moves as `tokens`, which `merged` does not add
    np.testing.assert_allclose(logits(merged(adapter)), logits(model), atol=2e-3)


def test_adapters_of_a_model_are_read_by_name():
    model = live(lora())
    model.add_adapter("second", lora(r=2, lora_alpha=2, init_lora_weights=False))
    assert {item.rank for item in adapter_from_peft(model).modules.values()} == {4}
    assert {item.rank for item in adapter_from_peft(model, "second").modules.values()} == {2}
    model.set_adapter("second")
    assert load_adapter(model).info.name == "peft adapter second"
    with pytest.raises(AdapterError, match=r"no adapter 'third'; it has default, second"):
        adapter_from_peft(model, "third")


def test_a_kind_that_is_refused_in_files_is_refused_live():
    with pytest.raises(AdapterError, match="IA3"):
        adapter_from_peft(live(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])))


def random_adapter(ranks: dict[str, int], family: str = "llama") -> Adapter:
    model, rng = tiny_model(family), np.random.default_rng(0)
    modules = {}
    for name, rank in ranks.items():
        size = tuple(model.get_submodule(name).weight.shape)
        a, b = rng.normal(size=(rank, size[1])), rng.normal(size=(size[0], rank))
        modules[name] = LoRAFactors(a=(0.2 * a).astype(np.float32), b=(0.2 * b).astype(np.float32), scale=1.7)
    return Adapter(modules, AdapterInfo(name="mine", base_name="owner/base"))


def test_a_live_model_with_the_adapter_has_the_merged_logits_and_gives_it_back():
    adapter = random_adapter({Q: 2, V: 5, "model.layers.2.mlp.down_proj": 3})
    model = to_peft(adapter, tiny_model("llama"))
    np.testing.assert_allclose(logits(model), logits(merged(adapter)), atol=2e-4)
    back = adapter_from_peft(model)
    assert list(back.modules) == list(adapter.modules)
    for name, factors in adapter.modules.items():
        np.testing.assert_allclose(delta(back.modules[name]), delta(factors), atol=1e-5)
    second = random_adapter({Q: 1})
    assert to_peft(second, model, "second") is model
    np.testing.assert_allclose(logits(model), logits(merged(second)), atol=2e-4)
    with pytest.raises(AdapterError, match="already"):
        to_peft(second, model, "second")


def test_changes_of_embedding_and_head_go_into_a_live_model_too(base):
    model = live(lora(trainable_token_indices={"embed_tokens": [3, 41]}))
    adapter = load_adapter(model, base)
    assert [update.kind for update in adapter.tokens] == ["tokens"]
    np.testing.assert_allclose(logits(to_peft(adapter, tiny_model("llama"))), logits(model), atol=2e-4)


def test_invocation_tokens_go_into_a_live_model_too():
    adapter = dataclasses.replace(random_adapter({Q: 2}), info=AdapterInfo(invocation=(5, 7)))
    assert to_peft(adapter, tiny_model("llama")).peft_config["default"].alora_invocation_tokens == [5, 7]


def test_fused_modules_of_a_live_model_are_merged(tmp_path):
    base = jcl.open_base(save_tiny("phi3", tmp_path))
    rng, part = np.random.default_rng(0), "model.layers.1.self_attn.v_proj"
    rows_, width = base.modules[part].shape
    a, b = rng.normal(size=(2, width)).astype(np.float32), rng.normal(size=(rows_, 2)).astype(np.float32)
    adapter = Adapter({part: LoRAFactors(a=a, b=b)})
    with pytest.raises(AdapterError, match=r"fused=base\.fused"):
        to_peft(adapter, tiny_model("phi3"))
    back = jcl.adapter.split_fused(
        adapter_from_peft(to_peft(adapter, tiny_model("phi3"), fused=base.fused)), base.fused
    )
    np.testing.assert_allclose(delta(back.modules[part]), delta(adapter.modules[part]), atol=1e-5)


def test_an_adapter_of_another_base_does_not_go_into_a_live_model():
    with pytest.raises(AdapterError, match=r"layers\.7"):
        to_peft(adapter_of({"model.layers.7.self_attn.q_proj": 2}), tiny_model("llama"))
    with pytest.raises(AdapterError, match="peft cannot load"):
        to_peft(adapter_of({Q: 2}), tiny_model("llama"))


def test_a_tensor_that_peft_does_not_load_is_named(monkeypatch):
    from jcrosslora.adapter import peft as peft_format

    made = peft_format.peft_state

    def with_one_more(contents):
        found, config = made(contents)
        return found | {"base_model.model.model.layers.9.nowhere.lora_A.weight": np.ones((1, 1), np.float32)}, config

    monkeypatch.setattr(peft_format, "peft_state", with_one_more)
    with pytest.raises(AdapterError, match=r"layers\.9\.nowhere.* was not loaded"):
        to_peft(random_adapter({Q: 2}), tiny_model("llama"))


def test_the_configuration_of_a_live_model_is_plain_json():
    config = load_adapter(live(lora())).info.config
    assert json.loads(json.dumps(config)) == config
    assert sorted(config["target_modules"]) == sorted(TARGETS)
