"""Mamba-2: the block, and a language model around it.

    r ← r + W_out norm(SSD(conv(W_xBC u), softplus(W_dt u + bias)) ∘ silu(W_z u))

with u = norm(r). One function computes a block for any number of tokens and carries
its state in a `Cache` of fixed size: `forward` and `prefill` give it many tokens,
`decode_step` one. On a mesh of devices each computes the same block from its part of
the weights and tokens; `Axes` names what is split, and `platforms` holds what crosses.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; reference code
github.com/state-spaces/mamba at e9594ce, mamba_ssm/modules/mamba2.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib._checks import check_integers, check_size, check_tokens, is_traced
from ssdlib.cache import Cache, append_inputs, causal_conv, check_cache, init_cache
from ssdlib.params import Mamba2Config, Params, checked_params
from ssdlib.platforms import (
    ONE_DEVICE,
    inverse_rms,
    linear,
    pad_rows,
    rms_norm,
    with_enough_rows,
)
from ssdlib.recurrence import accumulator, ssd_step

__all__ = ["decode_step", "forward", "prefill"]

ArrayLike = Array | np.ndarray


# --- the public functions: check, then run the compiled program ----------------------


def forward(
    params: Params,
    config: Mamba2Config,
    tokens: Int[ArrayLike, "b T"],
    lengths: Int[ArrayLike, "b"] | None = None,
) -> Float[Array, "b T V"]:
    """Logits after every token, from an empty cache. For training and evaluation.

    `lengths` marks right-padded rows: logits past a row's length are zero. Raises
    ValueError for shapes, dtypes, lengths or tokens out of range. Inside a compiled
    program values are hidden: a token outside the vocabulary makes its row NaN, from
    the beginning of its chunk on.
    """
    params = checked_params(params, config)
    tokens, lengths = check_tokens(tokens, config.vocab_size, lengths)
    return _forward(params, config, tokens, lengths)


def prefill(
    params: Params,
    config: Mamba2Config,
    tokens: Int[ArrayLike, "b T"],
    cache: Cache | None = None,
    lengths: Int[ArrayLike, "b"] | None = None,
    piece: int | None = None,
) -> tuple[Float[Array, "b V"], Cache]:
    """Read many tokens: (logits after each row's last real token, the cache then).

    Continues from `cache` at any length; None means an empty one. With `lengths`, row
    i is tokens[i, :lengths[i]] and the padding to its right changes nothing; a row of
    length 0 keeps its cache and has logits of zero. The head runs on one position per
    row. With `piece`, so many tokens are read at a time: memory and compiled programs
    then do not depend on T. Your cache stays valid. Errors as in `forward`.
    """
    params = checked_params(params, config)
    tokens, lengths = check_tokens(tokens, config.vocab_size, lengths)
    if cache is None:
        cache = init_cache(config, len(tokens), params["embedding"].dtype)
    check_cache(config, cache, len(tokens))
    if piece is None:
        return _prefill(params, config, tokens, cache, lengths)
    check_size("piece", piece)
    logits = 0.0
    for part, left in pieces(tokens, lengths, piece):
        last, cache = _prefill(params, config, part, cache, left)
        logits = jnp.where(left[:, None] > 0, last, logits)
    return logits, cache


def decode_step(
    params: Params, config: Mamba2Config, token: Int[ArrayLike, "b"], cache: Cache
) -> tuple[Float[Array, "b V"], Cache]:
    """Read one token per row: (logits after it, the next cache).

    One step of the recurrence per layer: about 2 FLOPs per parameter and one read of
    weights and cache, however many tokens came before. Errors as in `forward`. To loop
    on the device, use `generate`; to loop yourself, jit this with the cache donated.
    """
    params = checked_params(params, config)
    token = check_integers("token", token, ("b",), 0, config.vocab_size - 1)
    check_cache(config, cache, len(token))
    return _prefill(params, config, token[:, None], cache, None)


def pieces(tokens, lengths, size: int):
    """(tokens (b, size), how many of them are real (b,)) for piece after piece.

    Of concrete lengths, no piece holds padding alone, but the first.
    """
    (b, T), xp = tokens.shape, jnp
    if not is_traced(tokens) and not is_traced(lengths):  # no program for each T
        xp, tokens = np, np.asarray(tokens)
        if lengths is not None:
            T = max(1, int(np.max(lengths)))
    lengths = xp.full(b, T, np.int32) if lengths is None else xp.asarray(lengths)
    tokens = xp.pad(tokens, [(0, 0), (0, -T % size)])
    for start in range(0, T, size):
        left = xp.clip(lengths - start, 0, size)
        yield tokens[:, start : start + size], left


@partial(jax.jit, static_argnames="config")
def _forward(params, config, tokens, lengths):
    cache = init_cache(config, len(tokens), params["embedding"].dtype)
    logits, _ = read_all(params, config, tokens, cache, lengths)
    if lengths is not None:
        logits = jnp.where(is_real(lengths, tokens.shape[1])[..., None], logits, 0)
    return logits


def read_all(params, config, tokens, cache, lengths, ahead=None):
    """`prefill` unchecked, with the logits after every token.

    With `ahead`: after a row's last real token, and after each of so many tokens to
    its right. They are read by what is right of them, and not by the cache.
    """
    r, cache = _backbone(params, config, tokens, cache, lengths, ahead=ahead)
    if ahead is not None:
        at = lengths[:, None] - 1 + jnp.arange(ahead + 1, dtype=jnp.int32)[None]
        r = jnp.take_along_axis(r, at[..., None], axis=1)
    return _head(params, config, r), cache


def read(params, config, tokens, cache, lengths=None, axes=ONE_DEVICE):
    """`prefill` unchecked, for compiled programs, and on a device of a mesh."""
    (b, T), dtype = tokens.shape, params["embedding"].dtype

    def step(rows):
        r, after = _backbone(params, config, tokens, cache, lengths, rows, axes)
        return _head(params, config, r[:, 0])[:b], after

    def head(rows):
        return _head(params, config, pad_rows(last, rows))[:b]

    if T == 1:
        logits, after = with_enough_rows(step, b, dtype)
    else:
        r, after = _backbone(params, config, tokens, cache, lengths, axes=axes)
        if lengths is None:
            last = r[:, -1]
        else:
            left = axes.real_tokens_from_here(lengths, T)
            index = jnp.clip(left - 1, 0, T - 1)[:, None, None]
            last = jnp.take_along_axis(r, index, axis=1)[:, 0]
            last = axes.from_last_token(last, left, T)
        logits = with_enough_rows(head, b, dtype)
    if lengths is not None:
        logits = jnp.where(lengths[:, None] > 0, logits, 0)
    return logits, after


_prefill = jax.jit(read, static_argnames="config")


# --- the model, from the outside in --------------------------------------------------


def _backbone(
    params, config, tokens, cache, lengths, rows=None, axes=ONE_DEVICE, ahead=None
):
    """Embed, then every block: (residual (b, T, d_model) in float32, cache).

    With `rows`, the residual has so many: zeros lie below the rows of the batch.
    """
    T = tokens.shape[1]
    r = axes.embed(params["embedding"], tokens, config.vocab_size)
    left = axes.real_tokens_from_here(lengths, T)
    if left is not None and ahead is None:  # so that padding may even be NaN
        r = jnp.where(is_real(left, T)[..., None], r, 0)
    r, tails, h = pad_rows(r, rows or len(r)), [], []
    for i, p in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{i}"):
            state = cache.conv[:, i], cache.h[i]
            r, tail, h_i = _block(p, config, axes, r, *state, left, ahead is not None)
        tails.append(tail)
        h.append(h_i)
    conv = append_inputs(cache.conv, tails)
    if T == 1 and lengths is not None:
        conv = jnp.where((lengths > 0)[:, None, None, None], conv, cache.conv)
    length = cache.length + (T if lengths is None else lengths)
    return r, Cache(conv=conv, h=tuple(h), length=length)


@partial(jax.jit, static_argnames=("config", "axes", "ahead"))  # traced once
def _block(p, config, axes, r, conv, h, left, ahead=False):
    """One block on r (b, T, d_model): (the next r, last inputs of conv, h).

    conv, h and p are this device's part, and say how many heads it has; `left` are the
    real tokens of a row from this device's first on. r may have more rows than h: the
    matrices multiply them too, nothing else. `ahead` also reads out what is not real.
    """
    (b, H, P, N), T, d = h.shape, r.shape[1], h.shape[1] * h.shape[2]
    G = (conv.shape[-1] - d) // (2 * N)
    z, *xBC, dt = _project(p, (d, d, G * N, G * N, H), config.norm_eps, r)
    xBC = [v[:b] for v in xBC]
    real = None if left is None else jnp.clip(left, 0, T)
    x, B, C, tail = _xBC(p, xBC, axes.inputs_before(xBC, conv), real)
    tail = axes.from_last_token(tail, left, T)
    x = x.reshape(b, T, H, P)
    B, C = (v.reshape(b, T, G, N) for v in (B, C))

    dt = _add_bias(dt[:b].astype(h.dtype), p["dt_bias"])
    dt = jnp.clip(jax.nn.softplus(dt), *config.time_step_limit)
    every_dt, A, ssd = dt, -jnp.exp(p["A_log"]), axes.ssd_over_segments
    if left is not None:  # a token of dt = 0 neither decays nor writes the state
        dt = jnp.where(is_real(left, T)[..., None], dt, 0)

    if T == 1:
        y, h = ssd_step(h, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], p["D"])
    else:
        before, (y, h) = h, ssd(config.chunk_size, x, dt, A, B, C, p["D"], h)
        if ahead:
            y, _ = ssd(config.chunk_size, x, every_dt, A, B, C, p["D"], before)

    y = pad_rows(y.reshape(b, T, d), len(r)) * jax.nn.silu(z)
    y = axes.gated_norm(y, p["gate_norm"], config, b).astype(z.dtype)
    sums = y.dtype if axes.model is None else h.dtype
    out = axes.sum_over_heads(linear(p["out"], y, sums), b)
    out = _add_bias(out, p.get("out_bias"))
    return r + out.astype(r.dtype), tail, h


def _project(p, sizes, eps, r):
    """(z, x, B, C, dt) before the convolution, W_in norm(r) in parts of these sizes.

    The norm divides each token by one number, so here it divides after the product:
    on a GPU that is one kernel less. One token takes one product and cuts its results.
    Many take a product for each part, as cuts of weights then cost less. In float16 it
    divides before as well, as what is not divided may pass its largest number.
    """
    ends = np.cumsum(sizes)
    cuts = [slice(*cut) for cut in zip([0, *ends], ends, strict=False)]
    r, dtype = r.astype(accumulator(r)), p["in"].dtype
    u, scale = r * p["norm"].astype(r.dtype)[None, None], inverse_rms(r, eps)
    if dtype == jnp.float16:
        u, scale = u * scale, 1
    u = u.astype(dtype)

    def rows(cut):
        y = (linear(p["in"][cut], u, r.dtype) * scale).astype(dtype)
        return _add_bias(y, p.get("in_bias"), cut)

    if r.shape[1] > 1:
        return [rows(cut) for cut in cuts]
    y = rows(slice(None))
    return [y[..., cut] for cut in cuts]


def _xBC(p, parts, conv, real):
    """(x, B, C, the last inputs of the convolution): silu(conv(part)) of each part."""
    out, tails, start = [], [], 0
    for v in parts:
        cut = slice(start, start := start + v.shape[-1])
        v, tail = causal_conv(v, conv[..., cut], p["conv"][cut], real)
        out.append(jax.nn.silu(_add_bias(v, p.get("conv_bias"), cut)))
        tails.append(tail)
    return *out, jnp.concatenate(tails, axis=-1)


def _head(params, config, r):
    """Final norm and the product with the (tied) embedding: logits in float32."""
    embedding = params["embedding"]
    u = rms_norm(r, params["norm"], config.norm_eps).astype(embedding.dtype)
    head = embedding if config.tie_embeddings else params["head"]
    return linear(head, u, r.dtype)


def is_real(lengths, T):
    """(b, T): which tokens of right-padded rows are real."""
    return jnp.arange(T, dtype=jnp.int32)[None] < lengths[:, None]


def _add_bias(y, bias, cut=slice(None)):
    """y + bias, or its cut; y itself if there is none."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias[cut].astype(y.dtype), y.shape)
    return y
