"""Where the decay is not one number per head: what still goes through the form.

    GLA:       h_t = h_{t-1} diag(a_t) + v_t k_tᵀ                a decay per channel
    DeltaNet:  h_t = h_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ   a matrix as decay

A diagonal decay can be moved into k and q over short stretches. A matrix that is not
diagonal cannot: its products within a chunk take a triangular solve, which stays
outside of the form. Both functions take any number of tokens and carry the state.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssdlib._checks import check_length, check_shapes, check_size
from ssdlib.beyond.scalar_decay import simple_gla
from ssdlib.chunked import _split_chunks
from ssdlib.quadratic import ssd_quadratic
from ssdlib.recurrence import to_accumulator, zero_state

__all__ = ["delta_net", "gla"]


def gla(
    q: Float[Array, "b T H N"],
    k: Float[Array, "b T H N"],
    v: Float[Array, "b T H P"],
    log_a: Float[Array, "b T H N"],
    h0: Float[Array, "b H P N"] | None = None,
    sub_chunk: int = 16,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P N"]]:
    """h_t = h_{t-1} diag(a_t) + v_t k_tᵀ and y_t = h_t q_t: (y, h_T).

    Write log a_t = s_t + d_t, with s_t the mean over channels. The form handles s_t at
    any strength. The rest goes into the keys and queries of a sub-chunk, k exp(-E) and
    q exp(E), with E the sums of d since it began. So |E| must stay below 80 (700 in
    float64): beyond, where exp(-E) is about to overflow, the result is NaN. The error
    grows with |E| as well, since exp(E) is rounded by 2⁻²⁴ |E|. With GLA's gates,
    log_sigmoid / 16, sixteen tokens stay far below.
    Work per token is that of `ssd_chunked` with Q = sub_chunk, in smaller products.

    Arithmetic is float32 (float64 if v is), y has the dtype of v. Raises ValueError if
    a shape does not fit. Source: Yang et al. 2023 (arXiv 2312.06635), section 4.
    """
    h0, (q, k, v, log_a), dtype = _prepare(q, k, v, h0, log_a=(log_a, "b T H N"))
    s = jnp.mean(log_a, axis=-1)
    d = log_a - s[..., None]
    if v.shape[1] == 1:
        h = h0 * jnp.exp(d[:, 0])[:, :, None]
        return _one_step(q, k, v, s, h, dtype)

    limit = math.log(jnp.finfo(v.dtype).max) - 8  # else exp(E) is 0 before NaN appears

    def body(h, inputs):
        q_c, k_c, v_c, s_c, d_c = inputs
        E = jnp.cumsum(d_c, axis=1)
        E = jnp.where(jnp.abs(E) < limit, E, jnp.nan)
        one, k_c, q_c = jnp.ones_like(s_c), k_c * jnp.exp(-E), q_c * jnp.exp(E)
        y_c, h = ssd_quadratic(v_c, one, s_c, k_c, q_c, h0=h)
        return h * jnp.exp(E[:, -1])[:, :, None], y_c

    return _scan(body, h0, (q, k, v, s, d), sub_chunk, "sub_chunk", dtype)


def delta_net(
    q: Float[Array, "b T H N"],
    k: Float[Array, "b T H N"],
    v: Float[Array, "b T H P"],
    beta: Float[Array, "b T H"],
    h0: Float[Array, "b H P N"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "b T H P"], Float[Array, "b H P N"]]:
    """h_t = h_{t-1} + w_t k_tᵀ,  w_t = β_t (v_t - h_{t-1} k_t),  y_t = h_t q_t.

    The write w_t depends on the state, so the map from v to y is not a masked product
    of known keys and queries. Within a chunk that starts at h, the writes W (Q rows)
    obey a triangular system, and once it is solved, the form takes them as its values:

        (I + tril(β K Kᵀ, -1)) W = β (V - K hᵀ)

    The solve costs Q P FLOPs a token and head, in Q dependent steps.
    Keys should have length 1 and 0 <= β <= 2, or h may grow without bound.
    Dtypes and errors as in `gla`. Source: Yang et al. 2024 (arXiv 2406.06484),
    section 3.
    """
    h0, (q, k, v, beta), dtype = _prepare(q, k, v, h0, beta=(beta, "b T H"))
    if v.shape[1] == 1:
        known = jnp.einsum("bhpn,bthn->bthp", h0, k)
        w = beta[..., None] * (v - known)
        return _one_step(q, k, w, jnp.zeros_like(beta), h0, dtype)

    def body(h, inputs):
        q_c, k_c, v_c, beta_c = inputs
        scores = jnp.einsum("blhn,bshn->bhls", k_c, k_c)
        beta_c = jnp.moveaxis(beta_c, 1, 2)[..., None]
        system = jnp.tril(beta_c * scores, -1)  # the solve adds the unit diagonal
        v_c, known = jnp.moveaxis(v_c, 1, 2), jnp.einsum("bhpn,blhn->bhlp", h, k_c)
        w = jax.scipy.linalg.solve_triangular(
            system, beta_c * (v_c - known), lower=True, unit_diagonal=True
        )
        w, no_decay = jnp.moveaxis(w, 2, 1), jnp.zeros(w.shape[1], w.dtype)
        one = jnp.ones(w.shape[:3], w.dtype)
        y_c, h = ssd_quadratic(w, one, no_decay, k_c, q_c, h0=h)
        return h, y_c

    return _scan(body, h0, (q, k, v, beta), chunk_size, "chunk_size", dtype)


# --- shared ---------------------------------------------------------------------------


def _prepare(q, k, v, h0, **gate):
    """Check, cast to the accumulator dtype, and start from zeros if h0 is None."""
    letters = {"v": (v, "b T H P"), "k": (k, "b T H N"), "q": (q, "b T H N")}
    past = {} if h0 is None else {"h0": (h0, "b H P N")}
    check_length("v", check_shapes(**letters, **gate, **past))
    ((gate, _),) = gate.values()
    dtype = v.dtype
    v, q, k, gate = to_accumulator(v, q, k, gate)
    return zero_state(v, k) if h0 is None else h0, (q, k, v, gate), dtype


def _one_step(q, k, v, log_a, h, dtype):
    y, h = simple_gla(q, k, v, log_a, h)
    return y.astype(dtype), h


def _scan(body, h0, inputs, Q, name, dtype):
    """Scan `body` over chunks of Q tokens, the last one filled up with zeros."""
    check_size(name, Q)
    b, T, H, P = inputs[2].shape
    cut = tuple(_split_chunks(w, 1, min(Q, T))[:, :, 0] for w in inputs)
    h, y = jax.lax.scan(body, h0, cut)
    y = jnp.moveaxis(y, 0, 1).reshape(b, -1, H, P)[:, :T]
    return y.astype(dtype), h
