"""The baseline: a Transformer, whose memory of the past grows with every token.

    r ← r + W_out softmax(q Kᵀ / √P) V        over all tokens so far
    r ← r + W_down(silu(W_gate u) ∘ W_up u)

with u = norm(r). The keys K and values V of every past token stay in a cache, and a
step reads the whole cache. Written like `model` and `generate`: one function for any
number of tokens, static shapes, one compiled loop, the cache updated in place.
Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; rotary positions: Su et
al. 2021 (arXiv 2104.09864); gated unit: Shazeer 2020 (arXiv 2002.05202); shared keys
and values: Ainslie et al. 2023 (arXiv 2305.13245).
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssdlib._checks import check_integers, check_range, check_tokens
from ssdlib.config import Mamba2Config
from ssdlib.generate import bucket
from ssdlib.model import ArrayLike, rms_norm
from ssdlib.params import Params
from ssdlib.params import init_params as init_mamba_params

__all__ = [
    "AttentionConfig",
    "KVCache",
    "decode_step",
    "forward",
    "generate",
    "init_cache",
    "init_params",
    "prefill",
]


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of a decoder-only Transformer. Frozen and hashable: a static jit argument.

    Raises ValueError if a size is not a positive integer, if head_dim is odd or if the
    key-value heads do not divide the heads.
    """

    vocab_size: int  # V
    d_model: int  # width of the residual stream
    n_layers: int
    n_heads: int  # H
    head_dim: int  # P
    n_kv_heads: int  # G, heads of keys and values; each serves H/G query heads
    d_ff: int  # width of the gated unit
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0

    def __post_init__(self):
        for name in (f.name for f in fields(self) if f.type is int):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: {size!r}; it must be a positive integer")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim}; it must be even")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads: {self.n_kv_heads}; it must divide n_heads ="
                f" {self.n_heads}"
            )

    @classmethod
    def like(cls, config: Mamba2Config, n_kv_heads: int | None = None):
        """A Transformer of the same width, head size and number of parameters.

        It has half as many layers: one layer here is two residual blocks, a Mamba-2
        layer is one. d_ff takes up what parameters are left, to within half a unit.
        n_kv_heads None gives every head its own keys and values.
        """
        n_heads = max(1, config.d_model // config.head_dim)
        sizes = (config.vocab_size, config.d_model, max(1, config.n_layers // 2))
        sizes = (*sizes, n_heads, config.head_dim, n_kv_heads or n_heads)

        def count(init, config):
            shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
            return sum(leaf.size for leaf in jax.tree.leaves(shapes))

        one, two = (count(init_params, cls(*sizes, d_ff)) for d_ff in (1, 2))
        spare = count(init_mamba_params, config) - one
        return cls(*sizes, max(1, 1 + round(spare / (two - one))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the past, one pair of arrays per layer, and how many they are.

    k, v:   each (b G, capacity, P): room for `capacity` tokens from the start, so that
            shapes stay static.
    length: tokens read so far.
    Batch and heads share one axis, so that the products need no reshape. With four axes
    jax 0.10.2 on a CPU copies the whole cache at every step of a loop.
    """

    k: tuple  # no array types here: a pytree may also hold shapes or shardings
    v: tuple
    length: object  # an int32 scalar array

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.k[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: proportional to the capacity."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def init_cache(
    config: AttentionConfig, batch_size: int, max_len: int, dtype=jnp.float32
) -> KVCache:
    """An empty cache with room for max_len tokens per row.

    A step reads all of it, full or not: make it no longer than the context.
    Raises ValueError if a size is below 1.
    """
    for name, size in (("batch_size", batch_size), ("max_len", max_len)):
        if size < 1:
            raise ValueError(f"{name}: {size}; it must be at least 1")
    shape = (batch_size * config.n_kv_heads, max_len, config.head_dim)
    k, v = (
        tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in "kv"
    )
    return KVCache(k, v, jnp.zeros((), jnp.int32))


def init_params(config: AttentionConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters as a plain pytree: matrices (outputs, inputs) in `dtype`."""
    d, f32 = config.d_model, jnp.float32
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    residual = 1 / math.sqrt(2 * config.n_layers)

    def matrix(key, outputs, inputs, scale=1.0):
        bound = scale / math.sqrt(inputs)
        return jax.random.uniform(key, (outputs, inputs), dtype, -bound, bound)

    def layer(key):
        keys = jax.random.split(key, 7)
        return {
            "norm": jnp.ones(d, f32),
            "q": matrix(keys[0], q, d),
            "k": matrix(keys[1], kv, d),
            "v": matrix(keys[2], kv, d),
            "out": matrix(keys[3], d, q, residual),
            "ff_norm": jnp.ones(d, f32),
            "gate": matrix(keys[4], config.d_ff, d),
            "up": matrix(keys[5], config.d_ff, d),
            "down": matrix(keys[6], d, config.d_ff, residual),
        }

    k_embed, *k_layers = jax.random.split(key, 1 + config.n_layers)
    return {
        "embedding": 0.02 * jax.random.normal(k_embed, (config.vocab_size, d), dtype),
        "layers": tuple(layer(k) for k in k_layers),
        "norm": jnp.ones(d, f32),
    }


# --- the public functions: check, then run the compiled program ----------------------


def forward(
    params: Params, config: AttentionConfig, tokens: Int[ArrayLike, "b T"]
) -> Float[Array, "b T V"]:
    """Logits after every token. O(T²) work, and scores of H T² numbers per row."""
    check_tokens(tokens, config.vocab_size)
    return _forward(params, config, jnp.asarray(tokens))


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
    check_tokens(tokens, config.vocab_size)
    _check_cache(config, cache, *tokens.shape)
    return _prefill(params, config, jnp.asarray(tokens), cache)


def decode_step(
    params: Params, config: AttentionConfig, token: Int[ArrayLike, "b"], cache: KVCache
) -> tuple[Float[Array, "b V"], KVCache]:
    """Read one token per row: (logits after it, the next cache).

    About 2 FLOPs per parameter, and 4 H P capacity per layer. Errors as in `prefill`.
    """
    check_integers("token", token, ("b",))
    check_range("token", token, 0, config.vocab_size - 1)
    _check_cache(config, cache, len(token), 1)
    return _prefill(params, config, jnp.asarray(token)[:, None], cache)


def generate(
    params: Params,
    config: AttentionConfig,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    cache: KVCache | None = None,
) -> tuple[Int[Array, "b n"], KVCache]:
    """Greedy continuation on the device: (max_new_tokens tokens per row, cache).

    One compiled program for each prompt length, capacity and bucket of max_new_tokens.
    Without a cache, one is made that just holds all tokens; the one that you pass stays
    valid. Errors as in `prefill`.
    """
    check_tokens(prompt, config.vocab_size, name="prompt")
    n, (b, T) = max_new_tokens, prompt.shape
    if n < 1:
        raise ValueError(f"max_new_tokens: {n}; it must be at least 1")
    if cache is None:
        cache = init_cache(config, b, T + n, params["embedding"].dtype)
    _check_cache(config, cache, b, T + n)
    cache = jax.tree.map(jnp.copy, cache)  # the program consumes its cache
    tokens, cache = _generate(params, config, jnp.asarray(prompt), cache, n, bucket(n))
    return tokens[:, :n], cache


@partial(jax.jit, static_argnames="config")
def _forward(params, config, tokens):
    cache = init_cache(config, *tokens.shape, params["embedding"].dtype)
    return _head(params, config, _backbone(params, config, tokens, cache)[0])


@partial(jax.jit, static_argnames="config")
def _prefill(params, config, tokens, cache):
    r, cache = _backbone(params, config, tokens, cache)
    return _head(params, config, r[:, -1]), cache


@partial(jax.jit, static_argnames=("config", "size"), donate_argnames="cache")
def _generate(params, config, prompt, cache, n, size):
    logits, cache = _prefill(params, config, prompt, cache)

    def step(i, carry):
        tokens, logits, cache = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits, cache = _prefill(params, config, token[:, None], cache)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, i, 1)
        return tokens, logits, cache

    tokens = jnp.zeros((len(prompt), size), jnp.int32)
    tokens, _, cache = jax.lax.fori_loop(0, n, step, (tokens, logits, cache))
    return tokens, cache


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
            u = jax.nn.silu(_linear(u, p["gate"])) * _linear(u, p["up"])
            r = r + _linear(u, p["down"]).astype(r.dtype)
        k.append(k_i)
        v.append(v_i)
    end = start + tokens.shape[1]
    r = jnp.where(end <= cache.capacity, r, jnp.nan)  # never a wrong token in silence
    return r, KVCache(tuple(k), tuple(v), end)


def _head(params, config, r):
    """Final norm and the product with the tied embedding: logits in float32."""
    embedding = params["embedding"]
    u = rms_norm(r, params["norm"], config.norm_eps).astype(embedding.dtype)
    return jnp.einsum("...d,vd->...v", u, embedding, preferred_element_type=r.dtype)


def _attention(p, config, u, k, v, start):
    """Causal attention of u (b, T, d_model) to the cache and itself: (output, k, v)."""
    (b, T, _), G, P = u.shape, config.n_kv_heads, config.head_dim
    R = config.n_heads // G  # query heads that share one head of keys and values

    def heads(W, R):  # (b, T, d_model) -> (b G, R, T, P)
        w = _linear(u, W).reshape(b, T, G, R, P).transpose(0, 2, 3, 1, 4)
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
    return _linear(y.astype(u.dtype), p["out"]), k, v


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


def _linear(u, W):
    """W u, with W stored as (outputs, inputs)."""
    return jnp.einsum("...i,oi->...o", u, W)


def _check_cache(config, cache, b, T) -> None:
    """Raise ValueError unless the cache fits the model and has room for T more."""
    want = (b * config.n_kv_heads, cache.capacity, config.head_dim)
    shapes = [jnp.shape(leaf) for leaf in (*cache.k, *cache.v)]
    if shapes != [want] * (2 * config.n_layers):
        raise ValueError(
            f"cache: {len(cache.k)} layers of {shapes[0]}; this model and batch need"
            f" {config.n_layers} of {want}"
        )
    hidden = isinstance(cache.length, jax.core.Tracer)  # inside a compiled program
    length = 0 if hidden else int(cache.length)
    if length + T > cache.capacity:
        raise ValueError(
            f"cache: {length} of {cache.capacity} tokens are taken; {T} more do not fit"
        )
