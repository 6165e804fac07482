"""The O(1) cache: all that a Mamba-2 model remembers of its past.

    numbers a row = n_layers (H P N + (d_conv - 1) d_xBC) + 1

For each layer, the state of its recurrence and the last inputs of its convolution, and
one count of the tokens read: as many numbers after one token as after a million.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; reference code
github.com/state-spaces/mamba at e9594ce, mamba_ssm/modules/mamba2.py.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ssdlib._checks import check_is, check_size, described, floating
from ssdlib.params import Mamba2Config
from ssdlib.recurrence import accumulator

__all__ = ["Cache", "fork", "init_cache"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All that a model remembers of its past.

    conv:   the last inputs of all convolutions, (b, n_layers, d_conv - 1, d_xBC).
    h:      the SSM states in float32, one (b, H, P, N) per layer.
    length: tokens that each row has read, (b,) int32.
    A registered pytree; rows of the batch come first in every array. Its size does not
    depend on how many tokens were read. The conv states are in one array, so that one
    operation a step updates those of all layers.
    """

    conv: Any  # no array types here: a pytree may also hold shapes or shardings
    h: tuple
    length: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def init_cache(config: Mamba2Config, batch_size: int, dtype=jnp.float32) -> Cache:
    """The cache before the first token: zeros. h is float32 (float64 if dtype is).

    Raises ValueError for a wrong config, batch_size or dtype.
    """
    check_is("config", config, Mamba2Config)
    check_size("batch_size", batch_size)
    dtype = floating(dtype)
    conv, h = _shapes(config, batch_size)
    h_dtype = accumulator(dtype)
    return Cache(
        conv=jnp.zeros(conv, dtype),
        h=tuple(jnp.zeros(h, h_dtype) for _ in range(config.n_layers)),
        length=jnp.zeros(batch_size, jnp.int32),
    )


def fork(cache: Cache, n: int) -> Cache:
    """n copies of every row, side by side: n continuations of one past.

    Row i becomes rows i n to i n + n - 1, and each goes on by itself; no text is read
    again, and your cache stays valid. Raises ValueError unless cache is one and n is an
    integer of at least 1.
    """
    check_is("cache", cache, Cache)
    check_size("n", n)
    return jax.tree.map(lambda v: jnp.repeat(v, n, axis=0), cache)


def _shapes(config, b) -> tuple[tuple, tuple]:
    """Of conv, and of h in one layer."""
    conv = (b, config.n_layers, config.d_conv - 1, config.d_xBC)
    return conv, (b, config.n_heads, config.head_dim, config.d_state)


def causal_conv(v, conv, weight, lengths):
    """Depthwise convolution that starts from the conv state: (output, last inputs).

    out_t = Σ_k weight_k input_{t-K+k} over K = d_conv - 1 past inputs, those before
    the first token from the conv state. The last inputs are up to K, and end at each
    row's last real token; of one token it is always that one.
    """
    T, K = v.shape[1], conv.shape[1]
    window = jnp.concatenate([conv.astype(v.dtype), v], axis=1)
    out = sum(window[:, k : k + T] * weight[None, None, :, k] for k in range(K + 1))
    if lengths is None or T == 1:
        return out, window[:, max(T, K) :]
    index = lengths[:, None] + jnp.arange(K, dtype=jnp.int32)[None]
    return out, jnp.take_along_axis(window, index[..., None], axis=1)


def append_inputs(conv, new):
    """The conv states of all layers after new inputs, a list of one array per layer."""
    new = jnp.stack(new, axis=1).astype(conv.dtype)
    return jnp.concatenate([conv, new], axis=2)[:, :, new.shape[2] :]


def check_cache(config: Mamba2Config, cache: Cache, batch_size: int) -> None:
    """Raise ValueError unless the cache belongs to this model and batch size."""
    conv, h = _shapes(config, batch_size)
    check_layout(cache, conv, [h] * config.n_layers, "this model and batch need")


def check_layout(cache, conv, h, who: str) -> None:
    """Raise ValueError unless the cache's arrays have these shapes, and h its dtype."""
    check_is("cache", cache, Cache)
    if not isinstance(cache.h, tuple):
        raise ValueError(f"cache: h is {described(cache.h)}; it must be a tuple")
    for v in cache.h:
        if v.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(f"cache: h is {v.dtype}; it must be float32 or float64")
    got = jnp.shape(cache.conv), [jnp.shape(v) for v in cache.h]
    if got != (conv, h) or jnp.shape(cache.length) != conv[:1]:
        at, need = ((conv, len(h), h[:1]) for conv, h in (got, (conv, h)))
        raise ValueError(f"cache: (conv, layers, h) is {at}; {who} {need}")
