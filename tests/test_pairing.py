"""Test depth maps and the modules that they leave unpaired."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jcrosslora.checkpoint import Module
from jcrosslora.errors import PairingError
from jcrosslora.relation import pair_modules, parse_depth


def modules(layers, roles=("q_proj", "down_proj")):
    names = [(f"model.layers.{i}.{role}", i, role) for i in range(layers) for role in roles]
    made = [Module(*name, shape=(4, 4), tensor=f"{name[0]}.weight", rows=None, dtype="F32") for name in names]
    return {module.name: module for module in made}


def test_by_name_pairs_layers_of_equal_numbers():
    pairing = pair_modules(modules(5), modules(3), "by-name")
    assert all(pair.source == pair.target for pair in pairing.pairs)
    assert pair_modules(modules(3), modules(5), "by-name").layers == (0, 1, 2, None, None)


def test_proportional_pairs_layers_of_equal_relative_depth():
    assert pair_modules(modules(30), modules(18)).layers == (
        0,
        2,
        4,
        5,
        7,
        9,
        10,
        12,
        14,
        15,
        17,
        19,
        20,
        22,
        24,
        25,
        27,
        29,
    )
    assert pair_modules(modules(2), modules(4)).layers == (0, 0, 1, 1)


@given(st.integers(1, 40), st.integers(1, 40))
def test_proportional_is_sorted_and_in_range(layers_src, layers_tgt):
    layers = pair_modules(modules(layers_src), modules(layers_tgt)).layers
    assert list(layers) == sorted(layers)
    assert layers[0] >= 0
    assert layers[-1] < layers_src
    if layers_src == layers_tgt:
        assert layers == tuple(range(layers_src))


def test_explicit_list_may_leave_layers_out():
    pairing = pair_modules(modules(3), modules(3), parse_depth("2,-,0"))
    assert pairing.layers == (2, None, 0)
    assert pairing.unmapped_targets == ("model.layers.1.q_proj", "model.layers.1.down_proj")


def test_role_of_one_base_alone_is_unpaired():
    pairing = pair_modules(modules(2, ("q_proj", "gate_proj")), modules(2, ("q_proj", "fc1")))
    assert [pair.role for pair in pairing.pairs] == ["q_proj", "q_proj"]
    assert pairing.unmapped_targets == ("model.layers.0.fc1", "model.layers.1.fc1")


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ("closest", "unknown"),
        ([0, 1], "names 2 layers, but the target has 3"),
        ([0, 1, 7], "names source layer 7, but the source has layers 0 to 2"),
        ([None, None, None], "pairs no module of the two bases"),
    ],
)
def test_invalid_depth_map_is_refused(depth, message):
    with pytest.raises(PairingError, match=message):
        pair_modules(modules(3), modules(3), depth)


def test_text_that_is_neither_name_nor_list_is_refused():
    with pytest.raises(PairingError, match="neither"):
        parse_depth("0,one,2")
