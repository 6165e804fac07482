"""The algorithm: matrix products inside chunks of Q tokens, the recurrence across them.

Cut the sequence into T/Q chunks. Inside a chunk the dual form computes every output
from the chunk's inputs and the one state that enters it, and leaves one state behind.
Across chunks those states obey the recurrence, so a scan hands them on.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssdlib.quadratic import decay_mask, ssd_quadratic
from ssdlib.recurrence import accumulator, check_ssd, per_token, zero_state

__all__ = ["ssd_chunked"]

SPAN = 8  # chunks at once, where not one by one


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
    h0 = zero_state(x, B) if h0 is None else jnp.asarray(h0, accumulator(x))
    inputs = per_token(x, dt, A, B, C)

    def scan(chunks_at_once: int):
        def span(h, cut):
            x_c, dt_c, B_c, C_c, A_c = (*cut, A)[:5]
            return _span(h, x_c, dt_c, A_c, B_c, C_c, D)

        def run(h0, *inputs):
            c = min(chunks_at_once, -(-T // Q))
            h, y = jax.lax.scan(span, h0, tuple(_cut(v, c, Q) for v in inputs))
            return jnp.moveaxis(y, 0, 1).reshape(b, -1, H, P)[:, :T], h

        return run

    # A CPU works from its caches: one chunk at a time. Wide chips want many at once.
    return jax.lax.platform_dependent(h0, *inputs, cpu=scan(1), default=scan(SPAN))


def _span(h, x, dt, A, B, C, D):
    """c chunks of Q tokens, (b, c, Q, ...), from the state h: (h, y)."""
    b, c = x.shape[:2]
    x, dt, B, C = (v.reshape(b * c, *v.shape[2:]) for v in (x, dt, B, C))
    A = A if A.ndim == 1 else A.reshape(dt.shape)
    if c == 1:
        y, h = ssd_quadratic(x, dt, A, B, C, D, h)
        return h, y[:, None]

    # What each chunk adds to the state, and the decay from chunk border to border.
    _, added = ssd_quadratic(x, dt, A, B, C)
    added = added.reshape(b, c, *h.shape[1:])
    log_a = jnp.asarray(dt * jnp.broadcast_to(A, dt.shape), h.dtype)
    log_a = jnp.moveaxis(log_a.sum(1).reshape(b, c, -1), 1, -1)
    L = decay_mask(jnp.pad(log_a, [(0, 0), (0, 0), (1, 0)]))
    from_h, from_chunk = L[..., 0], L[..., 1:]

    # The state that enters each chunk; then every chunk on its own.
    enter = jnp.einsum("bhcz,bzhpn->bchpn", from_chunk[..., :-1, :], added)
    enter = enter + jnp.moveaxis(from_h[..., :-1], -1, 1)[..., None, None] * h[:, None]
    y, _ = ssd_quadratic(x, dt, A, B, C, D, enter.reshape(b * c, *h.shape[1:]))

    # The state that goes on, in full precision whatever that of the products.
    weight = jnp.moveaxis(from_chunk[..., -1, :], -1, 1)[..., None, None]
    h = from_h[..., -1, None, None] * h + jnp.sum(weight * added, axis=1)
    return h, y.reshape(b, c, *y.shape[1:])


def _cut(v: Array, c: int, Q: int) -> Array:
    """(b, T, ...) -> (spans, b, c, Q, ...), filled up with zeros to whole spans."""
    b, T = v.shape[:2]
    v = jnp.pad(v, [(0, 0), (0, -T % (c * Q))] + [(0, 0)] * (v.ndim - 2))
    return jnp.moveaxis(v.reshape(b, -1, c, Q, *v.shape[2:]), 1, 0)
