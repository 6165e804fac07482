"""The dual: the same map as one masked matrix product, attention without softmax.

    y = M (dt x),   M = L ∘ (C Bᵀ),   L_ts = a_t a_{t-1} ... a_{s+1} for s <= t, else 0

with the decays a_t = exp(dt_t A). L is the 1-semiseparable mask.
Source: Dao and Gu 2024 (arXiv 2405.21060), equations 6 to 8 and 16.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssdlib.recurrence import check_ssd, merge_heads, split_heads, to_accumulator

__all__ = ["decay_mask", "segsum", "ssd_quadratic"]


def segsum(log_a: Float[Array, "*batch T"]) -> Float[Array, "*batch T T"]:
    """All segment sums: S_ts = Σ_{s < j <= t} log_a_j for s <= t, else -inf.

    The difference of two cumulative sums is quick but cancels: after a strong decay
    a weak one is lost. Here each term is first split without error, log_a = hi + lo,
    with hi a multiple of a power of two so coarse that sums of hi are exact, and lo
    so small that rounding its sums does not matter. The error of
    (Σhi_t - Σhi_s) + (Σlo_t - Σlo_s) is then one rounding of S plus at most
    T 2⁻⁴⁸ Σ|log_a|, for two subtractions an entry. Source of the split: Rump, Ogita
    and Oishi 2008, "Accurate floating-point summation part I", section 3.

    O(T²) time and memory. Gradients flow as through the plain sums, and none through
    the diagonal, which is the constant 0.
    """
    hi, lo = _split_exactly(log_a)
    hi, lo = jnp.cumsum(hi, axis=-1), jnp.cumsum(lo, axis=-1)
    hi = hi[..., :, None] - hi[..., None, :]
    lo = lo[..., :, None] - lo[..., None, :]
    t, s = (jax.lax.broadcasted_iota(jnp.int32, hi.shape, hi.ndim - i) for i in (2, 1))
    return jnp.where(s < t, hi + lo, jnp.where(s == t, 0.0, -jnp.inf))


def _split_exactly(v: Array) -> tuple[Array, Array]:
    """v = hi + lo exactly, such that any sum of hi along the last axis is exact."""
    bits = jnp.finfo(v.dtype).nmant
    total = jax.lax.stop_gradient(jnp.sum(jnp.abs(v), axis=-1, keepdims=True))
    exponent = jnp.maximum(jnp.frexp(total)[1], -64)  # total < 2**exponent
    unit = jnp.ldexp(jnp.ones_like(total), exponent - bits)
    hi = jax.lax.stop_gradient(jnp.round(v / unit) * unit)
    return hi, v - hi


def decay_mask(log_a: Float[Array, "*batch T"]) -> Float[Array, "*batch T T"]:
    """The 1-semiseparable mask L = exp(segsum(log_a)): the decay from s to t.

    Lower triangular with ones on the diagonal. arXiv 2405.21060, equation 6.
    """
    return jnp.exp(segsum(log_a))


def ssd_quadratic(
    x: Float[Array, "b T H P"],
    dt: Float[Array, "b T H"],
    A: Float[Array, "H"] | Float[Array, "b T H"],
    B: Float[Array, "b T G N"],
    C: Float[Array, "b T G N"],
    D: Float[Array, "H"] | None = None,
    h0: Float[Array, "b H P N"] | None = None,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P N"]]:
    """y = (L ∘ C Bᵀ)(dt x) + D x, plus what h0 contributes. Returns (y, h_T).

    Use it for short sequences and inside chunks: O(T²) work, all of it in large
    matrix products. Scores C Bᵀ are computed once per group and shared by its heads.

    Arithmetic and state are float32 (float64 if x is); y has the dtype of x.
    Raises ValueError if a shape does not fit. Source: arXiv 2405.21060, equation 16.
    """
    check_ssd(h0, x, dt, A, B, C, D)
    G, dtype = B.shape[-2], jnp.result_type(x)
    x, dt, A, B, C = to_accumulator(x, dt, A, B, C)
    dtx = split_heads(dt[..., None] * x, G, 2)
    log_a = dt * jnp.broadcast_to(A, dt.shape)
    log_a = split_heads(jnp.moveaxis(log_a, 1, 2), G, 1)

    L = decay_mask(log_a)
    M = L * jnp.einsum("blgn,bsgn->bgls", C, B)[:, :, None]
    y = jnp.einsum("bgrls,bsgrp->blgrp", M, dtx)
    to_end = jnp.moveaxis(L[..., -1, :], -1, 1)
    h = jnp.einsum("bsgrp,bsgn->bgrpn", to_end[..., None] * dtx, B)

    if h0 is not None:
        h0 = split_heads(jnp.asarray(h0, h.dtype), G, 1)
        from_start = jnp.moveaxis(jnp.exp(jnp.cumsum(log_a, axis=-1)), -1, 1)
        y = y + from_start[..., None] * jnp.einsum("blgn,bgrpn->blgrp", C, h0)
        h = h + from_start[:, -1][..., None, None] * h0

    y, h = merge_heads(y, 2), merge_heads(h, 1)
    if D is not None:
        y = y + D[None, None, :, None].astype(y.dtype) * x
    return y.astype(dtype), h
