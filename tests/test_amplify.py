"""Sampling with the change of an adapter amplified: against logits made by hand, and where nothing is amplified."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_bases import write_base
from tiny_bases import random_adapter
from whole_passes import scores

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import AmplifiedGenerator, Generator
from jcrosslora.decoder.sampling import amplified
from jcrosslora.errors import AdapterError

KEY = jax.random.key(0)
PROMPTS = ["Water boils at", "Anna", "The quick brown fox jumps over the lazy dog. A dog is"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    base = open_base(write_base(tmp_path_factory.mktemp("base"), 60, layers=2))
    return Generator.of(base, random_adapter(base, scale=1.0))


def loud(generator, strength, plausible=0.0):
    own = {field.name: getattr(generator, field.name) for field in dataclasses.fields(Generator)}
    return AmplifiedGenerator(**own, strength=strength, plausible=plausible)


def changed(generator, change):
    """The same base with every number of the adapter changed."""
    adapter = jax.tree.map(change, generator.model.adapter)
    return dataclasses.replace(generator, model=generator.model.with_adapter(adapter))


def texts(generator, temperature=1.0):
    return [one.text for one in generator.write(PROMPTS, 6, temperature, KEY)]


def test_strength_nought_is_ordinary_sampling(generator):
    assert texts(loud(generator, 0.0)) == texts(generator)
    assert texts(loud(generator, 4.0)) != texts(generator)


def test_an_adapter_without_effect_is_the_base(generator):
    zero = changed(generator, jnp.zeros_like)
    alone = dataclasses.replace(generator, model=generator.model.with_adapter(None))
    assert texts(loud(zero, 4.0)) == texts(alone)


def test_the_change_is_added_once_more_for_each_unit_of_strength(generator):
    ids = generator.tokenizer.encode(PROMPTS[0]).ids.tolist()
    (found,) = loud(generator, 2.5).continue_tokens([ids], 6, 0.0, KEY)
    for token in found:
        adapted, base = (scores(generator.model, ids, one)[-1] for one in (generator.model.adapter, None))
        wanted = adapted + 2.5 * (adapted - base)
        assert wanted[token] > wanted.max() - 1e-4
        ids.append(int(token))
    assert len(found) == 6


def test_tokens_that_the_adapted_model_hardly_gives_are_left_out():
    adapted, base = jnp.log(jnp.array([[0.6, 0.39, 0.01]])), jnp.log(jnp.array([[0.6, 0.3999, 0.0001]]))
    strength = jnp.float32(3.0)
    free, held = (np.asarray(amplified(adapted, base, strength, jnp.float32(least)))[0] for least in (0.0, 0.1))
    assert free.argmax() == 2
    assert held[2] == -np.inf
    np.testing.assert_allclose(held[:2], free[:2])
    np.testing.assert_allclose(free, np.asarray(4 * adapted - 3 * base)[0], rtol=1e-5)


def test_an_adapter_that_is_too_large_is_named(generator):
    large = changed(generator, lambda x: x * jnp.float32(1e30))
    with pytest.raises(AdapterError, match="not finite"):
        texts(loud(large, 1.0))
