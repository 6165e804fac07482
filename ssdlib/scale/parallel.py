"""Mamba-2 over a mesh of devices: one program, `model.read`, on each of them.

`data` sends nothing. On `model` each device is a smaller model, and one sum of all
per layer makes the residual whole. On `seq` each device scans its segment of the tokens
from a zero state, and the pairs (decay, state) that segments leave behind are combined
across devices. What crosses is in `platforms`; parameters and caches come from
`sharding`.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 8.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ssdlib._checks import (
    check_integers,
    check_is,
    check_size,
    check_tokens,
    is_traced,
)
from ssdlib.cache import Cache
from ssdlib.cache import check_cache as check_one_device
from ssdlib.model import ArrayLike, read
from ssdlib.params import Mamba2Config, Params, init_params
from ssdlib.platforms import Axes
from ssdlib.scale.sharding import (
    AnyMesh,
    _rows,
    cache_shapes,
    cache_spec,
    check_batch,
    check_cache,
    check_params,
    init_cache,
    local_config,
    map_params,
    shard_by_head,
    spec,
)

__all__ = [
    "bytes_sent",
    "compile_over",
    "decode_step",
    "gather_cache",
    "prefill",
    "scatter_cache",
]

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

    Any T: it is filled up to equal segments with tokens that change nothing. Raises
    ValueError as `ssdlib.prefill` does, and if `data` does not divide b.
    """
    check_is("config", config, Mamba2Config)
    tokens, lengths = check_tokens(tokens, config.vocab_size, lengths)
    check_batch(mesh, len(tokens))
    check_params(params, config, mesh)
    (b, T), seq = tokens.shape, mesh.shape["seq"]
    if cache is None:
        cache = init_cache(config, mesh, b, params["embedding"].dtype)
    check_cache(config, mesh, cache, b)
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
    check_is("config", config, Mamba2Config)
    token = check_integers("token", token, ("b",), 0, config.vocab_size - 1)
    check_batch(mesh, len(token))
    check_params(params, config, mesh)
    check_cache(config, mesh, cache, len(token))
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


# --- what is sent ---------------------------------------------------------------------


def bytes_sent(
    config: Mamba2Config, mesh: AnyMesh, b: int, T: int, itemsize: int = 4
) -> dict[str, int]:
    """Bytes that one device puts into collectives, by kind, for `prefill` of (b, T).

    On `model`: an all-reduce of 4 b T d_model for the embedding and for each layer;
    with fewer groups than devices, one of 4 G b T a layer for the norm. On `seq`, for
    each layer: permutes of ⌈log₂ n⌉ pairs of b H (P N + 1) numbers (the last round
    needs no decay), of one state, and of d_conv - 1 rows of the convolution; an
    all-reduce of the final state and rows; once, of the last token. b, T and H are
    those of one device.

    T = 1 is `decode_step`. `compiler.cost.collectives` counts the same in a compiled
    program. What is counted is the payload: a ring all-reduce of it
    sends 2 (n - 1)/n times as much. Where products need less than float32, a compiler
    may send the state that enters a segment in bfloat16. Not counted: logits, which are
    gathered if n does not divide the vocabulary.
    """
    check_batch(mesh, b, "b")
    check_size("T", T)
    check_size("itemsize", itemsize)
    local, seq = local_config(config, mesh), mesh.shape["seq"]
    model, L, d = mesh.shape["model"], config.n_layers, config.d_model
    split = seq > 1 and T > 1
    b, T = b // mesh.shape["data"], segment(config, T, seq) if split else T
    sent: Counter = Counter()
    if model > 1:
        sent["all-reduce"] += 4 * b * T * d * (L + 1)
    if model > config.n_groups:
        sent["all-reduce"] += 4 * config.n_groups * b * T * L
    if split:
        state = 4 * b * local.n_heads * config.head_dim * config.d_state
        conv = itemsize * b * (config.d_conv - 1) * local.d_xBC
        rounds = (seq - 1).bit_length()
        pairs = rounds * state + (rounds - 1) * 4 * b * local.n_heads
        sent["collective-permute"] += L * (pairs + state + conv)
        sent["all-reduce"] += L * (state + conv) + 4 * b * d
    return dict(sent)


def compile_over(config: Mamba2Config, mesh: Mesh, b: int, T: int, dtype=jnp.float32):
    """`prefill` of (b, T), or `decode_step` for T = 1, compiled for a mesh.

    Its devices may be absent, as those of `compiler.targets.tpu_slice`. Returns jax's
    compiled object.
    """
    local_config(config, mesh)
    check_batch(mesh, b, "b")
    check_size("T", T)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    function, shape = (prefill, (b, T)) if T > 1 else (decode_step, (b,))
    program = jax.jit(
        lambda params, tokens, cache: function(params, config, mesh, tokens, cache),
        donate_argnums=2,
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    cache = cache_shapes(config, mesh, b, dtype)
    return program.lower(shard_by_head(shapes, config, mesh), tokens, cache).compile()


def scatter_cache(cache: Cache, config: Mamba2Config, mesh: Mesh) -> Cache:
    """A cache of one device laid out over a mesh, to go on from with `prefill` here.

    Raises ValueError for another model, or if the mesh does not fit it or the batch.
    """
    check_is("cache", cache, Cache)
    check_is("config", config, Mamba2Config)
    check_one_device(config, cache, *(jnp.shape(cache.length)[:1] or [1]))
    check_batch(mesh, len(cache.length))
    moved = replace(cache, conv=np.asarray(cache.conv)[..., _channels(config, mesh)])
    places = jax.tree.map(partial(NamedSharding, mesh), cache_spec(config))
    return jax.tree.map(jax.device_put, moved, places)


def gather_cache(cache: Cache, config: Mamba2Config, mesh: Mesh) -> Cache:
    """The inverse of `scatter_cache`: arrays in the order of `ssdlib`, on the host.

    Raises ValueError for a cache that is not laid out for this mesh and model.
    """
    check_is("cache", cache, Cache)
    check_cache(config, mesh, cache, *(jnp.shape(cache.length)[:1] or [1]))
    conv = np.empty((*cache.conv.shape[:3], config.d_xBC), cache.conv.dtype)
    conv[..., _channels(config, mesh)] = np.asarray(cache.conv)
    return jax.tree.map(np.asarray, replace(cache, conv=conv))


def _channels(config, mesh) -> list[int]:
    """Which channel of one device lies at each place of a mesh's convolution."""
    devices = range(mesh.shape["model"])
    rows = (pair for i in devices for pair in _rows(config, mesh, "conv", i))
    return [channel for a, b in rows for channel in range(a, b)]
