"""The dual: the same map as one masked matrix product, attention without softmax.

    y = M (dt x),   M = L ∘ (C Bᵀ),   L_ts = a_t a_{t-1} ... a_{s+1} for s <= t, else 0

with the decays a_t = exp(dt_t A). L is the 1-semiseparable mask.
Source: Dao and Gu 2024 (arXiv 2405.21060), equations 6 to 8 and 16.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssdlib._checks import check_floats
from ssdlib.recurrence import (
    accumulator,
    check_ssd,
    log_decay,
    merge_heads,
    split_heads,
    to_accumulator,
)

__all__ = ["decay_mask", "segsum", "ssd_quadratic"]

RESET = -1024.0  # its exp is 0 in every dtype: nothing is left of the past


def segsum(log_a: Float[Array, "*batch T"]) -> Float[Array, "*batch T T"]:
    """All segment sums: S_ts = Σ_{s < j <= t} log_a_j for s <= t, else -inf.

    The difference of two cumulative sums is quick but cancels: after a strong decay
    a weak one is lost. Here each term is first split without error, log_a = hi + lo,
    with hi a multiple of a power of two so coarse that sums of hi are exact, and lo
    so small that rounding its sums does not matter. The error of
    (Σhi_t - Σhi_s) + (Σlo_t - Σlo_s) is then one rounding of S plus at most
    T 2⁻⁴⁸ Σ|log_a|, for two subtractions an entry. Source of the split: Rump, Ogita
    and Oishi 2008, "Accurate floating-point summation part I", section 3.

    Entries of at most -1024, whose exp is 0 in every dtype, are cut there, and what was
    cut is summed apart: so sums beside them are as exact as without them. -inf, and
    what is near the lowest float, make -inf of the sums over it. Either, at the first
    token of a document, keeps it from all documents before.

    O(T²) time and memory. Gradients flow as through the plain sums, and none through
    the diagonal, which is the constant 0. Arithmetic is float32 (float64 if log_a is).
    Raises ValueError if log_a is not floating point.
    """
    check_floats("log_a", log_a)
    log_a = jnp.asarray(log_a)
    sums = log_a.astype(accumulator(log_a))
    infinite = sums < jnp.finfo(sums.dtype).min / 2**20
    cut = jnp.maximum(sums, RESET)
    rest = jnp.where(infinite, 0, jnp.minimum(sums - cut, 0))
    S = _differences(*_exact_sums(cut))
    S = S + jnp.where(jnp.isneginf(S), 0, _differences(*_exact_sums(rest)))
    resets = jnp.cumsum(infinite, axis=-1, dtype=jnp.int32)
    joined = resets[..., :, None] == resets[..., None, :]
    return jnp.where(joined, S, -jnp.inf).astype(log_a.dtype)


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
    decays = Decays.of(log_decay(dt, A))
    y, h = read_inputs(x, dt, decays, B, C)
    if h0 is not None:
        h0 = split_state(jnp.asarray(h0, h.dtype), G)
        y = y + read_state(decays, C, h0)
        h = h + whole_decay(decays, G) * h0
    if D is not None:
        y = y + D[None, None, :, None].astype(y.dtype) * x
    return y.astype(dtype), merge_state(h)


# --- the parts of the dual, that `ssd_chunked` puts together for many chunks ----------
#
# Their arrays are of the accumulator dtype. States are (b, G, N, R, P) here, with R
# heads a group. Each product leaves its result in the order of its factors, heads
# first, so that no large factor is written transposed.


class Decays(NamedTuple):
    """The decays of T tokens: all that the dual needs of A.

    hi, lo: Σ_{j <= t} log a_j in two parts, (*batch, H, T); see `_exact_sums`.
    from_start: a_1 ... a_t, (*batch, T, H): what is left at t of the state before.
    to_end: a_{t+1} ... a_T, (*batch, T, H): what is left at T of a write at t.
    """

    hi: Array
    lo: Array
    from_start: Array
    to_end: Array

    @classmethod
    def of(cls, log_a: Float[Array, "*batch T H"]) -> "Decays":
        """Sums along the last axis: a TPU's compiler takes seconds for others.

        Logarithms of one sign are summed, so nothing cancels in them or in their
        gradients. One below `RESET` is taken as that: its exp is 0 as well.
        """
        log_a = jnp.maximum(jnp.swapaxes(log_a, -1, -2), RESET)
        hi, lo = _exact_sums(log_a)
        later = jnp.concatenate([log_a[..., 1:], jnp.zeros_like(log_a[..., :1])], -1)
        later = jax.lax.cumsum(later, axis=log_a.ndim - 1, reverse=True)
        ends = (jnp.swapaxes(jnp.exp(v), -1, -2) for v in (hi + lo, later))
        return cls(hi, lo, *ends)


def read_inputs(x, dt, decays: Decays, B, C) -> tuple[Array, Array]:
    """y = (L ∘ C Bᵀ)(dt x) and the state that x leaves, Bᵀ(to_end dt x).

    Lᵀ = exp(S) exp(-lo_s) in two factors: the mask exp(S) is a table with s in its
    rows, and exp(-lo_s) is a column, which goes to dt x.
    """
    G = B.shape[-2]
    M = split_heads(mask(decays.hi, decays.lo), G, 1)
    M = M * jnp.einsum("bsgn,blgn->bgsl", B, C)[:, :, None]
    within = jnp.exp(-jnp.swapaxes(decays.lo, -1, -2))
    within, to_end = ((w * dt)[..., None] * x for w in (within, decays.to_end))
    y = jnp.einsum("bgrsl,bsgrp->bgrlp", M, split_heads(within, G, 2))
    h = jnp.einsum("bsgn,bsgrp->bgnrp", B, split_heads(to_end, G, 2))
    return jnp.swapaxes(merge_heads(y, 1), 1, 2), h


def read_state(decays: Decays, C, h: Float[Array, "b G N R P"]) -> Array:
    """What the state h before the first token adds to y: from_start (C h)."""
    read = jnp.swapaxes(jnp.einsum("blgn,bgnrp->bglrp", C, h), 1, 2)
    return decays.from_start[..., None] * merge_heads(read, 2)


def whole_decay(decays: Decays, G: int) -> Float[Array, "b G 1 R 1"]:
    """a_1 ... a_T: what is left at T of the state before."""
    return split_heads(decays.from_start[:, -1], G, 1)[:, :, None, :, None]


def split_state(h: Float[Array, "b H P N"], G: int) -> Float[Array, "b G N R P"]:
    return jnp.moveaxis(split_heads(h, G, 1), -1, 2)


def merge_state(h: Float[Array, "b G N R P"]) -> Float[Array, "b H P N"]:
    return merge_heads(jnp.moveaxis(h, 2, -1), 1)


def mask(hi: Float[Array, "*batch T"], lo: Float[Array, "*batch T"]) -> Array:
    """exp(S), S_st = (hi_t - hi_s) + lo_t for s < t, lo_t for s = t, else -inf.

    Without lo_s, whose turn comes in `read_inputs`: on a TPU the price of the table is
    the number of vectors that vary from row to row, and hi_s alone is half of it.
    """
    S = (hi[..., None, :] - hi[..., :, None]) + lo[..., None, :]
    t, s = _places(S)
    return jnp.exp(jnp.where(s < t, S, jnp.where(s == t, lo[..., None, :], -jnp.inf)))


def _differences(hi: Array, lo: Array) -> Array:
    """S_ts = (hi_t - hi_s) + (lo_t - lo_s) for s < t, 0 for s = t, else -inf."""
    S = (hi[..., :, None] - hi[..., None, :]) + (lo[..., :, None] - lo[..., None, :])
    s, t = _places(S)
    return jnp.where(s < t, S, jnp.where(s == t, 0.0, -jnp.inf))


def _places(S: Array) -> tuple[Array, Array]:
    """The column and the row of each entry of a table."""
    shape = (1,) * (S.ndim - 2) + S.shape[-2:]
    at = partial(jax.lax.broadcasted_iota, jnp.int32, shape)
    return at(S.ndim - 1), at(S.ndim - 2)


def _exact_sums(log_a: Array) -> tuple[Array, Array]:
    """Cumulative sums along the last axis as hi + lo, those of hi exact.

    The coarse part is a multiple of one unit, and what is left at most half a unit,
    2⁻²³ of the total: so exp(lo) is near 1 in a chunk, and finite in a long row. The
    slope of the sum is given to hi, whose differences are exact; lo is a constant.
    """
    bits = jnp.finfo(log_a.dtype).nmant
    total = jax.lax.stop_gradient(jnp.sum(jnp.abs(log_a), axis=-1, keepdims=True))
    exponent = jnp.maximum(jnp.frexp(total)[1], -64)  # total < 2**exponent
    unit = jnp.ldexp(jnp.ones_like(total), exponent - bits)
    hi = jax.lax.stop_gradient(jnp.round(log_a / unit) * unit)
    lo = jnp.cumsum(log_a - hi, axis=-1)
    still = jax.lax.stop_gradient(lo)
    carry = jnp.round(still / unit) * unit
    return jnp.cumsum(hi, axis=-1) + carry + (lo - still), still - carry
