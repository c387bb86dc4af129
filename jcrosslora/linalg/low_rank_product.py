"""Norm and best low-rank approximation of a product B A of thin factors, without forming it."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot


def product_energy(b: jax.Array, a: jax.Array) -> jax.Array:
    """Return ||B A||_F^2 = tr(B'B A A') for b (O, K) and a (K, I), from two Gram matrices (K, K)."""
    chex.assert_equal(b.shape[1], a.shape[0])
    return jnp.sum(dot(b.T, b) * dot(a, a.T))


def recompress(b: jax.Array, a: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximate B A by the nearest product of at most `rank` in the Frobenius norm (Eckart-Young).

    QR of both factors, then the SVD of the small core R_b R_a'; the singular values are split evenly between the
    factors.

    Args:
        b: (O, K).
        a: (K, I).
        rank: new rank, at most min(O, K, I).

    Returns:
        b (O, rank), a (rank, I), and the share of the energy kept, in [0, 1] (1 for a zero product).
    """
    chex.assert_equal(b.shape[1], a.shape[0])
    q_b, r_b = jnp.linalg.qr(b)
    q_a, r_a = jnp.linalg.qr(a.T)
    u, s, vt = jnp.linalg.svd(dot(r_b, r_a.T), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    total = jnp.sum(s**2)
    kept = jnp.where(total > 0, jnp.sum(s[:rank] ** 2) / jnp.where(total > 0, total, 1), 1)
    return dot(q_b, u[:, :rank] * root), dot(root[:, None] * vt[:rank], q_a.T), kept
