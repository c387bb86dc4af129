"""Latent attention (DeepSeek V2, arXiv 2405.04434): keys and values are made of a small latent of the stream.

The cache holds the keys and values of all heads, not the latents.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcrosslora.architectures.blocks.block import Block, Linear, Norm
from jcrosslora.architectures.blocks.self_attention import SelfAttention, attended, grown, remembered
from jcrosslora.architectures.ops import rms_norm
from jcrosslora.architectures.ropes import apply_rope
from jcrosslora.architectures.run import KeysValues, KVCache, Run

_EPS = 1e-6  # of the norms of latents, whatever the configuration says of others
_KIND = "attention"


@dataclass(frozen=True)
class LatentAttention(Block):
    """Attention whose keys and values, and mostly its queries too, are made of latents.

    Attributes:
        heads: of queries, keys and values.
        rank: features of the latent of keys and values.
        plain: features of a head of queries and keys without positions.
        rotated: features of a head of queries and keys with positions, the same for keys of all heads.
        value: features of a head of values.
        query_rank: features of the latent of queries; None if these are made of the stream itself.
    """

    hidden: int
    heads: int
    rank: int
    plain: int
    rotated: int
    value: int
    query_rank: int | None = None

    LINEARS: ClassVar = (
        *(one for one in SelfAttention.LINEARS if one.role in ("q_proj", "o_proj")),
        Linear("q_a_proj", "self_attn.q_a_proj", "attn_in", "attn", "attn_q_a"),
        Linear("q_b_proj", "self_attn.q_b_proj", "q_latent", None, "attn_q_b", stream="inside"),
        Linear("kv_a_proj_with_mqa", "self_attn.kv_a_proj_with_mqa", "attn_in", "attn", "attn_kv_a_mqa"),
        Linear("kv_b_proj", "self_attn.kv_b_proj", "kv_latent", None, "attn_kv_b", stream="inside"),
    )
    GGUF_NORMS: ClassVar = {"q_a": "attn_q_a_norm", "kv_a": "attn_kv_a_norm"}

    @property
    def rotated_size(self) -> int:
        """Features of a head that have positions."""
        return self.rotated

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I)."""
        queries = self.heads * (self.plain + self.rotated)
        direct = {"q_proj": (queries, self.hidden)}
        if self.query_rank is not None:
            direct = {"q_a_proj": (self.query_rank, self.hidden), "q_b_proj": (queries, self.query_rank)}
        return direct | {
            "kv_a_proj_with_mqa": (self.rank + self.rotated, self.hidden),
            "kv_b_proj": (self.heads * (self.plain + self.value), self.rank),
            "o_proj": (self.hidden, self.heads * self.value),
        }

    def norms(self) -> dict[str, Norm]:
        """Return the norms of the latents."""
        of_queries = {} if self.query_rank is None else {"q_a": Norm("q_a", self.query_rank)}
        return of_queries | {"kv_a": Norm("kv_a", self.rank)}

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return the form of keys and values."""
        sizes = self.plain + self.rotated, self.value
        return {_KIND: KeysValues.form((batch, self.heads, length), sizes, dtype)}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the attention; see `Block.forward`."""
        rotation = run.of_rope(run.context.rotations)

        def rotated(x: jax.Array) -> jax.Array:
            return apply_rope(x, rotation, interleaved=run.settings.interleaved)

        latent = run.module("kv_a_proj_with_mqa", x)
        latent, shared = latent[..., : self.rank], latent[..., None, self.rank :]
        both = run.module("kv_b_proj", rms_norm(latent, run.layer.norms["kv_a"], _EPS))
        keys, values = jnp.split(both.reshape(*both.shape[:2], self.heads, -1), [self.plain], axis=-1)
        shared = jnp.broadcast_to(rotated(shared), (*keys.shape[:3], self.rotated))
        keys = jnp.concatenate([keys, shared], axis=-1).swapaxes(1, 2)
        values = values.swapaxes(1, 2)
        queries = self._queries(run, x)
        queries = queries.reshape(*queries.shape[:2], self.heads, -1)
        plain, turned = jnp.split(queries, [self.plain], axis=-1)
        queries = grown(run, jnp.concatenate([plain, rotated(turned)], axis=-1))
        keys, values, cache = remembered(run, _KIND, keys, values, cache)
        scale = (self.plain + self.rotated) ** -0.5 * run.settings.ropes[0].latent_scale
        return run.module("o_proj", attended(run, queries, keys, values, scale)), cache

    def _queries(self, run: Run, x: jax.Array) -> jax.Array:
        if self.query_rank is None:
            return run.module("q_proj", x)
        return run.module("q_b_proj", rms_norm(run.module("q_a_proj", x), run.layer.norms["q_a"], _EPS))
