"""`jcrosslora.apply`: the maths of a shift as a pure function that JAX may compile, vectorise and differentiate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_set import full_except
from test_transfer import WIDER
from tiny_bases import delta, mixed_ranks, open_pair, random_adapter
from user_methods import HalfCopy

import jcrosslora as jcl
from jcrosslora.adapter import Adapter
from jcrosslora.errors import AdapterError
from jcrosslora.methods import CrossLoRA, PadTruncate, Random

FEW = {"q_proj", "down_proj"}
METHODS = [CrossLoRA(svd_rank=8), PadTruncate(), HalfCopy(share=0.3), Random(svd_rank=8)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return open_pair(tmp_path_factory.mktemp("bases"), **WIDER)


@pytest.fixture(scope="module", params=full_except(METHODS, METHODS[::2]), ids=lambda method: method.name)
def transport(request, bases):
    return jcl.align(*bases, request.param)


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, factors in wanted.items():
        np.testing.assert_allclose(delta(found[name]), delta(factors), atol=1e-4)


def test_it_is_what_shift_does(transport, bases):
    adapter = mixed_ranks(bases[0])
    wanted = jcl.shift(transport, adapter).adapter.modules
    assert_same(jax.jit(jcl.apply)(transport, adapter), dict(sorted(wanted.items())))


def test_compiled_with_the_transport_as_an_argument_or_closed_over(transport, bases):
    # Few modules: what is not compiled as a whole is compiled operation by operation.
    modules = random_adapter(bases[0], roles=FEW, scale=0.5).modules
    wanted = jcl.apply(transport, modules)
    assert list(wanted) == list(jcl.shift(transport, Adapter(modules)).adapter.modules)
    assert_same(dict(jax.jit(jcl.apply)(transport, modules)), dict(sorted(wanted.items())))
    assert_same(dict(jax.jit(lambda item: jcl.apply(transport, item))(modules)), dict(sorted(wanted.items())))


def test_equal_transports_share_a_program(bases):
    modules, traces = random_adapter(bases[0], roles=FEW, scale=0.5).modules, []

    @jax.jit
    def run(transport, modules):
        traces.append(transport.method)
        return jcl.apply(transport, modules)

    again = [jcl.open_base(base.path) for base in bases]
    found = [jcl.align(*bases, PadTruncate()), jcl.align(*again, PadTruncate()), jcl.align(*bases, HalfCopy(share=0.3))]
    for transport in found:
        assert_same(dict(run(transport, modules)), dict(sorted(jcl.apply(transport, modules).items())))
    assert traces == [PadTruncate(), HalfCopy(share=0.3)]
    # The bases are not compared, and go with their transport.
    assert jcl.shift(jax.tree.map(lambda leaf: leaf, found[1]), Adapter(modules)).adapter.modules


def test_vectorised_over_stacked_adapters(transport, bases):
    each = [random_adapter(bases[0], roles=FEW, seed=seed).modules for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    moved, run = jax.jit(jax.vmap(jcl.apply, in_axes=(None, 0)))(transport, stacked), jax.jit(jcl.apply)
    for one, modules in zip(jcl.unstack_adapters(moved), each, strict=True):
        assert_same(one.modules, run(transport, modules))


def test_a_stack_is_refused_where_one_adapter_is_wanted(transport, bases):
    stacked = jcl.stack_adapters([random_adapter(bases[0], roles=FEW, seed=seed) for seed in range(2)])
    for move in (jcl.apply, jcl.shift):
        with pytest.raises(AdapterError, match=r"jax\.vmap\(jcrosslora\.apply, .* jcrosslora\.unstack_adapters"):
            move(transport, stacked)


def test_updates_of_other_widths_are_refused(transport, bases):
    modules = random_adapter(bases[0], roles={"q_proj"}).modules
    wrong = Adapter({name: dataclasses.replace(item, a=item.a[:, 1:]) for name, item in modules.items()})
    for move in (jcl.apply, jcl.shift):
        with pytest.raises(AdapterError, match="give the base it was trained on"):
            move(transport, wrong)
    with pytest.raises(AdapterError, match="give the base it was trained on"):
        jax.vmap(jcl.apply, in_axes=(None, 0))(transport, jcl.stack_adapters([wrong, wrong]))


def test_its_gradient_is_the_slope(transport, bases):
    modules = random_adapter(bases[0], roles={"q_proj"}).modules
    direction = random_adapter(bases[0], roles={"q_proj"}, seed=1).modules

    @jax.jit
    def energy(modules):
        return sum(jnp.sum((factors.b @ factors.a) ** 2) for factors in jcl.apply(transport, modules).values())

    gradient = jax.grad(energy)(modules)
    slope = sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    step = 1e-2
    ends = [energy(jax.tree.map(lambda x, y, s=s: x + s * y, modules, direction)) for s in (-step, step)]
    assert float(slope) == pytest.approx(float(ends[1] - ends[0]) / (2 * step), rel=1e-2)


def test_an_adapter_that_feeds_nothing_is_refused(transport, bases):
    other = {"model.layers.9.self_attn.q_proj": next(iter(random_adapter(bases[0]).modules.values()))}
    with pytest.raises(AdapterError, match="none of the 1 modules of the adapter feeds a module of the target"):
        jcl.apply(transport, other)


@pytest.mark.parametrize("given", ["a/folder", [1], {"x": np.ones((2, 3, 4))}, None])
def test_what_is_no_adapter_in_memory_is_refused(transport, given):
    for function in (lambda: jcl.apply(transport, given), lambda: jcl.unstack_adapters(given)):
        with pytest.raises(AdapterError, match=f"a {type(given).__name__} is no adapter in memory: give an Adapter"):
            function()


def test_factors_that_do_not_fit_each_other_are_refused(transport, bases):
    (name, factors), *_ = random_adapter(bases[0]).modules.items()
    with pytest.raises(AdapterError, match=r"has a of shape \(4, 48\) and b of \(48, 2\); they must be"):
        jcl.apply(transport, {name: factors.replace(b=factors.b[:, :2])})
