"""Mamba-2 over a mesh of devices: the program, with its three crossings.

    (a₁, h₁) ∘ (a₂, h₂) = (a₁ a₂, a₂ h₁ + h₂)

`data` sends nothing. On `model` each device is a smaller model, and one sum of all
per layer makes the residual whole. On `seq` each device scans its segment of the tokens
from a zero state; the pairs (decay, state) that segments leave behind are combined
across devices by ∘, which is associative, so any split is exact.

The crossings are the topic here, so the block of `model` is written out once more
around them, inside `jax.shard_map`. Parameters and caches come from `sharding`.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 8; Hillis and Steele 1986, "Data
parallel algorithms" (CACM 29:12), for the combination in log₂ n rounds.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as S
from jaxtyping import Array, Float, Int

from ssdlib._checks import check_integers, check_range, check_tokens
from ssdlib.cache import Cache, move_on
from ssdlib.chunked import ssd_chunked
from ssdlib.config import Mamba2Config
from ssdlib.model import ArrayLike, _causal_conv, _head, _project, rms_norm
from ssdlib.params import Params
from ssdlib.recurrence import accumulator, merge_heads, split_heads, ssd_step
from ssdlib.sharding import (
    cache_spec,
    check_batch,
    check_cache,
    check_params,
    init_cache,
    local_config,
    map_params,
    spec,
)

__all__ = ["decode_step", "prefill", "ssd_segment"]

# --- the public functions ------------------------------------------------------------


def prefill(
    params: Params,
    config: Mamba2Config,
    mesh: Mesh,
    tokens: Int[ArrayLike, "b T"],
    cache: Cache | None = None,
    lengths: Int[ArrayLike, "b"] | None = None,
) -> tuple[Float[Array, "b V"], Cache]:
    """`ssdlib.prefill` over a mesh: the same logits and states, from sharded params.

    Any T: it is filled up to equal segments with tokens that change nothing. `traffic`
    says what is sent. Raises ValueError as `ssdlib.prefill` does, and if `data` does
    not divide b.
    """
    check_tokens(tokens, config.vocab_size, lengths)
    (b, T), seq = tokens.shape, mesh.shape["seq"]
    check_batch(mesh, b)
    check_params(mesh, params)
    if cache is None:
        cache = init_cache(config, mesh, b, params["embedding"].dtype)
    check_cache(config, mesh, cache, b)
    if lengths is None:
        lengths = jnp.full(b, T, jnp.int32)
    fill = seq * segment(config, T, seq) - T
    tokens = jnp.pad(jnp.asarray(tokens), [(0, 0), (0, fill)])
    return _run(params, config, mesh, tokens, cache, lengths, seq > 1)


def decode_step(
    params: Params,
    config: Mamba2Config,
    mesh: Mesh,
    token: Int[ArrayLike, "b"],
    cache: Cache,
) -> tuple[Float[Array, "b V"], Cache]:
    """`ssdlib.decode_step` over a mesh. One token has no segments: `seq` repeats it.

    Sends one sum of b d_model numbers a layer and device, whatever was read before.
    """
    check_integers("token", token, ("b",))
    check_range("token", token, 0, config.vocab_size - 1)
    check_batch(mesh, len(token))
    check_params(mesh, params)
    check_cache(config, mesh, cache, len(token))
    tokens, lengths = jnp.asarray(token)[:, None], jnp.ones(len(token), jnp.int32)
    return _run(params, config, mesh, tokens, cache, lengths, False)


def ssd_segment(x, dt, A, B, C, D, h0, chunk_size: int, axis: str = "seq"):
    """`ssd_chunked` on one segment a device: y_t += exp(Σ_{s≤t} dt_s A) h_in C_t.

    Call it inside `shard_map`, with the tokens of each device on its `axis`, h0 the
    state before the first device's. Every segment is scanned at once from zero; then
    ⌈log₂ n⌉ rounds of ∘ and a shift give each device the state h_in that enters it.
    Each round sends b H (P N + 1) numbers a device, whatever T is. Returns (y, the
    state after the last segment, on every device).
    """
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    h0 = jnp.where(i == 0, h0, 0)
    y, h = ssd_chunked(x, dt, A, B, C, D, h0, chunk_size)
    log_a = jnp.cumsum(dt * A[None, None], axis=1)
    a, k = jnp.exp(log_a[:, -1]), 1
    while k < n:  # after the round of k, device i has combined segments i-2k+1..i
        pairs = [(j, j + k) for j in range(n - k)]
        a_left, h_left = jax.lax.ppermute((a, h), axis, pairs)  # zeros from nobody
        h = a[..., None, None] * h_left + h
        a, k = a * a_left, 2 * k
    h_in = jax.lax.ppermute(h, axis, [(j, j + 1) for j in range(n - 1)])
    G = B.shape[2]
    read = jnp.einsum("blgn,bgrpn->blgrp", C.astype(h.dtype), split_heads(h_in, G, 1))
    read = jnp.exp(log_a)[..., None] * merge_heads(read, 2)
    y = (y.astype(h.dtype) + read).astype(y.dtype)
    return y, jax.lax.psum(jnp.where(i == n - 1, h, 0), axis)


# --- the program of one device -------------------------------------------------------


@partial(jax.jit, static_argnames=("config", "mesh", "split"))
def _run(params, config, mesh, tokens, cache, lengths, split):
    """`_device` on every device; with `split`, tokens are cut in segments."""
    caches = cache_spec(config)
    device = jax.shard_map(
        partial(_device, config, local_config(config, mesh), split),
        mesh=mesh,
        in_specs=(
            map_params(lambda _, key, value: spec(key), params),
            S("data", "seq" if split else None),
            caches,
            S("data"),
        ),
        out_specs=(S("data", "model"), caches),
    )
    logits, cache = device(params, tokens, cache, lengths)
    return logits[:, : config.vocab_size], cache


def _device(config, local, split, params, tokens, cache, lengths):
    """Embed, every block, the head, for this device's rows, tokens and heads."""
    T = tokens.shape[1]
    # Real tokens from this device's first on; negative past a row's end.
    left = lengths - (jax.lax.axis_index("seq") * T if split else 0)
    r = _embed(params["embedding"], tokens, config.vocab_size)
    tails, h = [], []
    for i, p in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{i}"):
            state = cache.conv[:, i], cache.h[i]
            out, tail, h_i = _block(p, config, local, r, *state, left, split)
            r = r + out
        tails.append(tail)
        h.append(h_i)
    index = jnp.clip(left - 1, 0, T - 1)[:, None, None]
    r = _from_owner(jnp.take_along_axis(r, index, axis=1)[:, 0], left, T, split)
    return _head(params, config, r), Cache(conv=move_on(cache.conv, tails), h=tuple(h))


def _block(p, config, local, r, conv, h, left, split):
    """`model._block` on this device's heads and tokens, with its crossings."""
    T, G = r.shape[1], local.n_groups
    z, *xBC, dt = _project(p, local, r)
    xBC = jnp.concatenate(xBC, axis=-1)

    if split:  # crossing 1: the convolution's inputs from the device to the left
        conv = _halo(xBC, conv)
    real = jnp.clip(left, 0, T)
    xBC, tail = _causal_conv(xBC, conv, p["conv"], p.get("conv_bias"), real)
    tail = _from_owner(tail, left, T, split)

    d, GN = local.d_inner, G * local.d_state
    x, B, C = jnp.split(jax.nn.silu(xBC), (d, d + GN), axis=-1)
    x = x.reshape(*x.shape[:2], local.n_heads, local.head_dim)
    B, C = (v.reshape(*v.shape[:2], G, local.d_state) for v in (B, C))
    dt = jax.nn.softplus(dt.astype(h.dtype) + p["dt_bias"][None, None].astype(h.dtype))
    dt = jnp.clip(dt, *config.time_step_limit)
    dt = jnp.where((jnp.arange(T)[None] < left[:, None])[..., None], dt, 0)
    A = -jnp.exp(p["A_log"])

    if split:  # crossing 2: states
        y, h = ssd_segment(x, dt, A, B, C, p["D"], h, config.chunk_size)
    elif T > 1:
        y, h = ssd_chunked(x, dt, A, B, C, p["D"], h, config.chunk_size)
    else:
        y, h = ssd_step(h, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], p["D"])
    y = y.reshape(z.shape) * jax.nn.silu(z)
    y = _gated_norm(y, p["gate_norm"], config).astype(z.dtype)

    # Crossing 3: the sum over heads, in float32 whatever the weights are.
    out = jnp.einsum("bti,oi->bto", y, p["out"], preferred_element_type=h.dtype)
    out = jax.lax.psum(out, "model")
    if "out_bias" in p:
        out = out + p["out_bias"].astype(out.dtype)[None, None]
    return out, tail, h


def _halo(xBC, conv):
    """The inputs before this segment: the left neighbor's last ones, or the cache's."""
    n, K, T = jax.lax.axis_size("seq"), conv.shape[1], xBC.shape[1]
    right = [(j, j + 1) for j in range(n - 1)]
    halo = jax.lax.ppermute(xBC[:, T - K :].astype(conv.dtype), "seq", right)
    return jnp.where(jax.lax.axis_index("seq") == 0, conv, halo)


def _embed(embedding, tokens, vocab_size):
    """Each device looks up the rows that it has; NaN for a token that none has."""
    v = embedding.shape[0]
    row = tokens - jax.lax.axis_index("model") * v
    here = ((row >= 0) & (row < v))[..., None]
    r = jnp.where(here, embedding[jnp.clip(row, 0, v - 1)], 0)
    r = jax.lax.psum(r.astype(accumulator(r)), "model")
    known = (tokens >= 0) & (tokens < vocab_size)
    return jnp.where(known[..., None], r, jnp.nan)


def _gated_norm(y, weight, config):
    """`rms_norm` of each group; one that lies on several devices adds up its parts."""
    n, G, eps = jax.lax.axis_size("model"), config.n_groups, config.norm_eps
    if G >= n:
        return rms_norm(y, weight, eps, G // n)
    y = y.astype(accumulator(y))
    group = jax.lax.axis_index("model") * G // n
    mine = jnp.arange(G)[:, None, None] == group
    means = jnp.where(mine, jnp.mean(y**2, axis=-1)[None], 0)  # (G, b, T)
    mean = jax.lax.psum(means, "model")[group][..., None] * (G / n)
    return y * jax.lax.rsqrt(mean + eps) * weight.astype(y.dtype)[None, None]


def _from_owner(v, left, T, split):
    """What the device with a row's last real token has, on every device of `seq`."""
    if not split:
        return v
    owner = ((left > 0) & (left <= T)).reshape(-1, *(1,) * (v.ndim - 1))
    return jax.lax.psum(jnp.where(owner, v, 0), "seq")


def segment(config, T, seq) -> int:
    """Tokens a device; never fewer than the convolution looks back."""
    return T if seq == 1 else max(-(-T // seq), config.d_conv - 1)
