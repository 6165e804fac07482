"""The baseline: a Transformer, whose memory of the past grows with every token.

    r ← r + W_out softmax(q Kᵀ / √P) V        over all tokens so far
    r ← r + W_down(silu(W_gate u) ∘ W_up u)

with u = norm(r). The keys K and values V of every past token stay in a cache, and a
step reads the whole cache. Written like `model` and `generate`: one function for any
number of tokens, static shapes, one compiled loop, the cache updated in place. Sizes,
parameters and cache are in `kv_cache`.
Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; rotary positions: Su et
al. 2021 (arXiv 2104.09864); gated unit: Shazeer 2020 (arXiv 2002.05202).
"""

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib._checks import (
    check_integers,
    check_size,
    check_tokens,
)
from ssdlib.beyond.kv_cache import (
    AttentionConfig,
    KVCache,
    check_cache,
    check_model,
    init_cache,
    init_params,
)
from ssdlib.generate import Generation, Start, run, run_blocks
from ssdlib.model import ArrayLike
from ssdlib.params import Params
from ssdlib.platforms import linear, rms_norm
from ssdlib.sample import check_options

__all__ = [
    "AttentionConfig",
    "KVCache",
    "decode_step",
    "forward",
    "generate",
    "init_cache",
    "init_params",
    "prefill",
    "stream",
]

# --- the public functions: check, then run the compiled program ----------------------


def forward(
    params: Params, config: AttentionConfig, tokens: Int[ArrayLike, "b T"]
) -> Float[Array, "b T V"]:
    """Logits after every token. O(T²) work, and scores of H T² numbers per row."""
    check_model(params, config)
    tokens, _ = check_tokens(tokens, config.vocab_size)
    return _forward(params, config, tokens)


def prefill(
    params: Params,
    config: AttentionConfig,
    tokens: Int[ArrayLike, "b T"],
    cache: KVCache,
) -> tuple[Float[Array, "b V"], KVCache]:
    """Read many tokens: (logits after the last, the cache then).

    Continues from `cache` at any length; give a long prompt in pieces, as the scores
    take H T capacity numbers per row. Raises ValueError if tokens do not fit the model
    or the room left; inside a compiled program, where the length cannot be checked, too
    many tokens give NaN.
    """
    check_model(params, config)
    tokens, _ = check_tokens(tokens, config.vocab_size)
    check_cache(config, cache, *tokens.shape)
    return _prefill(params, config, tokens, cache)


def decode_step(
    params: Params, config: AttentionConfig, token: Int[ArrayLike, "b"], cache: KVCache
) -> tuple[Float[Array, "b V"], KVCache]:
    """Read one token per row: (logits after it, the next cache).

    About 2 FLOPs per parameter, and 4 H P capacity per layer. Errors as in `prefill`.
    """
    check_model(params, config)
    token = check_integers("token", token, ("b",), 0, config.vocab_size - 1)
    check_cache(config, cache, len(token), 1)
    return _prefill(params, config, token[:, None], cache)


def generate(
    params: Params,
    config: AttentionConfig,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    cache: KVCache | None = None,
    **limits,
) -> Generation:
    """`ssdlib.generate` for this model: the same loop, and the same limits of a draw.

    All rows of the prompt have one length. Without a cache, one is made that just holds
    all tokens; compiled once for each of its sizes. The one that you pass stays valid.
    Errors as in `prefill`.
    """
    start, options = _start(params, config, prompt, max_new_tokens, cache, limits)
    return run(_read, params, config, start, max_new_tokens, options)


def stream(
    params: Params,
    config: AttentionConfig,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    cache: KVCache | None = None,
    block: int = 16,
    **limits,
) -> Iterator[np.ndarray]:
    """`ssdlib.stream` for this model."""
    check_size("block", block)
    start, options = _start(params, config, prompt, max_new_tokens, cache, limits)
    return run_blocks(_read, params, config, start, max_new_tokens, options, block)


def _start(params, config, prompt, n, cache, limits):
    """Check the arguments; make a cache for the program to consume, or copy it."""
    check_model(params, config)
    prompt, _ = check_tokens(prompt, config.vocab_size, name="prompt")
    check_size("max_new_tokens", n)
    options = check_options(config.vocab_size, **limits)
    (b, T), goes_on = prompt.shape, cache is not None
    if goes_on:
        check_cache(config, cache, b, T + n - 1)
        cache = jax.tree.map(jnp.copy, cache)
    else:
        cache = init_cache(config, b, T + n, params["embedding"].dtype)
    return Start.of(prompt, None, cache, goes_on, options.eos_id), options


@partial(jax.jit, static_argnames="config")
def _forward(params, config, tokens):
    cache = init_cache(config, *tokens.shape, params["embedding"].dtype)
    return _head(params, config, _backbone(params, config, tokens, cache)[0])


def _read(params, config, tokens, cache, lengths=None):
    """`prefill` unchecked. Rows that have ended (of length 0) read along, unseen."""
    r, cache = _backbone(params, config, tokens, cache)
    return _head(params, config, r[:, -1]), cache


_prefill = jax.jit(_read, static_argnames="config")


# --- the model, from the outside in --------------------------------------------------


def _backbone(params, config, tokens, cache):
    """Embed, then every layer: (residual (b, T, d_model) in float32, cache)."""
    dtype, start = params["embedding"].dtype, cache.length
    r = params["embedding"][tokens].astype(jnp.float32)
    k, v = [], []
    for i, p in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{i}"):
            u = rms_norm(r, p["norm"], config.norm_eps).astype(dtype)
            out, k_i, v_i = _attention(p, config, u, cache.k[i], cache.v[i], start)
            r = r + out.astype(r.dtype)
            u = rms_norm(r, p["ff_norm"], config.norm_eps).astype(dtype)
            u = jax.nn.silu(linear(p["gate"], u, dtype)) * linear(p["up"], u, dtype)
            r = r + linear(p["down"], u, dtype).astype(r.dtype)
        k.append(k_i)
        v.append(v_i)
    end = start + tokens.shape[1]
    r = jnp.where(end <= cache.capacity, r, jnp.nan)  # never a wrong token in silence
    return r, KVCache(tuple(k), tuple(v), end)


def _head(params, config, r):
    """Final norm and the product with the tied embedding: logits in float32."""
    embedding = params["embedding"]
    u = rms_norm(r, params["norm"], config.norm_eps).astype(embedding.dtype)
    return linear(embedding, u, r.dtype)


def _attention(p, config, u, k, v, start):
    """Causal attention of u (b, T, d_model) to the cache and itself: (output, k, v)."""
    (b, T, _), G, P = u.shape, config.n_kv_heads, config.head_dim
    R = config.n_heads // G  # query heads that share one head of keys and values

    def heads(W, R):  # (b, T, d_model) -> (b G, R, T, P)
        w = linear(W, u, u.dtype).reshape(b, T, G, R, P).transpose(0, 2, 3, 1, 4)
        return w.reshape(b * G, R, T, P)

    position = start + jnp.arange(T)
    q = _rotate(heads(p["q"], R), position, config.rope_base).reshape(b * G, R * T, P)
    k_new = _rotate(heads(p["k"], 1), position, config.rope_base)[:, 0]
    v_new = heads(p["v"], 1)[:, 0]
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        for old, new in ((k, k_new), (v, v_new))
    )

    f32 = jnp.float32
    scores = jnp.einsum("nlp,nsp->nls", q, k, preferred_element_type=f32)
    seen = jnp.arange(k.shape[1])[None] <= jnp.tile(position, R)[:, None]
    scores = jnp.where(seen[None], scores / math.sqrt(P), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("nls,nsp->nlp", weights, v, preferred_element_type=f32)
    y = y.reshape(b, G, R, T, P).transpose(0, 3, 1, 2, 4).reshape(b, T, -1)
    return linear(p["out"], y.astype(u.dtype), u.dtype), k, v


def _rotate(w, position, base):
    """Turn each pair of channels (i, i + P/2) by position · base^(-2i/P).

    Scores then depend on the distance of two tokens, not on where they are.
    """
    half = w.shape[-1] // 2
    rate = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, None] * rate[None]
    angle = angle.reshape((1,) * (w.ndim - 2) + angle.shape)
    x, y = jnp.split(w.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([x * cos - y * sin, x * sin + y * cos], axis=-1)
    return turned.astype(w.dtype)
