"""What is written differently for a chip, by measured rule, and for many chips.

    (a₁, h₁) ∘ (a₂, h₂) = (a₁ a₂, a₂ h₁ + h₂)

A program holds one variant only, that of the platform for which it is lowered. Chapter
12 shows in the compiled programs what each rule changes.

A block that is spread over a mesh of devices needs seven things from other devices.
Each is a method of `Axes`, and does nothing on one device. Along `seq`, segments
of the tokens leave pairs (decay, state) behind, and ∘ is associative: any split is
exact.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 8; Hillis and Steele 1986, "Data
parallel algorithms" (CACM 29:12), for the combination in log₂ n rounds.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from ssdlib import int8
from ssdlib.chunked import ssd_chunked, ssd_in_spans
from ssdlib.recurrence import accumulator, log_decay, merge_heads, split_heads

__all__ = [
    "LONGEST_CHUNK",
    "ONE_DEVICE",
    "Axes",
    "linear",
    "ssd",
    "ssd_segment",
    "with_enough_rows",
]

# --- what a chip asks for -------------------------------------------------------------

LONGEST_CHUNK = {"cpu": 64, "tpu": 128, "default": 256}  # tokens, in a prefill
FEWEST_SPANS = {"cpu": 2}  # steps of the scan over spans
FEW_ROWS = 32  # of a product on a CPU
PARTS = 4  # of a product of one row on a CPU


def ssd(chunk_size, *args):
    """`ssd_chunked` with the chunk length and spans that are fastest on the platform.

    On a CPU a scan of one step is slow: XLA removes it, and then computes its inputs
    again in every kernel that reads them. The result depends on neither.
    """

    def on(platform):
        Q = min(LONGEST_CHUNK[platform], chunk_size)
        return partial(ssd_in_spans, Q, FEWEST_SPANS.get(platform, 1), *args)

    return lax.platform_dependent(**{k: on(k) for k in LONGEST_CHUNK})


def with_enough_rows(fn, b, dtype):
    """fn(rows): rows is b, or more where products of few rows are slow.

    A TPU's matrix unit takes rows by eight, and XLA gives products of fewer to the
    vector unit (chapter 9). On a CPU, XLA widens a whole bfloat16 matrix to multiply
    it by one row; by two rows it calls a kernel that does not. Zeros beside the real
    rows are cheaper than either.
    """
    least = {"tpu": 8} | ({"cpu": 2} if dtype == jnp.bfloat16 else {})
    padded = {platform: partial(fn, n) for platform, n in least.items() if n > b}
    return lax.platform_dependent(default=partial(fn, b), **padded)


def pad_rows(v, rows):
    """Zeros below v, up to so many rows."""
    return jnp.pad(v, [(0, rows - len(v))] + [(0, 0)] * (v.ndim - 1))


def linear(W, u, dtype):
    """W u over the last axis of u, with W stored as (outputs, inputs).

    XLA on a CPU needs advice. In 16 bits, ask for sums in float32, or the whole
    matrix is widened first. In float32, a product of a few rows reads W in the order
    in which it is stored only if the rows lie side by side in the result; the barrier
    keeps the transpose after it from being moved into the product. One row alone waits
    for memory, and XLA reads W faster as a few products than as one. Matrices of eight
    bits are the same everywhere.
    """
    if isinstance(W, int8.Int8Matrix):
        return int8.product(W, u, dtype)
    rows = u.size // u.shape[-1]

    def plain(W, u, sums=dtype):
        return jnp.einsum("...i,oi->...o", u, W, preferred_element_type=sums)

    def on_cpu(W, u):
        if u.dtype.itemsize == 2:  # in two axes: with more, jaxlib 0.7 has no kernel
            y = plain(W, u.reshape(rows, -1), jnp.float32).astype(dtype)
            return y.reshape(*u.shape[:-1], -1)
        if rows == 1 and len(W) % PARTS == 0:
            W = W.reshape(PARTS, -1, W.shape[1])
            y = jnp.einsum("pi,poi->po", jnp.broadcast_to(u.ravel(), W[:, 0].shape), W)
            return y.reshape(*u.shape[:-1], -1)
        if not 1 < rows <= FEW_ROWS:
            return plain(W, u)
        y = jnp.einsum("ri,oi->or", u.reshape(rows, -1), W)
        return lax.optimization_barrier(y).T.reshape(*u.shape[:-1], -1)

    return lax.platform_dependent(W, u, cpu=on_cpu, default=plain)


def rms_norm(v, weight, eps, groups=1):
    """v / sqrt(mean(v²) + eps) * weight, each of `groups` parts by itself; float32.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    v = v.astype(accumulator(v))
    parts = v.reshape(*v.shape[:-1], groups, -1)
    parts = parts * inverse_rms(parts, eps)
    return parts.reshape(v.shape) * jnp.broadcast_to(weight.astype(v.dtype), v.shape)


def inverse_rms(v, eps):
    """1 / sqrt(mean(v²) + eps) over the last axis."""
    return lax.rsqrt(jnp.mean(v**2, axis=-1, keepdims=True) + eps)


# --- what crosses from device to device -----------------------------------------------


def ssd_segment(x, dt, A, B, C, D, h0, chunk_size: int, axis: str = "seq"):
    """`ssd_chunked` on one segment a device: y_t += exp(Σ_{s≤t} dt_s A) h_in C_t.

    Call it inside `shard_map`, with the tokens of each device on its `axis`, h0 the
    state before the first device's. Every segment is scanned at once from zero; then
    ⌈log₂ n⌉ rounds of ∘ and a shift give each device the state h_in that enters it.
    Each round sends b H (P N + 1) numbers a device, whatever T is. Returns (y, the
    state after the last segment, on every device).
    """
    n, i = lax.axis_size(axis), lax.axis_index(axis)
    h0 = jnp.where(i == 0, h0, 0)
    y, h = ssd_chunked(x, dt, A, B, C, D, h0, chunk_size)
    log_a = jnp.cumsum(log_decay(dt, A), axis=1)
    a, k = jnp.exp(log_a[:, -1]), 1
    while k < n:  # after the round of k, device i has combined segments i-2k+1..i
        pairs = [(j, j + k) for j in range(n - k)]
        a_left, h_left = lax.ppermute((a, h), axis, pairs)  # zeros from nobody
        h = a[..., None, None] * h_left + h
        a, k = a * a_left, 2 * k
    h_in = lax.ppermute(h, axis, [(j, j + 1) for j in range(n - 1)])
    G = B.shape[2]
    read = jnp.einsum("blgn,bgrpn->blgrp", C.astype(h.dtype), split_heads(h_in, G, 1))
    read = jnp.exp(log_a)[..., None] * merge_heads(read, 2)
    y = (y.astype(h.dtype) + read).astype(y.dtype)
    return y, lax.psum(jnp.where(i == n - 1, h, 0), axis)


class Axes(NamedTuple):
    """Names of mesh axes inside `jax.shard_map`; None where nothing is split.

    model: splits heads, with their groups and projections.
    seq:   splits the tokens of a prefill in segments.
    """

    model: str | None = None
    seq: str | None = None

    def real_tokens_from_here(self, lengths, T):
        """Real tokens from this device's first on; negative past a row's end."""
        return lengths if self.seq is None else lengths - lax.axis_index(self.seq) * T

    def embed(self, embedding, tokens, vocab_size):
        """Rows of the embedding, from the devices that have them; NaN for no token."""
        if self.model is None:
            nan = dict(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            if isinstance(embedding, int8.Int8Matrix):
                return embedding.take(tokens, **nan)
            r = embedding.at[tokens].get(**nan)
            return r.astype(accumulator(r))
        v = len(embedding)
        row = tokens - lax.axis_index(self.model) * v
        here = ((row >= 0) & (row < v))[..., None]
        r = embedding[jnp.clip(row, 0, v - 1)].astype(embedding.dtype)
        r = jnp.where(here, r, 0)
        r = lax.psum(r.astype(accumulator(r)), self.model)
        return jnp.where(((tokens >= 0) & (tokens < vocab_size))[..., None], r, jnp.nan)

    def inputs_before(self, parts, conv):
        """The convolution's inputs before this segment: the left neighbor's last ones.

        Those before the first segment are the cache's.
        """
        if self.seq is None:
            return conv
        n, K = lax.axis_size(self.seq), conv.shape[1]
        last = jnp.concatenate([v[:, v.shape[1] - K :] for v in parts], axis=-1)
        right = [(i, i + 1) for i in range(n - 1)]
        halo = lax.ppermute(last.astype(conv.dtype), self.seq, right)
        return jnp.where(lax.axis_index(self.seq) == 0, conv, halo)

    def ssd_over_segments(self, chunk_size, x, dt, A, B, C, D, h0):
        """`ssd` on one device, `ssd_segment` over the devices of `seq`."""
        if self.seq is None:
            return ssd(chunk_size, x, dt, A, B, C, D, h0)
        return ssd_segment(x, dt, A, B, C, D, h0, chunk_size, self.seq)

    def gated_norm(self, y, weight, config, b):
        """`rms_norm` of each group; one that lies on several devices adds up its parts.

        Only b rows are real, and sent.
        """
        n, G, eps = 1, config.n_groups, config.norm_eps
        if self.model is not None:
            n = lax.axis_size(self.model)
        if G >= n:
            return rms_norm(y, weight, eps, G // n)
        y = y.astype(accumulator(y))
        group = lax.axis_index(self.model) * G // n
        mine = jnp.arange(G)[:, None, None] == group
        means = jnp.where(mine, jnp.mean(y[:b] ** 2, axis=-1)[None], 0)  # (G, b, T)
        mean = lax.psum(means, self.model)[group][..., None] * (G / n)
        mean = pad_rows(mean, len(y))
        return y * lax.rsqrt(mean + eps) * weight.astype(y.dtype)[None, None]

    def sum_over_heads(self, out, b):
        """The sum of what the devices of `model` made of their heads, for b rows."""
        if self.model is None:
            return out
        return pad_rows(lax.psum(out[:b], self.model), len(out))

    def from_last_token(self, v, left, T):
        """What the device with a row's last real token has, on all devices of `seq`."""
        if self.seq is None:
            return v
        owner = ((left > 0) & (left <= T)).reshape(-1, *(1,) * (v.ndim - 1))
        return lax.psum(jnp.where(owner, v, 0), self.seq)


ONE_DEVICE = Axes()
