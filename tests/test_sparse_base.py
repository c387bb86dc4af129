"""The tool that writes checkpoints of any size without taking room."""

import argparse

import numpy as np
import pytest
import sparse_base

import jcrosslora as jcl


@pytest.mark.slow
def test_a_sparse_base_and_its_adapter_move_like_any_other(tmp_path):
    sizes = {"intermediate": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 50}
    for name, hidden in (("small", 32), ("wide", 4096)):
        arguments = argparse.Namespace(out=tmp_path / name, hidden=hidden, **sizes)
        sparse_base.write(arguments)
        sparse_base.write_adapter(arguments)
    file = tmp_path / "wide" / "model.safetensors"
    assert file.stat().st_blocks * 512 < file.stat().st_size / 100
    base = jcl.open_base(tmp_path / "wide")
    assert not np.asarray(base.weight("model.layers.1.mlp.down_proj"), np.float32).any()
    transport = jcl.align(jcl.open_base(tmp_path / "small"), base, method="pad-truncate")
    moved = jcl.shift(transport, jcl.load_adapter(tmp_path / "small-adapter"))
    assert moved.adapter.modules.keys() == base.modules.keys()
