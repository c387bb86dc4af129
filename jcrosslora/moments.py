"""Cross-moments of matched activations: both bases run over the same text, and only sums of products are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import INPUT_SITES, DecoderSettings, LayerCapture, Params, forward, load_params, settings_of
from jcrosslora.linalg import dot

if TYPE_CHECKING:
    from jcrosslora.probes import ProbeBatch


@flax.struct.dataclass
class CrossMoments:
    """Sums over N matched positions, float32, with a leading axis of the target's L layers.

    Source and target rows are those of the source layer that feeds the target layer. Nothing is centred.

    Attributes:
        inputs: site -> (L, I_src, I_tgt), sum of x_src x_tgt', see `jcrosslora.decoder.INPUT_SITES`.
        outputs: role -> (L, O_src, O_tgt), sum of y_src y_tgt'.
        input_energy: site -> (L, 2), sums of |x_src|^2 and of |x_tgt|^2.
        output_energy: role -> (L, 2), the same of the outputs.
        count: N, scalar.
    """

    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    input_energy: dict[str, jax.Array]
    output_energy: dict[str, jax.Array]
    count: jax.Array


def cross_moments(
    source: BaseModel,
    target: BaseModel,
    batches: Sequence[ProbeBatch],
    layers: Sequence[int | None],
    roles: Collection[str],
    *,
    progress: bool = False,
) -> CrossMoments:
    """Run both bases over the probes and add up the cross-moments of the inputs and outputs of paired modules.

    Memory: the weights of both bases as float32, twice the moments (12 million numbers a layer for a pair of 600 wide
    models), and the source's activations at the matched positions of one batch.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        batches: at least one, all of the same shape.
        layers: for each target layer the source layer that feeds it, or None (its moments mean nothing).
        roles: which modules are wanted.
        progress: whether to show a progress bar.

    Raises:
        CheckpointError: weights that cannot be read, or a model that the decoder does not know.
    """
    run = partial(
        _add_batch,
        (settings_of(source), settings_of(target)),
        (load_params(source), load_params(target)),
        jnp.asarray([0 if layer is None else layer for layer in layers], jnp.int32),
        tuple(sorted(roles)),
    )
    totals = None
    for batch in tqdm(batches, desc="activations", unit="batch", disable=not progress):
        totals = run(jax.tree.map(jnp.asarray, _arrays(batch)), totals)
        # One batch in flight: the next one's activations must not join this one's in memory.
        jax.block_until_ready(totals)
    assert totals is not None
    return totals


def _arrays(batch: ProbeBatch) -> dict[str, np.ndarray]:
    names = ("tokens_src", "mask_src", "tokens_tgt", "mask_tgt", "at_src", "at_tgt", "valid")
    return {name: getattr(batch, name) for name in names}


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=(5,))
def _add_batch(
    settings: tuple[DecoderSettings, DecoderSettings],
    params: tuple[Params, Params],
    layers: jax.Array,
    roles: tuple[str, ...],
    batch: dict[str, jax.Array],
    totals: CrossMoments | None,
) -> CrossMoments:
    valid = batch["valid"].astype(jnp.float32)[:, None]

    def rows(seen: LayerCapture, at: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The matched positions of one layer, (P, width) for each site and role; zero where there is no match."""

        def take(x: jax.Array) -> jax.Array:
            return x.reshape(-1, x.shape[-1])[at].astype(jnp.float32) * valid

        sites = sorted({INPUT_SITES[role] for role in roles})
        return {site: take(seen.inputs[site]) for site in sites}, {role: take(seen.outputs[role]) for role in roles}

    def products(seen: LayerCapture) -> Any:
        own = rows(seen, batch["at_tgt"])
        other = jax.tree.map(lambda x: x[layers[seen.layer]], src)
        return jax.tree.map(lambda x, y: (dot(x.T, y), jnp.stack([jnp.sum(x**2), jnp.sum(y**2)])), other, own)

    src = forward(
        settings[0],
        params[0],
        batch["tokens_src"],
        mask=batch["mask_src"],
        reduce=lambda seen: rows(seen, batch["at_src"]),
    ).reduced
    found = forward(settings[1], params[1], batch["tokens_tgt"], mask=batch["mask_tgt"], reduce=products).reduced
    (inputs, input_energy), (outputs, output_energy) = (_unzip(part) for part in found)
    added = CrossMoments(inputs, outputs, input_energy, output_energy, jnp.sum(valid))
    return added if totals is None else jax.tree.map(jnp.add, totals, added)


def _unzip(pairs: dict[str, tuple[jax.Array, jax.Array]]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}
