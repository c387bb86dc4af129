import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora.distill.teacher import chosen_weights


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_tokens_with_the_highest_excess_keep_their_weights(share):
    rng = np.random.default_rng(0)
    places, columns = 40, 9
    base, adapted = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(places, columns)), jnp.float32)) for _ in "ba")
    weight = rng.uniform(0.5, 1, places).astype(np.float32)
    weight[3] = 0
    answer = rng.random(places) < 0.7
    following = rng.integers(0, columns, places).astype(np.int32)
    following[5] = -1
    judged = answer & (weight > 0) & (following >= 0)
    excess = (np.asarray(adapted) - np.asarray(base))[np.arange(places), np.maximum(following, 0)]
    found = np.asarray(
        chosen_weights(*map(jnp.asarray, (weight, answer, following)), base, adapted, jnp.float32(share))
    )
    np.testing.assert_array_equal(found[~judged], weight[~judged])
    kept = judged & (found > 0)
    np.testing.assert_array_equal(found[kept], weight[kept])
    assert kept.sum() == pytest.approx(share * judged.sum(), abs=1)
    assert share == 1 or excess[kept].min() > excess[judged & (found == 0)].max()
