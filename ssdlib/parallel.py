"""Mamba-2 over a mesh of devices: one program, `model.read`, on each of them.

`data` sends nothing. On `model` each device is a smaller model, and one sum of all
per layer makes the residual whole. On `seq` each device scans its segment of the tokens
from a zero state, and the pairs (decay, state) that segments leave behind are combined
across devices. What crosses is in `platforms`; parameters and caches come from
`sharding`.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 8.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ssdlib._checks import (
    as_int32,
    check_integers,
    check_range,
    check_tokens,
    is_traced,
)
from ssdlib.cache import Cache
from ssdlib.config import Mamba2Config
from ssdlib.model import ArrayLike, read
from ssdlib.params import Params
from ssdlib.platforms import Axes
from ssdlib.sharding import (
    cache_spec,
    check_batch,
    check_cache,
    check_params,
    init_cache,
    map_params,
    spec,
)

__all__ = ["decode_step", "prefill"]

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
    tokens, lengths = as_int32(tokens, lengths)
    if lengths is None:
        lengths = np.full(b, T, np.int32)
    pad = jnp.pad if is_traced(tokens) else np.pad
    tokens = pad(tokens, [(0, 0), (0, seq * segment(config, T, seq) - T)])
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
    (token,) = as_int32(token)
    return _run(params, config, mesh, token[:, None], cache, None, False)


@partial(jax.jit, static_argnames=("config", "mesh", "split"))
def _run(params, config, mesh, tokens, cache, lengths, split):
    """`model.read` on every device; with `split`, tokens are cut in segments."""
    caches, axes = cache_spec(config), Axes("model", "seq" if split else None)
    device = jax.shard_map(
        lambda params, *args: read(params, config, *args, axes),
        mesh=mesh,
        in_specs=(
            map_params(lambda _, key, value: spec(key), params),
            PartitionSpec("data", axes.seq),
            caches,
            PartitionSpec("data"),
        ),
        out_specs=(PartitionSpec("data", "model"), caches),
    )
    logits, cache = device(params, tokens, cache, lengths)
    return logits[:, : config.vocab_size], cache


def segment(config, T, seq) -> int:
    """Tokens a device; never fewer than the convolution looks back, and never one."""
    return T if seq == 1 else max(-(-T // seq), config.d_conv - 1, 2)
