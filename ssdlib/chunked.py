"""The algorithm: matrix products inside chunks of Q tokens, the recurrence across them.

Cut the sequence into T/Q chunks. Inside a chunk the dual form computes every output
from the chunk's inputs and the one state that enters it, and leaves one state behind.
Across chunks those states obey the recurrence, so a scan hands them on.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssdlib.quadratic import ssd_quadratic
from ssdlib.recurrence import accumulator, check_ssd, per_token, zero_state

__all__ = ["ssd_chunked"]


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
    states; memory is O(T) for the inputs cut in chunks, and O(Q²) per head. The result
    does not depend on chunk_size. Any T fits: the last chunk is filled up with tokens
    of dt = 0, which leave the state as it is, exactly.

    A is one number per head, as in Mamba-2, or one per token and head: then dt and A
    set the size of a write and the decay independently (see `recurrences`).

    Dtypes as in `ssd_quadratic`. Raises ValueError if a shape does not fit or
    chunk_size is below 1. Returns (y, h_T). Source: arXiv 2405.21060, section 6.
    """
    check_ssd(h0, x, dt, A, B, C, D)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}; it must be at least 1")
    b, T, H, P = x.shape
    Q = min(chunk_size, T)
    if h0 is None:
        h0 = zero_state(x, B)

    def chunk(h, inputs):
        x_c, dt_c, B_c, C_c, A_c = (*inputs, A)[:5]
        y_c, h = ssd_quadratic(x_c, dt_c, A_c, B_c, C_c, D, h)
        return h, y_c

    chunks = tuple(_split_chunks(v, Q) for v in per_token(x, dt, A, B, C))
    h, y = jax.lax.scan(chunk, jnp.asarray(h0, accumulator(x)), chunks)
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, H, P)[:, :T], h


def _split_chunks(v: Array, Q: int) -> Array:
    """(b, T, ...) -> (T/Q, b, Q, ...), filled up with zeros to a whole last chunk."""
    b, T = v.shape[:2]
    v = jnp.pad(v, [(0, 0), (0, -T % Q)] + [(0, 0)] * (v.ndim - 2))
    return jnp.moveaxis(v.reshape(b, -1, Q, *v.shape[2:]), 1, 0)
