"""The algorithm: matrix products inside chunks of Q tokens, the recurrence across them.

    y_l = Σ_{m < s <= l} M_ls dt_s x_s + L_lm h_m C_l        for m < l <= m+Q
    h_{m+Q} = L_{m+Q,m} h_m + Σ_{m < s <= m+Q} L_{m+Q,s} dt_s x_s B_sᵀ

with M and L of `quadratic`. The sequence is cut into T/Q chunks; each begins after some
token m, and the state h_m enters it. Inside a chunk the dual form computes every output
from the chunk's inputs and that one state, and leaves one state behind. Across chunks
those states obey the recurrence. A few chunks at once are computed side by side, and a
scan hands the state on.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 6.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssdlib._checks import check_size
from ssdlib.quadratic import (
    Decays,
    merge_state,
    read_inputs,
    read_state,
    split_state,
    whole_decay,
)
from ssdlib.recurrence import accumulator, check_ssd, log_decay, zero_state

__all__ = ["ssd_chunked"]

MOST_CHUNKS, MOST_TOKENS = 8, 1024  # of a span: what memory holds at once


def ssd_chunked(
    x: Float[Array, "b T H P"],
    dt: Float[Array, "b T H"],
    A: Float[Array, "H"] | Float[Array, "b T H"],
    B: Float[Array, "b T G N"],
    C: Float[Array, "b T G N"],
    D: Float[Array, "H"] | None = None,
    h0: Float[Array, "b H P N"] | None = None,
    chunk_size: int = 256,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P N"]]:
    """(y_c, h) = ssd_quadratic(x_c, dt_c, A, B_c, C_c, D, h) for chunk after chunk.

    Use it for training and prefill. Work is O(T Q) inside chunks plus O(T) for the
    states. Memory is O(T) for the inputs cut in chunks, and O(Q²) per head for the few
    chunks that are computed at once; a gradient computes those again, rather than keep
    them for all chunks. The result does not depend on Q. Any T fits: the last chunk is
    filled up with tokens of dt = 0, which leave the state as it is, exactly.

    A is one number per head, as in Mamba-2, or one per token and head: then dt and A
    set the size of a write and the decay independently (see `recurrences`). A = -inf at
    the first token of a document resets the state there, so that one row may hold
    several documents and each is computed as if it were alone.

    Dtypes as in `ssd_quadratic`. Raises ValueError if a shape does not fit or
    chunk_size is not an integer of at least 1. Returns (y, h_T). Source: arXiv
    2405.21060, section 6.
    """
    check_ssd(h0, x, dt, A, B, C, D)
    check_size("chunk_size", chunk_size)
    return ssd_in_spans(chunk_size, 1, x, dt, A, B, C, D, h0)


def ssd_in_spans(chunk_size, spans, x, dt, A, B, C, D=None, h0=None):
    """`ssd_chunked` unchecked, in a scan over at least so many spans of chunks."""
    (b, T, H, P), G, dtype = x.shape, B.shape[2], accumulator(x)
    Q = min(chunk_size, T)
    most = max(1, min(MOST_CHUNKS, MOST_TOKENS // Q))
    spans = max(spans, -(-T // (Q * most)))
    chunks = -(-T // (Q * spans))  # a span; the last one is filled up
    cut = partial(_split_chunks, n=chunks, Q=Q)
    h0 = zero_state(x, B) if h0 is None else jnp.asarray(h0, dtype)

    @jax.checkpoint  # a gradient keeps what enters a span, and computes it again
    def span(h, inputs):
        x, dt, decays, B, C = inputs
        x_, B, C = (jnp.asarray(v, dtype) for v in (x, B, C))
        # 1. Inside each chunk; 2. the state that it leaves.
        y, left = jax.vmap(read_inputs, 1, 1)(x_, dt, decays, B, C)
        # 3. The recurrence from chunk to chunk.
        a, entering = jax.vmap(partial(whole_decay, G=G), 1, 1)(decays), []
        for c in range(chunks):
            entering.append(h)
            h = a[:, c] * h + left[:, c]
        # 4. What each chunk reads from the state that enters it.
        entering = jnp.stack(entering, axis=1)
        y = y + jax.vmap(read_state, 1, 1)(decays, C, entering)
        if D is not None:
            y = y + jnp.asarray(D, dtype)[None, None, None, :, None] * x_
        return h, y.astype(x.dtype)

    dt, A = jnp.asarray(dt, dtype), jnp.asarray(A, dtype)
    decays = Decays.of(cut(log_decay(dt, A)))
    inputs = cut(x), cut(dt), decays, cut(B), cut(C)
    h, y = jax.lax.scan(span, split_state(h0, G), inputs)
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, H, P)[:, :T], merge_state(h)


def _split_chunks(v: Array, n: int, Q: int) -> Array:
    """(b, T, ...) -> (T/nQ, b, n, Q, ...), filled up with zeros to whole spans."""
    b, T = v.shape[:2]
    v = jnp.pad(v, [(0, 0), (0, -T % (n * Q))] + [(0, 0)] * (v.ndim - 2))
    return jnp.moveaxis(v.reshape(b, -1, n, Q, *v.shape[2:]), 1, 0)
