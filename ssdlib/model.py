"""Mamba-2: the block, and a language model around it.

    r ← r + W_out norm(SSD(conv(W_xBC u), softplus(W_dt u + bias)) ∘ silu(W_z u))

with u = norm(r). One function computes a block for any number of tokens and carries
its state in a `Cache` of fixed size: `forward` and `prefill` give it many tokens,
`decode_step` one.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; reference code
github.com/state-spaces/mamba at e9594ce, mamba_ssm/modules/mamba2.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib._checks import check_integers, check_is, check_range, check_tokens
from ssdlib.cache import Cache, check_cache, init_cache, move_on
from ssdlib.config import Mamba2Config
from ssdlib.params import Params, check_params, init_params
from ssdlib.platforms import by_rows, product, ssd
from ssdlib.recurrence import accumulator, ssd_step

__all__ = [
    "Cache",
    "decode_step",
    "forward",
    "init_cache",
    "init_params",
    "prefill",
]

ArrayLike = Array | np.ndarray


# --- the public functions: check, then run the compiled program ----------------------


def forward(
    params: Params,
    config: Mamba2Config,
    tokens: Int[ArrayLike, "b T"],
    lengths: Int[ArrayLike, "b"] | None = None,
) -> Float[Array, "b T V"]:
    """Logits after every token, from an empty cache. For training and evaluation.

    `lengths` marks right-padded rows: logits past a row's length are zero. Compiled
    once per (b, T). Raises ValueError for shapes, dtypes, lengths or tokens out of
    range; inside a compiled program, where values cannot be checked, a token outside
    the vocabulary turns the logits of its row to NaN.
    """
    _check_model(params, config)
    check_tokens(tokens, config.vocab_size, lengths)
    return _forward(params, config, jnp.asarray(tokens), lengths)


def prefill(
    params: Params,
    config: Mamba2Config,
    tokens: Int[ArrayLike, "b T"],
    cache: Cache | None = None,
    lengths: Int[ArrayLike, "b"] | None = None,
) -> tuple[Float[Array, "b V"], Cache]:
    """Read many tokens: (logits after each row's last real token, the cache then).

    Continues from `cache` at any length; None means an empty one. With `lengths`,
    row i is tokens[i, :lengths[i]] and the padding to its right changes nothing. The
    head runs on one position per row. Errors as in `forward`. The cache that you pass
    stays valid.
    """
    _check_model(params, config)
    check_tokens(tokens, config.vocab_size, lengths)
    if cache is None:
        cache = init_cache(config, len(tokens), params["embedding"].dtype)
    check_cache(config, cache, len(tokens))
    return _prefill(params, config, jnp.asarray(tokens), cache, lengths)


def decode_step(
    params: Params, config: Mamba2Config, token: Int[ArrayLike, "b"], cache: Cache
) -> tuple[Float[Array, "b V"], Cache]:
    """Read one token per row: (logits after it, the next cache).

    One step of the recurrence per layer. Neither the chunk size nor the number of
    tokens read so far is part of its cost: about 2 FLOPs per parameter, and one read of
    the weights and of the cache. Errors as in `forward`. To loop on the device, use
    `generate`; to loop yourself, jit this with the cache donated.
    """
    _check_model(params, config)
    check_integers("token", token, ("b",))
    check_range("token", token, 0, config.vocab_size - 1)
    check_cache(config, cache, len(token))
    return _prefill(params, config, jnp.asarray(token)[:, None], cache, None)


def _check_model(params, config) -> None:
    """Raise ValueError unless config is one, and params are its parameters."""
    check_is("config", config, Mamba2Config)
    check_params(params, config)


@partial(jax.jit, static_argnames="config")
def _forward(params, config, tokens, lengths):
    cache = init_cache(config, len(tokens), params["embedding"].dtype)
    r, _ = _backbone(params, config, tokens, cache, lengths)
    logits = _head(params, config, r)
    if lengths is not None:
        real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        logits = jnp.where(real[..., None], logits, 0)
    return logits


def prefill_any(params, config, tokens, cache, lengths=None):
    """`prefill` unchecked, for compiled programs; rows may be of length 0."""
    (b, T), dtype = tokens.shape, params["embedding"].dtype

    def step(rows):
        r, after = _backbone(params, config, tokens, cache, lengths, rows)
        return _head(params, config, r[:, 0])[:b], after

    if T == 1:
        return by_rows(step, b, dtype)
    r, after = _backbone(params, config, tokens, cache, lengths)
    if lengths is None:
        last = r[:, -1]
    else:  # a row of length 0 leaves its cache as it was; its logits mean nothing
        index = jnp.maximum(lengths - 1, 0)[:, None, None]
        last = jnp.take_along_axis(r, index, axis=1)[:, 0]

    def head(rows):
        return _head(params, config, _pad_rows(last, rows))[:b]

    return by_rows(head, b, dtype), after


_prefill = jax.jit(prefill_any, static_argnames="config")


# --- the model, from the outside in --------------------------------------------------


def _backbone(params, config, tokens, cache, lengths, rows=None):
    """Embed, then every block: (residual (b, T, d_model) in float32, cache).

    With `rows`, the residual has so many: zeros lie below the rows of the batch.
    """
    r, tails, h = _pad_rows(_embed(params, tokens), rows), [], []
    for i, p in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{i}"):
            state = cache.conv[:, i], cache.h[i]
            r, tail, h_i = _block(p, config, r, *state, lengths)
        tails.append(tail)
        h.append(h_i)
    conv = move_on(cache.conv, tails)
    if tokens.shape[1] == 1 and lengths is not None:
        conv = jnp.where((lengths > 0)[:, None, None, None], conv, cache.conv)
    return r, Cache(conv=conv, h=tuple(h))


@partial(jax.jit, static_argnames="config")  # all layers share one trace; XLA inlines
def _block(p, config, r, conv, h, lengths):
    """One block on r (b, T, d_model) in float32: (the next r, last inputs of conv, h).

    r may have more rows than conv and h: the matrices multiply them too, nothing else.
    """
    b, T, d, G = len(h), r.shape[1], config.d_inner, config.n_groups
    z, *xBC, dt = _project(p, config, r)
    x, B, C, tail = _xBC(p, [v[:b] for v in xBC], conv, lengths)
    x = x.reshape(b, T, config.n_heads, config.head_dim)
    B, C = (v.reshape(b, T, G, config.d_state) for v in (B, C))

    dt = jax.nn.softplus(
        dt[:b].astype(h.dtype) + p["dt_bias"][None, None].astype(h.dtype)
    )
    dt = jnp.clip(dt, *config.time_step_limit)
    if lengths is not None:  # a token of dt = 0 neither decays nor writes the state
        dt = jnp.where((jnp.arange(T)[None] < lengths[:, None])[..., None], dt, 0)
    A = -jnp.exp(p["A_log"])

    if T == 1:
        y, h = ssd_step(h, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], p["D"])
    else:
        y, h = ssd(config.chunk_size, x, dt, A, B, C, p["D"], h)

    y = _pad_rows(y.reshape(b, T, d), len(r)) * jax.nn.silu(z)
    y = rms_norm(y, p["gate_norm"], config.norm_eps, G).astype(z.dtype)
    out = _add_bias(product(p["out"], y, y.dtype), p.get("out_bias"))
    return r + out.astype(r.dtype), tail, h


def _project(p, config, r):
    """(z, x, B, C, dt) before the convolution, W_in norm(r) in its five parts.

    The norm divides each token by one number, so here it divides after the product:
    on a GPU that is one kernel less. One token takes one product and cuts its results;
    many take a product for each part, as cuts of weights cost less than those of many
    results.
    """
    sizes = 2 * [config.d_inner] + 2 * [config.n_groups * config.d_state]
    ends = np.cumsum([*sizes, config.n_heads])
    cuts = [slice(*cut) for cut in zip([0, *ends], ends, strict=False)]
    r, dtype = r.astype(accumulator(r)), p["in"].dtype
    u = (r * p["norm"].astype(r.dtype)[None, None]).astype(dtype)
    scale = _inverse_rms(r, config.norm_eps)

    def rows(cut):
        y = (product(p["in"][cut], u, r.dtype) * scale).astype(dtype)
        return _add_bias(y, p.get("in_bias"), cut)

    if r.shape[1] > 1:
        return [rows(cut) for cut in cuts]
    y = rows(slice(None))
    return [y[..., cut] for cut in cuts]


def _xBC(p, parts, conv, lengths):
    """(x, B, C, the last inputs of the convolution): silu(conv(part)) of each part."""
    out, tails, start = [], [], 0
    for v in parts:
        cut = slice(start, start := start + v.shape[-1])
        bias = p["conv_bias"][cut] if "conv_bias" in p else None
        v, tail = _causal_conv(v, conv[..., cut], p["conv"][cut], bias, lengths)
        out.append(jax.nn.silu(v))
        tails.append(tail)
    return *out, jnp.concatenate(tails, axis=-1)


def _causal_conv(v, conv, weight, bias, lengths):
    """Depthwise convolution that starts from the conv state: (output, last inputs).

    out_t = Σ_k weight_k input_{t-K+k} over K = d_conv - 1 past inputs, those before
    the first token from the conv state. The last inputs are up to K, for `move_on`,
    and end at each row's last real token; of one token it is always that one.
    """
    T, K = v.shape[1], conv.shape[1]
    window = jnp.concatenate([conv.astype(v.dtype), v], axis=1)
    out = sum(window[:, k : k + T] * weight[None, None, :, k] for k in range(K + 1))
    if bias is not None:
        out = out + bias[None, None]
    if lengths is None or T == 1:
        return out, window[:, max(T, K) :]
    index = lengths[:, None] + jnp.arange(K)[None]
    return out, jnp.take_along_axis(window, index[..., None], axis=1)


def _embed(params, tokens):
    """Rows of the embedding, in float32; NaN for a token outside the vocabulary."""
    r = (
        params["embedding"]
        .at[tokens]
        .get(mode="fill", fill_value=float("nan"), wrap_negative_indices=False)
    )
    return r.astype(accumulator(r))


def _add_bias(y, bias, cut=slice(None)):
    """y + bias, or its cut; y itself if there is none."""
    return y if bias is None else y + jnp.broadcast_to(bias[cut], y.shape)


def _head(params, config, r):
    """Final norm and the product with the (tied) embedding: logits in float32."""
    embedding = params["embedding"]
    u = rms_norm(r, params["norm"], config.norm_eps).astype(embedding.dtype)
    head = embedding if config.tie_embeddings else params["head"]
    return product(head, u, r.dtype)


def _pad_rows(v, rows):
    """Zeros below, up to so many rows."""
    return jnp.pad(v, [(0, (rows or len(v)) - len(v))] + [(0, 0)] * (v.ndim - 1))


def rms_norm(v, weight, eps, groups=1):
    """v / sqrt(mean(v²) + eps) * weight, each of `groups` parts by itself; float32.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    v = v.astype(accumulator(v))
    parts = v.reshape(*v.shape[:-1], groups, -1)
    parts = parts * _inverse_rms(parts, eps)
    return parts.reshape(v.shape) * jnp.broadcast_to(weight.astype(v.dtype), v.shape)


def _inverse_rms(v, eps):
    return jax.lax.rsqrt(jnp.mean(v**2, axis=-1, keepdims=True) + eps)
