"""Layers of different parts: how they are divided for scans, and how what they return is put together again."""

import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora.architectures.architecture import Layer, layers_with
from jcrosslora.architectures.blocks import Mlp, SelfAttention
from jcrosslora.decoder.layer_stack import join_layers, segments_of


def parts(text):
    return tuple(Layer(None, Mlp(8, ord(letter))) for letter in text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("aaaa", [("a", 4)]),
        ("a", [("a", 1)]),
        ("abbbbb", [("a", 1), ("b", 5)]),
        ("aaabaaab", [("aaab", 2)]),
        ("aabaabaababab", [("aab", 3), ("ab", 2)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_layers_are_divided_into_repeated_patterns(text, found):
    segments = segments_of(parts(text))
    assert [(one.pattern, one.repeats) for one in segments] == [(parts(pattern), n) for pattern, n in found]
    layers = [layer for one in segments for place in range(len(one.pattern)) for layer in one.layers(place)]
    assert sorted(layers) == list(range(len(text)))


def test_an_array_of_joined_layers_has_the_layers_that_returned_it_in_order():
    odd, even = [1, 3], [0, 2]
    rows = {"all": lambda layers: jnp.asarray(layers), "odd": lambda layers: jnp.asarray(layers) * 10}
    joined = join_layers(
        [(odd, ({name: rows[name](odd) for name in rows}, None)), (even, ({"all": rows["all"](even)}, None))]
    )
    np.testing.assert_array_equal(joined[0]["all"], range(4))
    np.testing.assert_array_equal(joined[0]["odd"], [10, 30])
    assert joined[1] is None


def test_a_layer_has_the_arrays_of_its_blocks():
    attention = SelfAttention(8, 2, 1, 4, norm="head")
    own = (Layer(attention, Mlp(8, 16)), Layer(attention))
    assert {"q_proj", "q", "attn", "attn_post", "down_proj", "mlp"} <= own[0].names
    assert {"q_proj", "attn"} <= own[1].names
    assert not {"down_proj", "mlp"} & own[1].names
    assert layers_with(own, "down_proj") == (0,)
    assert layers_with(own, "k") == (0, 1)


def test_equal_layers_are_one_key_of_a_dictionary():
    first, same, other = (Layer(None, Mlp(8, width)) for width in (16, 16, 24))
    assert {first: 1}[same]
    assert other not in {first}
