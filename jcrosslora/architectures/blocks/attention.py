"""Softmax attention, with the variants of the families, and latent attention."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.blocks.block import Block, Linear, Link, Norm, Tensor
from jcrosslora.architectures.ops import einsum, rms_norm, soft_cap
from jcrosslora.architectures.ropes import apply_rope
from jcrosslora.architectures.run import KeysValues, KVCache, Run, append_layer, last_of_kind

# Per head; over all heads together; per head after the rotation; or that without a gain, only in layers with positions.
HeadNorms = Literal["head", "whole", "rotated", "unit"]
_LATENT_EPS = 1e-6  # for the norms of latents; the configuration states it for other norms


def _linears(group: str) -> tuple[Linear, ...]:
    def reader(role: str, gguf: str, site: str = "attn_in") -> Linear:
        path = f"self_attn.{role.removeprefix('kv_shared_')}"
        return Linear(group + role, path, group + site, "attn", gguf)

    return (
        reader("q_proj", "attn_q"),
        *([] if group else [Linear("qg_proj", "self_attn.q_proj", "attn_in", "attn", "attn_q")]),
        reader("kv_shared_q_proj", "attn_q", "kv_shared_attn_in"),
        reader("k_proj", "attn_k"),
        reader("v_proj", "attn_v"),
        Linear(
            f"{group}o_proj", "self_attn.o_proj", f"{group}attn_out_in", "attn_post", "attn_output", stream="writes"
        ),
    )


@dataclass(frozen=True)
class SelfAttention(Block):
    """Softmax attention from the normed stream to the output of o_proj.

    Attributes:
        norm: how queries and keys are normalised; None if they are not.
        gated: whether one module returns the queries and gates on the attention output.
        keys_are_values: whether the keys, before their norm, are the values.
        value_norm: whether the heads of values are normalised, without a gain.
        sinks: whether heads may attend to nothing.
        shares_keys: whether it reads the keys and values of the last earlier layer that has any of its kind.
        group: prefix of its roles: "global_" in layers whose heads differ from those of other layers, else nothing.
    """

    hidden: int
    heads: int
    kv_heads: int
    size: int
    norm: HeadNorms | None = None
    gated: bool = False
    keys_are_values: bool = False
    value_norm: bool = False
    sinks: bool = False
    shares_keys: bool = False
    group: Literal["", "global_"] = ""

    LINEARS: ClassVar = (*_linears(""), *_linears("global_"))
    GGUF_NORMS: ClassVar = {"q": "attn_q_norm", "k": "attn_k_norm"}

    @property
    def _kind(self) -> str:
        return f"{self.group}attention"

    @property
    def shared_kind(self) -> str | None:
        """The kind of the keys and values that it reads from an earlier layer, None if it has its own."""
        return self._kind if self.shares_keys else None

    @property
    def rotated_size(self) -> int:
        """Features of a head, all of which may be rotated."""
        return self.size

    @property
    def mixed_size(self) -> int:
        """Features of the queries."""
        return self.heads * self.size

    def shapes(self) -> dict[str, tuple[int, int]]:
        queries, keys, group = self.heads * self.size, (self.kv_heads * self.size, self.hidden), self.group
        found = {f"{group}o_proj": (self.hidden, queries)}
        if self.shares_keys:
            return {f"{group}kv_shared_q_proj": (queries, self.hidden)} | found
        found |= {"qg_proj": (2 * queries, self.hidden)} if self.gated else {f"{group}q_proj": (queries, self.hidden)}
        found |= {f"{group}k_proj": keys}
        return found if self.keys_are_values else found | {f"{group}v_proj": keys}

    def norms(self) -> dict[str, Norm]:
        """Return the norms of queries and keys; a "unit" norm has no gain and is not listed."""
        whole = self.norm == "whole"
        sizes = {"q": self.size * (self.heads if whole else 1), "k": self.size * (self.kv_heads if whole else 1)}
        return {
            f"{self.group}{name}": Norm(name, size)
            for name, size in sizes.items()
            if self.norm not in (None, "unit") and not (name == "k" and self.shares_keys)
        }

    def links(self) -> tuple[Link, ...]:
        """Add the link from values to o_proj, through all query heads of a key-value head."""
        if self.shares_keys or self.keys_are_values or self.value_norm:
            return super().links()
        values = np.arange(self.kv_heads * self.size).reshape(self.kv_heads, self.size)
        rows = np.repeat(values, self.heads // self.kv_heads, axis=0).reshape(-1)
        return (*super().links(), Link(f"{self.group}v_proj", (f"{self.group}o_proj",), rows))

    def tensors(self) -> dict[str, Tensor]:
        """Return the attention sinks, one score per head."""
        return {"sinks": Tensor("self_attn.sinks", (self.heads,))} if self.sinks else {}

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        if self.shares_keys:
            return {}
        return {self._kind: KeysValues.form((batch, self.kv_heads, length), (self.size, self.size), dtype)}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        queries, gate = self._queries(run, x)
        queries = self._placed(run, "q", queries)
        if self.shares_keys:
            assert cache is not None
            keys, values = last_of_kind(cache, self._kind)
        else:
            keys = run.module(f"{self.group}k_proj", x)
            values = self._split(keys if self.keys_are_values else run.module(f"{self.group}v_proj", x))
            if self.value_norm:
                values = rms_norm(values, jnp.ones(values.shape[-1]), run.settings.eps)
            keys, values = self._placed(run, "k", keys).swapaxes(1, 2), values.swapaxes(1, 2)
            cache, keys, values = append_layer(cache, run, self._kind, keys, values)
        mixed = _attended(run, _grown(run, queries), keys, values, run.settings.attn_scale)
        mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
        return run.module(f"{self.group}o_proj", mixed), cache

    def _queries(self, run: Run, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return queries and, in gated attention, the gates on the output, (B, T, heads * D) each."""
        if not self.gated:
            return run.module(f"{self.group}{'kv_shared_' if self.shares_keys else ''}q_proj", x), None
        both = run.module("qg_proj", x)
        queries, gate = jnp.split(both.reshape(*both.shape[:2], -1, 2 * self.size), 2, axis=-1)
        return queries.reshape(*both.shape[:2], -1), gate.reshape(*both.shape[:2], -1)

    def _placed(self, run: Run, name: str, x: jax.Array) -> jax.Array:
        """Split queries or keys into heads, normalise them and apply their positions."""
        place = f"{self.group}{name}"
        if self.norm == "whole":
            x = run.norm(place, x)
        x = self._split(x)
        if self.norm == "head":
            x = run.norm(place, x)
        x = apply_rope(x, run.of_rope(run.context.rotations), interleaved=run.settings.interleaved)
        if self.norm == "unit":
            return _unit(run, x)
        return run.norm(place, x) if self.norm == "rotated" else x

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.size)


@dataclass(frozen=True)
class LatentAttention(Block):
    """Latent attention (DeepSeek V2, arXiv 2405.04434): keys, values and mostly queries are projected from latents.

    The cache holds the keys and values of all heads, not the latents.

    Attributes:
        heads: number of heads of queries, keys and values.
        rank: features of the latent of keys and values.
        plain: features of a head of queries and keys without positions.
        rotated: features of a head of queries and keys with positions; all heads share them for keys.
        value: features of a head of values.
        query_rank: features of the latent of queries; None if queries are projected from the stream itself.
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
        of_queries = {} if self.query_rank is None else {"q_a": Norm("q_a", self.query_rank)}
        return of_queries | {"kv_a": Norm("kv_a", self.rank)}

    def links(self) -> tuple[Link, ...]:
        """Add the links from the norms of latents, and from values to o_proj."""
        of_queries = () if self.query_rank is None else (Link("q_a", ("q_b_proj",)),)
        values = np.arange(self.heads * (self.plain + self.value)).reshape(self.heads, -1)[:, self.plain :]
        of_values = Link("kv_b_proj", ("o_proj",), values.reshape(-1))
        return (*super().links(), *of_queries, Link("kv_a", ("kv_b_proj",)), of_values)

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        sizes = self.plain + self.rotated, self.value
        return {"attention": KeysValues.form((batch, self.heads, length), sizes, dtype)}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        rotation = run.of_rope(run.context.rotations)

        def rotated(x: jax.Array) -> jax.Array:
            return apply_rope(x, rotation, interleaved=run.settings.interleaved)

        latent = run.module("kv_a_proj_with_mqa", x)
        latent, shared = latent[..., : self.rank], latent[..., None, self.rank :]
        both = run.module("kv_b_proj", rms_norm(latent, run.layer.norms["kv_a"], _LATENT_EPS))
        keys, values = jnp.split(both.reshape(*both.shape[:2], self.heads, -1), [self.plain], axis=-1)
        shared = jnp.broadcast_to(rotated(shared), (*keys.shape[:3], self.rotated))
        keys = jnp.concatenate([keys, shared], axis=-1).swapaxes(1, 2)
        values = values.swapaxes(1, 2)
        queries = self._queries(run, x)
        queries = queries.reshape(*queries.shape[:2], self.heads, -1)
        plain, turned = jnp.split(queries, [self.plain], axis=-1)
        queries = _grown(run, jnp.concatenate([plain, rotated(turned)], axis=-1))
        cache, keys, values = append_layer(cache, run, "attention", keys, values)
        scale = (self.plain + self.rotated) ** -0.5 * run.settings.ropes[0].latent_scale
        return run.module("o_proj", _attended(run, queries, keys, values, scale)), cache

    def _queries(self, run: Run, x: jax.Array) -> jax.Array:
        if self.query_rank is None:
            return run.module("q_proj", x)
        return run.module("q_b_proj", rms_norm(run.module("q_a_proj", x), run.layer.norms["q_a"], _LATENT_EPS))


def _unit(run: Run, x: jax.Array) -> jax.Array:
    """Normalise heads (B, T, heads, D) without a gain; return x in a layer without positions."""
    ropes, normed = run.settings.ropes, rms_norm(x, jnp.ones(x.shape[-1]), run.settings.eps)
    if all(ropes[index].turns for index in run.layer.ropes):
        return normed
    return jnp.where(jnp.asarray([rope.turns for rope in ropes])[run.layer.rope], normed, x)


def _grown(run: Run, queries: jax.Array) -> jax.Array:
    """Multiply queries (B, T, heads, D) by the factor of their positions, if they grow."""
    if run.context.growths is None:
        return queries
    growth = run.of_rope(run.context.growths)[:, :, None, None]
    return (queries.astype(jnp.float32) * growth).astype(queries.dtype)


def _attended(run: Run, queries: jax.Array, keys: jax.Array, values: jax.Array, scale: float) -> jax.Array:
    """Let queries (B, T, heads, D) attend to keys (B, kv_heads, S, D) and values (B, kv_heads, S, E).

    Returns:
        (B, T, heads * E) in the dtype of the queries; the products use the dtype of the keys. A query without a
        visible key gets the mean of all values.
    """
    batch, length, heads, size = queries.shape
    groups, slots, visible = heads // keys.shape[1], keys.shape[2], _visible(run)
    # The query heads of one key-value head become rows of one matrix.
    grouped = queries.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, -1, groups * length, size).astype(keys.dtype)
    scores = einsum("bktd,bksd->bkts", rows, keys) * scale
    scores = soft_cap(scores, run.settings.attn_soft_cap).reshape(batch, -1, groups, length, slots)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores, run.tensors.get("sinks")).astype(values.dtype)
    mixed = einsum("bkts,bksd->bktd", weights.reshape(batch, -1, groups * length, slots), values)
    mixed = mixed.reshape(batch, -1, groups, length, values.shape[-1]).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * values.shape[-1]).astype(queries.dtype)


def _visible(run: Run) -> jax.Array:
    """Return which keys each query attends to, bool (B, T, S): those in its window, up to its own position."""
    queries, keys = run.context.query_positions[:, :, None], run.context.key_positions[:, None, :]
    window, chunked = run.layer.window, run.settings.chunked_windows
    near = queries // window == keys // window if chunked else queries - keys < window
    visible = (keys >= 0) & (keys <= queries) & near
    return visible if run.context.seen is None else visible & run.context.seen


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Return the softmax of scores (B, kv_heads, groups, T, S); with a sink the weights sum to less than 1."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.reshape(scores.shape[1], scores.shape[2], 1, 1)
    largest = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    exponentials = jnp.exp(scores - largest)
    return exponentials / (jnp.sum(exponentials, axis=-1, keepdims=True) + jnp.exp(sinks - largest))
