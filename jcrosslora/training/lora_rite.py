"""LoRA-RITE: an adaptive optimiser whose steps do not depend on how an update is split into its two factors."""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from jcrosslora.decoder import StackedAdapter, StackedFactors
from jcrosslora.errors import UsageError
from jcrosslora.linalg import dot, over_layers

# Eigenvalue of a Gram matrix of columns of unit length, as a share of the largest, below which columns are taken as
# dependent: float32 knows such a matrix to about 1e-7, so what lies below is noise.
_DEPENDENT = 1e-6


@flax.struct.dataclass
class Moments:
    """What is kept of one factor X (M, K), in the basis of the other one, Y (N, K).

    Attributes:
        first: float32 (M, K), mean of preconditioned gradients.
        second: float32 (K, K), mean of products of gradients.
        escaped: float32 scalar, what changes of the basis have taken from `second`.
        basis: float32 (N, K), the basis U of the columns of Y, see `_orthonormal`.
    """

    first: jax.Array
    second: jax.Array
    escaped: jax.Array
    basis: jax.Array


@flax.struct.dataclass
class LoraRiteState:
    """The state of `lora_rite`: of each role the moments of B and of A', stacked over L layers."""

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
    """Make the optimiser LoRA-RITE (Yen et al., ICLR 2025, arXiv 2410.20625) for a `StackedAdapter`.

    For X = B and Y = A', and likewise with the two exchanged, one step t from 1 on is

        Y = U R                                          U orthonormal
        G = dX R^-1                                      the unmagnified gradient; all G are clipped together
        P = U' U_old                                     (as P = U_t' U_t-1)
        V = d2 P V P' + (1 - d2) G'G / M                 second moment, (K, K)
        rho = d2 (rho + max_i(eig_i V_old - eig_i(P V_old P')))    escaped mass
        S = G (V + rho)^-1/2
        M = d1 M P' + (1 - d1) S                         first moment
        X <- X - rate (M R^-T + weight_decay X)

    with Adam's correction of the bias inside the decays, d = b (1 - b^(t-1)) / (1 - b^t). The product B A then takes
    the same way from B Q and Q^-1 A, for every invertible Q.

    Three things differ from the paper. A's step is taken behind B's: its M is turned into the basis of the new B and
    multiplied by the new R^-T. In the paper both use the old factors, and the change of the product has a term
    rate^2 M_B (R_B R_A')^-1 M_A', which has no bound where the product nearly loses a rank, as a moved adapter may;
    here the change is at most rate (|M_B| + |M_A|). R^-1 leaves out directions in which the columns depend on each
    other; so B = 0 is a valid start, from which the first step moves B alone. Weight decay is decoupled, as in AdamW.

    A schedule of the rate counts steps from 0; b1 and b2 are the decays of the two moments, eps is added to the root of
    the second, and clip is the most that the norm over all G can be.

    Raises:
        UsageError: from `init`, the parameters are not a `StackedAdapter`; from `update`, they are missing.
    """

    def init(params: Any) -> Any:
        _check_adapter(params)
        return LoraRiteState(jnp.zeros((), jnp.int32), {role: _first(one) for role, one in params.roles.items()})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _check_adapter(params)
        step = state.count.astype(jnp.float32) + 1
        decays = _corrected(b1, step), _corrected(b2, step)
        now = jnp.asarray(rate(state.count) if callable(rate) else rate, jnp.float32)
        # Layer by layer on a CPU: programs with many batched decompositions side by side hang there from rank 32 on.
        sides = {
            role: over_layers(_unmagnified, None, (params.roles[role], one)) for role, one in updates.roles.items()
        }
        all_gradients = jax.tree.leaves([gradients for gradients, _ in sides.values()])
        norm = jnp.sqrt(sum(jnp.sum(one**2) for one in all_gradients))
        # A gradient of zero is not clipped.
        share = jnp.minimum(1, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))

        def move(layer: Any, share: jax.Array) -> tuple[StackedFactors, tuple[Moments, Moments]]:
            factors, given, old = layer
            (by_b, by_a), ((basis_b, inverse_b), (basis_a, _)) = given
            moments = (
                _advance(old[0], basis_b, share * by_b, decays, eps),
                _advance(old[1], basis_a, share * by_a, decays, eps),
            )
            return _change(factors, moments, inverse_b, now, weight_decay), moments

        moved = {
            role: over_layers(move, None, (params.roles[role], sides[role], state.moments[role]), share)
            for role in sides
        }
        changes = StackedAdapter({role: change for role, (change, _) in moved.items()})
        return changes, LoraRiteState(state.count + 1, {role: moments for role, (_, moments) in moved.items()})

    return optax.GradientTransformation(init, update)


def _check_adapter(params: Any) -> None:
    if not isinstance(params, StackedAdapter):
        msg = f"lora-rite was given {type(params).__name__} to train: wanted the factors of a LoRA; use adamw"
        raise UsageError(msg)


def _first(factors: StackedFactors) -> tuple[Moments, Moments]:
    """Make moments of zeros for factors a (L, K, I) and b (L, O, K)."""
    chex.assert_rank([factors.a, factors.b], 3)
    layers, rank, columns = factors.a.shape
    rows = factors.b.shape[1]

    def zeros(own: int, other: int) -> Moments:
        shapes = (layers, own, rank), (layers, rank, rank), (layers,), (layers, other, rank)
        return Moments(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    return zeros(rows, columns), zeros(columns, rows)


def _corrected(decay: float, step: jax.Array) -> jax.Array:
    """Return the decay at a step from 1 on with which a mean that starts at zero needs no correction of its bias."""
    return decay * (1 - decay ** (step - 1)) / (1 - decay**step)


def _orthonormal(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factor Y (N, K) = U R; returns U (N, K) and R^-1 (K, K) with U = Y R^-1.

    Both are zero in directions in which columns depend on others. U comes from eigenvectors of Gram matrices, which
    are (K, K): products and small decompositions in place of a QR of each tall factor.
    """
    lengths = jnp.linalg.norm(factor, axis=0)
    # Columns of unit length, so that a small column beside a large one is not taken as dependent.
    lengths = jnp.where(lengths > 0, lengths, 1)
    unit = factor / lengths
    inverse = _independent_root(unit)
    # A Gram matrix squares the condition number, so one pass leaves columns that are only nearly orthonormal.
    inverse = dot(inverse, _independent_root(dot(unit, inverse)))
    return dot(unit, inverse), inverse / lengths[:, None]


def _independent_root(columns: jax.Array) -> jax.Array:
    """Return (C'C)^-1/2 (K, K) of columns C (N, K), 0 in directions in which they depend on each other."""
    values, vectors = jnp.linalg.eigh(_symmetric(dot(columns.T, columns)))
    kept = values > _DEPENDENT * values[-1]
    roots = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return dot(vectors * roots, vectors.T)


def _unmagnified(layer: tuple[StackedFactors, StackedFactors], _: None) -> tuple[Any, Any]:
    """Return G of B and of A' for the factors and their gradient, and for each of them U and R^-1 of the other one."""
    factors, gradient = layer
    for_b, for_a = _orthonormal(factors.a.T), _orthonormal(factors.b)
    return (dot(gradient.b, for_b[1]), dot(gradient.a.T, for_a[1])), (for_b, for_a)


def _advance(old: Moments, basis: jax.Array, gradient: jax.Array, decays: Any, eps: float) -> Moments:
    """Turn the moments into a new basis (N, K), and add a gradient G (M, K)."""
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
    """Return what is added to the factors: first B moves, then A in the basis of the new B."""
    of_b, of_a = moments
    by_b = -rate * (dot(of_b.first, inverse.T) + decay * factors.b)
    basis, inverse = _orthonormal(factors.b + by_b)
    turned = dot(of_a.first, dot(basis.T, of_a.basis).T)
    return StackedFactors(-rate * (dot(inverse, turned.T) + decay * factors.a), by_b)


def _inverse_root(second: jax.Array, escaped: jax.Array, eps: float) -> jax.Array:
    """Return ((V + rho)^1/2 + eps)^-1, for V (K, K)."""
    values, vectors = jnp.linalg.eigh(second)
    # An eigenvalue below the rounding of the largest is noise, and may be negative.
    noise = jnp.finfo(values.dtype).eps * values.shape[0] * values[-1]
    roots = jnp.sqrt(jnp.maximum(jnp.maximum(values, noise), 0) + escaped)
    return dot(vectors / (roots + eps), vectors.T)


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2
