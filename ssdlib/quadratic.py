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

    Computed as differences of the two cumulative sums of `_exact_cumsum`, so that a
    weak decay after a strong one is not lost, for two subtractions an entry.
    A decay below exp(-128), or exp(-1024) in float64, counts as that: both are 0.
    O(T²) time and memory.
    """
    hi, lo = _exact_cumsum(log_a)
    S = (hi[..., :, None] - hi[..., None, :]) + (lo[..., :, None] - lo[..., None, :])
    S = jnp.where(_before(S), S, -jnp.inf)
    return jnp.where(jnp.eye(S.shape[-1], dtype=bool), 0, S)


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

    With the sums hi + lo of `_exact_cumsum`, L_ts = exp(hi_t - hi_s) e^lo_t e^-lo_s.
    The last two factors scale y_t and x_s, so that an entry of L costs one exact
    subtraction and one exponential, and its gradient only sums over rows and columns.
    On the diagonal L is 1, so that term joins the skip: D x_t + (C_t·B_t) dt_t x_t.

    Arithmetic and state are float32 (float64 if x is); y has the dtype of x.
    Raises ValueError if a shape does not fit. Source: arXiv 2405.21060, equation 16.
    """
    check_ssd(h0, x, dt, A, B, C, D)
    G, dtype = B.shape[-2], jnp.result_type(x)
    x, dt, A, B, C = to_accumulator(x, dt, A, B, C)
    x_h, dt_h, log_a = (  # heads first, time last: (b, G, R, P, T) and (b, G, R, T)
        split_heads(jnp.moveaxis(v, 1, -1), G, 1)
        for v in (x, dt, dt * jnp.broadcast_to(A, dt.shape))
    )
    hi, lo = _exact_cumsum(log_a)
    S = hi[..., :, None] - hi[..., None, :]
    M = jnp.where(_before(S), jnp.exp(S), 0)
    M = M * jnp.einsum("blgn,bsgn->bgls", C, B)[:, :, None]
    dtx = (dt_h * jnp.exp(-lo))[..., None, :] * x_h
    y = jnp.einsum("bgrls,bgrps->bgrpl", M, dtx)
    # From s to the end; no decay lies between the last token and the end.
    S = (hi[..., -1:] - hi) + (lo[..., -1:] - lo)
    to_end = jnp.exp(jnp.where(jnp.arange(S.shape[-1]) < S.shape[-1] - 1, S, 0))
    dtx = (dt_h * to_end)[..., None, :] * x_h
    h = jnp.einsum("bgrps,bsgn->bgrpn", dtx, B)

    if h0 is not None:
        h0 = split_heads(jnp.asarray(h0, h.dtype), G, 1)
        y = y + jnp.exp(hi)[..., None, :] * jnp.einsum("blgn,bgrpn->bgrpl", C, h0)
        h = h + jnp.exp(hi + lo)[..., -1, None, None] * h0
    y = y * jnp.exp(lo)[..., None, :]

    y, h = jnp.moveaxis(merge_heads(y, 1), -1, 1), merge_heads(h, 1)
    skip = split_heads(dt, G, 2) * jnp.einsum("blgn,blgn->blg", C, B)[..., None]
    skip = merge_heads(skip, 2)
    if D is not None:
        skip = skip + D[None, None].astype(y.dtype)
    return (y + skip[..., None] * x).astype(dtype), h


def _before(S: Array) -> Array:
    """True where s < t."""
    t, s = (jax.lax.broadcasted_iota(jnp.int32, S.shape, S.ndim - i) for i in (2, 1))
    return s < t


def _exact_cumsum(log_a: Array) -> tuple[Array, Array]:
    """Cumulative sums along the last axis as hi + lo: hi exact, |lo| at most about 1.

    The difference of two cumulative sums cancels: after a strong decay a weak one is
    lost. So each term is first split without error into a multiple of a unit and a
    rest. The unit is so coarse that sums of multiples, and their differences, are
    exact; the rest is so small that rounding its sums does not matter. Beyond 256
    terms (in float32) the sums of the rest would grow: there it is split once more, by
    a finer unit, and what those sums hold of whole units is handed to hi. The units do
    not depend on the data, so no sum depends on a later term. Gradients flow through
    lo. Source of the split: Rump, Ogita and Oishi 2008, "Accurate floating-point
    summation part I", section 3.
    """
    info, T = jnp.finfo(log_a.dtype), log_a.shape[-1]
    strongest = 2.0 ** (info.nexp - 1)  # exp(-128), in float64 exp(-1024), is 0
    shrink = 2.0 ** ((T - 1).bit_length() - info.nmant)  # T 2⁻²³
    unit = strongest * shrink

    def whole(v, unit):
        return jax.lax.stop_gradient(jnp.round(v / unit) * unit)

    log_a = jnp.maximum(log_a, -strongest)
    rest = log_a - (hi := whole(log_a, unit))
    if T * unit <= 1:  # so are the sums of the rest
        return jnp.cumsum(hi, axis=-1), jnp.cumsum(rest, axis=-1)
    rest = rest - (mid := whole(rest, unit * shrink))
    hi, mid, lo = jnp.cumsum(jnp.stack([hi, mid, rest]), axis=-1)
    carry = whole(mid, unit)
    return hi + carry, (mid - carry) + lo
