"""Functions of one matrix over a stack that is sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.linalg import mesh_of, over_layers, shard, stack_rows, to_device


def test_loops_that_start_from_constants_run_on_every_device():
    stack = shard(np.arange(12, dtype=np.float32).reshape(4, 3))

    def total(row, factor):
        return lax.fori_loop(0, 3, lambda i, sum_: sum_ + factor * row[i], jnp.zeros((), jnp.float32))

    mesh = mesh_of(stack)
    assert mesh is not None
    found = jax.jit(lambda stack: over_layers(total, mesh, stack, jnp.float32(2)))(stack)
    np.testing.assert_array_equal(found, 2 * np.asarray(stack).sum(axis=1))
    assert found.sharding.mesh == mesh


def test_an_array_is_sharded_if_its_rows_divide_evenly():
    assert mesh_of(to_device(np.zeros((4, 3)))) is not None
    assert mesh_of(to_device(np.zeros((3, 4)))) is None
    assert mesh_of(to_device(np.zeros((4, 3)))).devices.tolist() == jax.local_devices()


def test_rows_of_one_array_are_stacked_without_a_copy_and_others_with_one():
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4).copy()  # which is the base of its rows
    assert stack_rows(list(whole)) is whole
    for rows in (list(whole[::-1]), [whole[0], whole[0]], list(whole[:1]), [whole[0].T, whole[1].T], [np.ones(2)] * 2):
        found = stack_rows(rows)
        assert found is not whole
        np.testing.assert_array_equal(found, np.stack(rows))
