"""LoRA-RITE: an adaptive optimiser whose steps of B A do not depend on its factorisation (arXiv 2410.20625)."""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from jcrosslora.decoder import StackedAdapter, StackedFactors
from jcrosslora.errors import UsageError
from jcrosslora.linalg import dot, over_layers

# Columns of unit length count as dependent if an eigenvalue of their Gram matrix is below this share of the largest:
# float32 rounds such a matrix to about 1e-7, so smaller eigenvalues are noise.
_DEPENDENT = 1e-6


@flax.struct.dataclass
class Moments:
    """Moments of one factor X (M, K), in the basis of the other factor Y (N, K).

    Attributes:
        first: float32 (M, K), mean of preconditioned gradients.
        second: float32 (K, K), mean of G'G / M.
        escaped: float32 scalar, mass that changes of basis removed from `second`.
        basis: float32 (N, K), orthonormal basis of the columns of Y.
    """

    first: jax.Array
    second: jax.Array
    escaped: jax.Array
    basis: jax.Array


@flax.struct.dataclass
class LoraRiteState:
    """State of `lora_rite`: for each role, the moments of B and of A', stacked over L layers."""

    count: jax.Array
    moments: dict[str, tuple[Moments, Moments]]


def lora_rite(
    rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Make the optimiser LoRA-RITE (Yen et al., ICLR 2025, arXiv 2410.20625, algorithm 1) for a `StackedAdapter`.

    For X = B and Y = A', and with the two exchanged, one step t, counted from 1, is

        Y = U R                                          U orthonormal
        G = dX R^-1                                      the unmagnified gradient; all G are clipped together
        P = U' U_old                                     change of basis
        V = d2 P V P' + (1 - d2) G'G / M                 second moment, (K, K)
        rho = d2 (rho + max_i(eig_i V_old - eig_i(P V_old P')))    escaped mass
        S = G (V + rho)^-1/2
        M = d1 M P' + (1 - d1) S                         first moment
        X <- X - rate (M R^-T + weight_decay X)

    Adam's correction of the bias is inside the decays, d = b (1 - b^(t-1)) / (1 - b^t). For every invertible Q, the
    factors B Q and Q^-1 A give the same products B A.

    Two things differ from the paper. A steps after B, in the basis of the new B: with both on the old factors, the
    change of B A has a term rate^2 M_B (R_B R_A')^-1 M_A', which has no bound where the product nearly loses a rank.
    And R^-1 is zero in directions in which columns depend on each other, so that training can start at B = 0: the first
    step moves B alone. Weight decay is decoupled, as in AdamW.

    Args:
        rate: learning rate, or a schedule of it that counts steps from 0.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        clip: largest global norm of the unmagnified gradients.

    Raises:
        UsageError: in `init` and `update`, if the parameters are not a `StackedAdapter`.
    """

    def init(params: Any) -> Any:
        _check_adapter(params)
        return LoraRiteState(jnp.zeros((), jnp.int32), {role: _zeros(one) for role, one in params.roles.items()})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _check_adapter(params)
        step = state.count.astype(jnp.float32) + 1
        decays = _corrected(b1, step), _corrected(b2, step)
        now = jnp.asarray(rate(state.count) if callable(rate) else rate, jnp.float32)
        # Layer by layer on a CPU: programs with many batched decompositions hang there from rank 32 on.
        sides = {
            role: over_layers(_unmagnified, None, (params.roles[role], one)) for role, one in updates.roles.items()
        }
        norm = jnp.sqrt(sum(jnp.sum(one**2) for one in jax.tree.leaves([pair for pair, _ in sides.values()])))
        share = jnp.minimum(1, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))  # 1 for a gradient of zero

        def move(layer: Any, share: jax.Array) -> tuple[StackedFactors, tuple[Moments, Moments]]:
            factors, ((by_b, by_a), ((basis_b, inverse), basis_a)), (of_b, of_a) = layer
            moments = (
                _advance(of_b, basis_b, share * by_b, decays, eps),
                _advance(of_a, basis_a, share * by_a, decays, eps),
            )
            return _change(factors, moments, inverse, now, weight_decay), moments

        moved = {
            role: over_layers(move, None, (params.roles[role], sides[role], state.moments[role]), share)
            for role in sides
        }
        changes = StackedAdapter({role: change for role, (change, _) in moved.items()})
        return changes, LoraRiteState(state.count + 1, {role: moments for role, (_, moments) in moved.items()})

    return optax.GradientTransformation(init, update)


def _check_adapter(params: Any) -> None:
    if not isinstance(params, StackedAdapter):
        raise UsageError(f"lora-rite: expected the factors of a LoRA, got {type(params).__name__}; use adamw")


def _zeros(factors: StackedFactors) -> tuple[Moments, Moments]:
    """Make moments of zeros for factors a (L, K, I) and b (L, O, K)."""
    chex.assert_rank([factors.a, factors.b], 3)
    layers, rank, columns = factors.a.shape
    rows = factors.b.shape[1]

    def zeros(size: int, other: int) -> Moments:
        shapes = (layers, size, rank), (layers, rank, rank), (layers,), (layers, other, rank)
        return Moments(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    return zeros(rows, columns), zeros(columns, rows)


def _corrected(decay: float, step: jax.Array) -> jax.Array:
    """Return the decay at a step, counted from 1, with Adam's bias correction included."""
    return decay * (1 - decay ** (step - 1)) / (1 - decay**step)


def _orthonormal(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factor Y (N, K) = U R; return U (N, K) and R^-1 (K, K) with U = Y R^-1.

    Both are zero in directions in which columns depend on each other. U comes from eigenvectors of Gram matrices
    (K, K): matrix products and small decompositions instead of a QR of each tall factor.
    """
    lengths = jnp.linalg.norm(factor, axis=0)
    lengths = jnp.where(lengths > 0, lengths, 1)
    unit = factor / lengths  # a small column next to a large one must not count as dependent
    inverse = _independent_root(unit)
    # A Gram matrix squares the condition number: after one pass the columns are only nearly orthonormal.
    inverse = dot(inverse, _independent_root(dot(unit, inverse)))
    return dot(unit, inverse), inverse / lengths[:, None]


def _independent_root(columns: jax.Array) -> jax.Array:
    """Compute (C'C)^-1/2 (K, K) of columns C (N, K), 0 in directions in which they are dependent."""
    values, vectors = jnp.linalg.eigh(_symmetric(dot(columns.T, columns)))
    kept = values > _DEPENDENT * values[-1]
    roots = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return dot(vectors * roots, vectors.T)


def _unmagnified(layer: tuple[StackedFactors, StackedFactors], _: None) -> tuple[Any, Any]:
    """Compute G of B and of A', then U and R^-1 of A', and U of B, from the factors and their gradient."""
    factors, gradient = layer
    (of_a, inverse_a), (of_b, inverse_b) = _orthonormal(factors.a.T), _orthonormal(factors.b)
    return (dot(gradient.b, inverse_a), dot(gradient.a.T, inverse_b)), ((of_a, inverse_a), of_b)


def _advance(old: Moments, basis: jax.Array, gradient: jax.Array, decays: Any, eps: float) -> Moments:
    """Change the basis of the moments to `basis` (N, K), and add a gradient G (M, K)."""
    d1, d2 = decays
    turn = dot(basis.T, old.basis)
    second = _symmetric(dot(dot(turn, old.second), turn.T))
    lost = jnp.max(jnp.linalg.eigvalsh(old.second) - jnp.linalg.eigvalsh(second))
    escaped = d2 * (old.escaped + jnp.maximum(lost, 0))
    second = d2 * second + (1 - d2) * _symmetric(dot(gradient.T, gradient)) / gradient.shape[0]
    step = dot(gradient, _inverse_root(second, escaped, eps))
    return Moments(d1 * dot(old.first, turn.T) + (1 - d1) * step, second, escaped, basis)


def _change(
    factors: StackedFactors, moments: tuple[Moments, Moments], inverse: jax.Array, rate: jax.Array, decay: float
) -> StackedFactors:
    """Compute the step of B, then the step of A in the basis of the new B."""
    of_b, of_a = moments
    by_b = -rate * (dot(of_b.first, inverse.T) + decay * factors.b)
    basis, inverse = _orthonormal(factors.b + by_b)
    turned = dot(of_a.first, dot(basis.T, of_a.basis).T)
    return StackedFactors(-rate * (dot(inverse, turned.T) + decay * factors.a), by_b)


def _inverse_root(second: jax.Array, escaped: jax.Array, eps: float) -> jax.Array:
    """Compute ((V + rho)^1/2 + eps)^-1 of V (K, K)."""
    values, vectors = jnp.linalg.eigh(second)
    # An eigenvalue below the rounding of the largest is noise, and may be negative.
    noise = jnp.finfo(values.dtype).eps * values.shape[0] * values[-1]
    roots = jnp.sqrt(jnp.maximum(jnp.maximum(values, noise), 0) + escaped)
    return dot(vectors / (roots + eps), vectors.T)


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2
