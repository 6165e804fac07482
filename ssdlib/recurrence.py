"""The definition: a state space layer is a linear recurrence with a scalar decay.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ        (state,   P x N per head)
    y_t = h_t C_t + D x_t                            (read-out, P per head)

Every other form in this library is another way to compute this map.
Source: Dao and Gu 2024 (arXiv 2405.21060), equations 1, 2 and section 6.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssdlib._checks import check_length, check_shapes

__all__ = ["ssd_recurrent", "ssd_step"]


def ssd_step(
    h: Float[Array, "b H P N"],
    x_t: Float[Array, "b H P"],
    dt_t: Float[Array, "b H"],
    A: Float[Array, "H"] | Float[Array, "b H"],
    B_t: Float[Array, "b G N"],
    C_t: Float[Array, "b G N"],
    D: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "b H P"], Float[Array, "b H P N"]]:
    """One token: h ← exp(dt A) h + dt x Bᵀ, then y = h C + D x. Returns (y_t, h).

    Use it to decode: the cost, 5 b H P N FLOPs and one read and write of h, does
    not depend on how many tokens came before. Each group's B is repeated to its
    H/G heads: H N numbers, little beside the H P N of the state, which XLA on a CPU
    then writes in place, in one fusion. C is not: the heads of a group are read out
    together, as one (H/G P x N) matrix by one vector. A is one number per head, as in
    Mamba-2, or one per token and head.

    The arithmetic and the state are float32 (float64 if x is); y has the
    dtype of x. Raises ValueError if a shape does not fit.
    Source: arXiv 2405.21060, equation 1, with the scalar A of section 6.
    """
    check_ssd(h, x_t, dt_t, A, B_t, C_t, D, step=True)
    (b, H, P, N), G = h.shape, B_t.shape[1]
    x, dt, A, B, C, h = to_accumulator(x_t, dt_t, A, B_t, C_t, h)
    B = jnp.repeat(B, H // G, axis=1)
    a = jnp.exp(log_decay(dt, A))

    h = a[..., None, None] * h + jnp.einsum("bhp,bhn->bhpn", dt[..., None] * x, B)
    rows = h.reshape(b, G, H // G * P, N)  # all that one group's C reads
    y = jnp.einsum("bgqn,bgn->bgq", rows, C).reshape(b, H, P)
    if D is not None:
        y = y + D[None, :, None].astype(y.dtype) * x
    return y.astype(jnp.result_type(x_t)), h


def ssd_recurrent(
    x: Float[Array, "b T H P"],
    dt: Float[Array, "b T H"],
    A: Float[Array, "H"] | Float[Array, "b T H"],
    B: Float[Array, "b T G N"],
    C: Float[Array, "b T G N"],
    D: Float[Array, "H"] | None = None,
    h0: Float[Array, "b H P N"] | None = None,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P N"]]:
    """`ssd_step` over a sequence, one token after another. Returns (y, h_T).

    Use it as the reference: it is the definition, and the only form whose error does
    not depend on a chunk length. O(T) work, but T dependent steps with no large matrix
    product, so it leaves matrix units idle. Errors and dtypes as in `ssd_step`.
    """
    check_ssd(h0, x, dt, A, B, C, D)
    if h0 is None:
        h0 = zero_state(x, B)

    def step(h, inputs):
        x_t, dt_t, B_t, C_t, A_t = (*inputs, A)[:5]
        y_t, h = ssd_step(h, x_t, dt_t, A_t, B_t, C_t, D)
        return h, y_t

    time_first = tuple(jnp.moveaxis(v, 1, 0) for v in per_token(x, dt, A, B, C))
    h, y = jax.lax.scan(step, jnp.asarray(h0, accumulator(x)), time_first)
    return jnp.moveaxis(y, 0, 1), h


# --- shared by the three forms -------------------------------------------------------


def accumulator(x) -> jnp.dtype:
    """Decays, states and sums are float32, or float64 if x, an array or dtype, is."""
    double = jnp.result_type(x) == jnp.float64
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def to_accumulator(*arrays: Array) -> tuple[Array, ...]:
    """Cast all arrays to the accumulator dtype of the first."""
    return tuple(jnp.asarray(v, accumulator(arrays[0])) for v in arrays)


def log_decay(dt: Array, A: Array) -> Array:
    """log a = dt A. With an A for each token, -inf there resets the state.

    Such an A is kept finite, since 0 times infinity is no number, neither where a
    padded token has dt = 0 nor in the gradient of dt.
    """
    if A.ndim > 1:
        A = jnp.maximum(A, jnp.finfo(A.dtype).min)
    return dt * jnp.broadcast_to(A, dt.shape)


def split_heads(v: Array, G: int, axis: int) -> Array:
    """Split the head axis: H -> (G, R), where R = H/G heads share a group's B, C."""
    shape = v.shape
    return v.reshape(*shape[:axis], G, shape[axis] // G, *shape[axis + 1 :])


def merge_heads(v: Array, axis: int) -> Array:
    """Inverse of `split_heads`: (G, R) -> H."""
    shape = v.shape
    return v.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def per_token(x, dt, A, B, C) -> tuple[Array, ...]:
    """What a scan over tokens cuts up: A is among it, last, if it has a token axis."""
    return (x, dt, B, C) if jnp.ndim(A) == 1 else (x, dt, B, C, A)


def zero_state(x: Array, B: Array) -> Array:
    """The state before the first token: zeros of shape (b, H, P, N)."""
    b, _, H, P = x.shape
    return jnp.zeros((b, H, P, B.shape[-1]), accumulator(x))


def check_ssd(h, x, dt, A, B, C, D, step=False) -> None:
    """Raise ValueError unless the arguments of an SSD form fit together."""
    t = "" if step else "T "
    _t = "_t" if step else ""
    arrays = {
        f"x{_t}": (x, f"b {t}H P"),
        f"dt{_t}": (dt, f"b {t}H"),
        "A": (A, f"b {t}H" if np.ndim(A) == np.ndim(dt) else "H"),
        f"B{_t}": (B, f"b {t}G N"),
        f"C{_t}": (C, f"b {t}G N"),
    }
    if D is not None:
        arrays["D"] = (D, "H")
    if step or h is not None:
        arrays["h" if step else "h0"] = (h, "b H P N")
    sizes = check_shapes(**arrays)
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(
            f"B{_t}: G = {sizes['G']} groups must divide the H = {sizes['H']} heads"
        )
    if not step:
        check_length("x", sizes)
