"""Other models through the same form: their inputs are renamed, no loop is added.

    h_t = a_t h_{t-1} + v_t k_tᵀ,   y_t = h_t q_t        a_t one number per head

is `ssd_chunked` with x = v, dt = 1, A = log a, B = k, C = q. Each model below is a
choice of a, k, q and v around that one call, plus what it does before and after. A
function takes any number of tokens and returns a state that the next call goes on
from; one token takes `ssd_step` and costs the same however many came before.
Keys and queries may be shared by groups of heads, (b T G N), as in Mamba-2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib._checks import check_is, check_length, check_shapes
from ssdlib.chunked import ssd_chunked
from ssdlib.recurrence import accumulator, ssd_step, to_accumulator, zero_state

__all__ = [
    "MLSTMState",
    "Mamba3State",
    "RetNetState",
    "linear_attention",
    "mamba3",
    "mlstm",
    "retention",
    "simple_gla",
]


def simple_gla(
    q: Float[Array, "b T G N"],
    k: Float[Array, "b T G N"],
    v: Float[Array, "b T H P"],
    log_a: Float[Array, "b T H"] | Float[Array, "H"],
    h0: Float[Array, "b H P N"] | None = None,
    chunk_size: int = 256,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P N"]]:
    """h_t = a_t h_{t-1} + v_t k_tᵀ and y_t = h_t q_t: (y, h_T).

    log_a per token is simple GLA; log_a per head, a constant, is Lightning attention.
    No scale is applied to q: most models divide it by √N first. Arithmetic is float32
    (float64 if v is), y has the dtype of v. Raises ValueError if a shape does not fit.
    Source: Yang et al. 2023 (arXiv 2312.06635) with a scalar gate; Qin et al. 2024
    (arXiv 2401.04658), where log_a = -s for the slope s of a head.
    """
    _check(q, k, v, log_a=(log_a, "H" if np.ndim(log_a) == 1 else "b T H"))
    return _ssd(q, k, v, log_a, h0, chunk_size)


def linear_attention(
    q: Float[Array, "b T G N"],
    k: Float[Array, "b T G N"],
    v: Float[Array, "b T H P"],
    h0: Float[Array, "b H P1 N"] | None = None,
    normalize: bool = False,
    chunk_size: int = 256,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P1 N"]]:
    """y_t = Σ_{s<=t} (q_t · k_s) v_s, divided by Σ_{s<=t} q_t · k_s if normalize.

    q and k are features, φ(query) and φ(key). The sum that normalizes obeys the same
    recurrence as the values, with 1 in place of v: it is one more row of the state,
    which is then (b, H, P+1, N). Features must keep that sum from zero.
    Dtypes and errors as in `simple_gla`. Source: Katharopoulos et al. 2020
    (arXiv 2006.16236), section 3.
    """
    _check(q, k, v)
    no_decay = jnp.zeros(v.shape[2], accumulator(v))
    if not normalize:
        return _ssd(q, k, v, no_decay, h0, chunk_size)
    y, h = _ssd(q, k, _with_ones(v), no_decay, h0, chunk_size)
    return (y[..., :-1] / y[..., -1:]).astype(v.dtype), h


class RetNetState(NamedTuple):
    """h (b H P N), and how many tokens it has read: the next one's position."""

    h: Float[Array, "b H P N"]
    position: Int[Array, ""]


def retention(
    q: Float[Array, "b T G N"],
    k: Float[Array, "b T G N"],
    v: Float[Array, "b T H P"],
    state: RetNetState | None = None,
    chunk_size: int = 256,
) -> tuple[Float[Array, "b T H P"], RetNetState]:
    """y_t = Σ_{s<=t} γ^(t-s) (Θ_t q_t · Θ_s k_s) v_s,  γ = 1 - 2^(-5-i) for head i.

    Θ_t turns the pair j of channels by t θ_j, with θ_j from 1 to 1/10000: positions
    enter by their difference only. Decay and angles do not depend on the input.
    The retention of RetNet without its projections, group norm and gate. N is even.
    Dtypes and errors as in `simple_gla`. Source: Sun et al. 2023 (arXiv 2307.08621),
    section 2; θ as in its code, microsoft/torchscale.
    """
    _check(q, k, v)
    T, (H, N) = v.shape[1], (v.shape[2], q.shape[-1])
    if N % 2:
        raise ValueError(f"q: N = {N} channels; rotation needs an even number")
    check_is("state", state, RetNetState, type(None))
    h, position = (None, jnp.int32(0)) if state is None else state
    dtype = accumulator(v)
    log_gamma = jnp.log1p(-jnp.exp2(-5 - jnp.arange(H, dtype=dtype)))
    theta = 10_000.0 ** -jnp.linspace(0, 1, N // 2, dtype=dtype)
    at = position + jnp.arange(T, dtype=jnp.int32)
    angle = at.astype(dtype)[:, None] * theta[None]
    q, k = (_rotate(w, angle[None, :, None]) for w in to_accumulator(q, k))
    y, h = _ssd(q, k, v, log_gamma, h, chunk_size)
    return y, RetNetState(h, position + T)


class MLSTMState(NamedTuple):
    """Numerator and normalizer in one array, both divided by exp(m).

    h: (b, H, P+1, N); rows 0 to P-1 are the matrix memory, row P is the vector n.
    m: (b, H), the running maximum.
    """

    h: Float[Array, "b H P1 N"]
    m: Float[Array, "b H"]


def mlstm(
    q: Float[Array, "b T G N"],
    k: Float[Array, "b T G N"],
    v: Float[Array, "b T H P"],
    log_i: Float[Array, "b T H"],
    log_f: Float[Array, "b T H"],
    state: MLSTMState | None = None,
    chunk_size: int = 256,
) -> tuple[Float[Array, "b T H P"], MLSTMState]:
    """y_t = h_t q_t / max(|n_t · q_t|, 1) for gates i = exp(log_i), f = exp(log_f):

        h_t = f_t h_{t-1} + i_t v_t k_tᵀ,    n_t = f_t n_{t-1} + i_t k_t

    log_i is any real number, so i may exceed what a float holds. All is kept divided
    by exp(m_t), with m_t = max(log f_t + m_{t-1}, log i_t): then the decay
    exp(log f_t + m_{t-1} - m_t) and the write exp(log i_t - m_t) are at most 1. y does
    not depend on m, so no gradient need flow through it, and m may be rounded freely.
    Where n · q cancels, y is ill-conditioned in any program. log_f <= 0. No scale is
    applied: the paper divides k by √N. Dtypes and errors as in `simple_gla`.
    Source: Beck et al. 2024 (arXiv 2405.04517), section 2: the stabilizer and the
    mLSTM.
    """
    gates = {"log_i": (log_i, "b T H"), "log_f": (log_f, "b T H")}
    _check(q, k, v, **gates)
    dtype = v.dtype
    v, log_i, log_f = to_accumulator(v, log_i, log_f)
    check_is("state", state, MLSTMState, type(None))
    h, m0 = (None, jnp.zeros_like(log_i[:, 0])) if state is None else state

    F = jnp.cumsum(log_f, axis=1)
    m = F + jnp.maximum(m0[:, None], jax.lax.cummax(log_i - F, axis=1))
    m = jax.lax.stop_gradient(m)
    before = jnp.concatenate([m0[:, None], m[:, :-1]], axis=1)
    write = jnp.exp(log_i - m)[..., None] * _with_ones(v)
    y, h = _ssd(q, k, write, log_f + (before - m), h, chunk_size)
    y = y[..., :-1] / jnp.maximum(jnp.abs(y[..., -1:]), jnp.exp(-m)[..., None])
    return y.astype(dtype), MLSTMState(h, m[:, -1])


class Mamba3State(NamedTuple):
    """h, and what the trapezoid's next step needs: the last angle, B (turned) and x."""

    h: Float[Array, "b H P N"]
    angle: Float[Array, "b H S"]
    B: Float[Array, "b H N"]
    x: Float[Array, "b H P"]


def mamba3(
    x: Float[Array, "b T H P"],
    dt: Float[Array, "b T H"],
    A: Float[Array, "b T H"] | Float[Array, "H"],
    lam: Float[Array, "b T H"],
    B: Float[Array, "b T H N"],
    C: Float[Array, "b T H N"],
    angle: Float[Array, "b T H S"],
    state: Mamba3State | None = None,
    chunk_size: int = 256,
) -> tuple[Float[Array, "b T H P"], Mamba3State]:
    """The trapezoidal rule and a turning state, in one call. With U_t = x_t B_tᵀ,

        h_t = a_t h_{t-1} Θ_tᵀ + (1-λ_t) dt_t a_t U_{t-1} Θ_tᵀ + λ_t dt_t U_t,
        y_t = h_t C_t,    a_t = exp(dt_t A_t)

    Here Θ_t turns the first S pairs of channels by the S numbers `angle_t`. Turning
    B and C back by all angles so far takes Θ out of the loop. Then g_t = h_t +
    (1-λ_{t+1}) dt_{t+1} U_t obeys the plain recurrence g_t = a_t g_{t-1} + (its factor
    of U_t) U_t, and y_t = g_t C_t - (1-λ_{t+1}) dt_{t+1} (B_t · C_t) x_t.
    lam = 1 and angle = 0 is Mamba-2. One input and one output per head (SISO).
    Dtypes and errors as in `simple_gla`. Source: Lahoti et al. 2026 (arXiv 2603.15569):
    its exponential-trapezoidal recurrence and its rotary form of complex states.
    """
    _check_mamba3(x, dt, A, lam, B, C, angle)
    dtype = x.dtype
    x, dt, A, lam, B, C, angle = to_accumulator(x, dt, A, lam, B, C, angle)
    check_is("state", state, Mamba3State, type(None))
    if state is None:
        past = (jnp.zeros_like(v[:, 0]) for v in (angle, B, x))
        state = Mamba3State(zero_state(x, B), *past)

    angle = state.angle[:, None] + jnp.cumsum(angle, axis=1)
    B, C = _rotate(B, -angle), _rotate(C, -angle)
    left = (1 - lam) * dt  # step t's weight for the input before it
    h0 = state.h + jnp.einsum("bh,bhp,bhn->bhpn", left[:, 0], state.x, state.B)
    after = jnp.pad(left[:, 1:], ((0, 0), (0, 1), (0, 0)))  # left of the next step
    scale = lam * dt + after
    y, h = _ssd(
        C, B, scale[..., None] * x, dt * jnp.broadcast_to(A, dt.shape), h0, chunk_size
    )
    y = y - (after * jnp.einsum("bthn,bthn->bth", B, C))[..., None] * x
    turn = jnp.remainder(angle[:, -1], 2 * jnp.pi)
    return y.astype(dtype), Mamba3State(h, turn, B[:, -1], x[:, -1])


# --- shared ---------------------------------------------------------------------------


def _ssd(q, k, v, log_a, h0, chunk_size):
    """The one call that every model makes: one token steps, more run in chunks."""
    v_, q, k, log_a = to_accumulator(v, q, k, log_a)
    h0 = zero_state(v_, k) if h0 is None else h0
    one = jnp.ones(v.shape[:3], v_.dtype)
    if v.shape[1] == 1:
        log_a = log_a if log_a.ndim == 1 else log_a[:, 0]
        y, h = ssd_step(h0, v_[:, 0], one[:, 0], log_a, k[:, 0], q[:, 0])
        y = y[:, None]
    else:
        y, h = ssd_chunked(v_, one, log_a, k, q, h0=h0, chunk_size=chunk_size)
    return y.astype(v.dtype), h


def _with_ones(v):
    """One more channel that holds 1: what is summed there is the normalizer."""
    v = v.astype(accumulator(v))
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _rotate(v, angle):
    """Turn channels (2j, 2j+1) of v by angle_j; channels without an angle stay."""
    S = angle.shape[-1]
    pairs = v[..., : 2 * S].reshape(*v.shape[:-1], S, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = (jnp.broadcast_to(f(angle), even.shape) for f in (jnp.cos, jnp.sin))
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([turned.reshape(*v.shape[:-1], -1), v[..., 2 * S :]], -1)


def _check(q, k, v, **more) -> None:
    """Raise ValueError unless queries, keys, values and gates fit together."""
    attention = {"v": (v, "b T H P"), "k": (k, "b T G N"), "q": (q, "b T G N")}
    sizes = check_shapes(**attention, **more)
    check_length("v", sizes)
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(
            f"k: G = {sizes['G']} groups must divide the H = {sizes['H']} heads of v"
        )


def _check_mamba3(x, dt, A, lam, B, C, angle) -> None:
    """Raise ValueError unless the arguments of `mamba3` fit together."""
    per_head = {"C": (C, "b T H N"), "B": (B, "b T H N"), "x": (x, "b T H P")}
    A_letters = "H" if np.ndim(A) == 1 else "b T H"
    gates = {"dt": (dt, "b T H"), "lam": (lam, "b T H"), "A": (A, A_letters)}
    check_length("x", check_shapes(**per_head, **gates, angle=(angle, "b T H S")))
    S = angle.shape[-1]
    if 2 * S > B.shape[-1]:
        raise ValueError(f"angle: S = {S}; it must be at most N/2 = {B.shape[-1] / 2}")
