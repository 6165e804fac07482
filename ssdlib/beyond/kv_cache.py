"""The baseline's sizes, parameters, and its cache of keys and values, which grows.

    numbers a row = 2 n_layers G P (tokens read)

Keys and values of every token are kept for G heads, one for all H or fewer.
Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; shared keys and values:
Ainslie et al. 2023 (arXiv 2305.13245).
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ssdlib._checks import check_fields, check_is, check_key, check_size, floating
from ssdlib.params import Mamba2Config, Params, check_params, random_matrix
from ssdlib.params import init_params as init_mamba_params

__all__ = ["AttentionConfig", "KVCache", "init_cache", "init_params"]


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
        check_fields(self)
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
    check_is("config", config, AttentionConfig)
    for name, size in (("batch_size", batch_size), ("max_len", max_len)):
        check_size(name, size)
    dtype = floating(dtype)
    shape = (batch_size * config.n_kv_heads, max_len, config.head_dim)
    k, v = (
        tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in "kv"
    )
    return KVCache(k, v, jnp.zeros((), jnp.int32))


def init_params(config: AttentionConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters as a plain pytree: matrices (outputs, inputs) in `dtype`."""
    check_is("config", config, AttentionConfig)
    check_key(key)
    dtype = floating(dtype)
    d, f32 = config.d_model, jnp.float32
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    residual = 1 / math.sqrt(2 * config.n_layers)
    matrix = partial(random_matrix, dtype)

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


def check_model(params, config) -> None:
    """Raise ValueError unless config is one, and params are its parameters."""
    check_is("config", config, AttentionConfig)
    check_params(params, config)


def check_cache(config, cache, b, T) -> None:
    """Raise ValueError unless the cache fits the model and has room for T more."""
    check_is("cache", cache, KVCache)
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
