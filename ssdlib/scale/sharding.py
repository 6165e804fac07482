"""Mamba-2 over a mesh of devices: what each of them holds.

A mesh has three axes, and any of them may be 1. `data` splits the batch, `model` splits
heads with their groups and projections, `seq` the tokens of a prefill. `parallel` runs
on it; `shard_as_is` is for all other functions of the library.

Split by heads, the rows of W_in are a mixture: z, x and dt go by head, B and C by
group. Here device i of `model` holds its own [z_i; x_i; B_i; C_i; dt_i] one below the
other, and with them its channels of the convolution, so that no activation is moved to
where its head is. With fewer groups than devices, each device with heads of a group
holds and computes its B and C. Names and axes are those of `model`.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 8.1; Shoeybi et al. 2019 (arXiv
1909.08053), section 3, for the split of the projections.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ssdlib import cache as one_device
from ssdlib._checks import check_is, check_parts, check_size, described, is_traced
from ssdlib.cache import Cache, check_layout
from ssdlib.checkpoint.weights import open_slices
from ssdlib.int8 import Int8Matrix
from ssdlib.params import Mamba2Config, Params
from ssdlib.params import check_params as check_tree

__all__ = ["init_cache", "load", "make_mesh", "shard_as_is", "shard_by_head"]

AXES = "data", "seq", "model"
AnyMesh = Mesh | AbstractMesh  # where sizes alone are asked for, no devices are needed


def make_mesh(data: int = 1, seq: int = 1, model: int = 1, devices=None) -> Mesh:
    """A mesh with the axes (data, seq, model); `devices` may be those of a topology.

    Neighbors on `model`, which talk most, are nearest to each other. Raises ValueError
    for sizes below 1 or beyond the devices.
    """
    for name, size in (("data", data), ("seq", seq), ("model", model)):
        check_size(name, size)
    devices = jax.devices() if devices is None else devices
    check_is("devices", devices, tuple, list)
    if not all(hasattr(d, "device_kind") for d in devices):
        raise ValueError(f"devices: {devices}; each must be a device of jax")
    if data * seq * model > len(devices):
        raise ValueError(
            f"devices: {len(devices)}; a mesh of {data} x {seq} x {model} needs more"
        )
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, seq, model), AXES, devices=devices, axis_types=auto)


# --- what each device holds ----------------------------------------------------------

AXIS = {"out": 1, "out_scale": None, "norm": None, "out_bias": None}  # split; else 0
PER_HEAD = {"dt_bias", "A_log", "D"}


def local_config(config: Mamba2Config, mesh: AnyMesh) -> Mamba2Config:
    """The smaller model that one device of `model` runs: H/n heads, G/n groups or 1.

    Raises ValueError if n does not divide the heads, or neither of n and G the other.
    """
    check_is("config", config, Mamba2Config)
    check_mesh(mesh)
    n, H, G = mesh.shape["model"], config.n_heads, config.n_groups
    if H % n or (G % n and n % G):
        raise ValueError(
            f"mesh: model = {n}; it must divide n_heads = {H}, and n_groups = {G} or "
            "be a multiple of it"
        )
    return replace(config, n_heads=H // n, n_groups=max(G // n, 1))


def _rows(config, mesh: AnyMesh, key: str, i: int) -> list[tuple[int, int]]:
    """The rows (columns of `out`) of a parameter that device i of `model` holds."""
    n, H, N, V = mesh.shape["model"], config.n_heads, config.d_state, config.vocab_size
    key = key.removesuffix("_scale")
    if key in ("embedding", "head"):
        v = -(-V // n)  # the last devices are filled up with zeros
        return [(min(i * v, V), min((i + 1) * v, V))]
    local, G, d = local_config(config, mesh), config.n_groups, config.d_inner
    heads = i * H // n, local.n_heads
    channels = [(d, heads, config.head_dim)]  # of x; those of z are as many
    channels += 2 * [(G * N, (i * G // n, local.n_groups), N)]  # B, C
    if key in ("in", "in_bias"):
        parts = [channels[0], *channels, (H, heads, 1)]
    elif key in ("conv", "conv_bias"):
        parts = channels
    else:
        parts = [(0, heads, 1 if key in PER_HEAD else config.head_dim)]
    rows, start = [], 0
    for size, (first, count), width in parts:
        rows.append((start + first * width, start + (first + count) * width))
        start += size
    return rows


def spec(key: str) -> PartitionSpec:
    """How a parameter is split: over `model` or not at all."""
    axis = AXIS.get(key, 0)
    return PartitionSpec(*() if axis is None else (*[None] * axis, "model"))


def map_params(fn, params: Params) -> Params:
    """fn(layer or None, key, value) for every parameter, twice for one in int8."""

    def over(i, part):
        return {k: _parts(partial(fn, i), k, v) for k, v in part.items()}

    layers = tuple(over(i, layer) for i, layer in enumerate(params["layers"]))
    rest = {k: v for k, v in params.items() if k != "layers"}
    return over(None, rest) | {"layers": layers}


def _parts(fn, key, *of):
    if isinstance(of[0], Int8Matrix):
        scales = fn(f"{key}_scale", *(v.scale for v in of))
        return Int8Matrix(fn(key, *(v.values for v in of)), scales)
    return fn(key, *of)


def _place(config, mesh, key, value, read):
    """One parameter as a global array of which this process makes its own shards.

    `read(index)` returns the part of the parameter that a tuple of slices selects;
    `value` gives shape and dtype. Without `read` it becomes a ShapeDtypeStruct.
    """
    axis, shape, size = AXIS.get(key, 0), list(value.shape), value.shape[0]
    sharding = NamedSharding(mesh, spec(key))
    if axis is not None:
        size = sum(b - a for a, b in _rows(config, mesh, key, 0))
        shape[axis] = size * mesh.shape["model"]
    if read is None:
        return jax.ShapeDtypeStruct(shape, value.dtype, sharding=sharding)

    parts: dict = {}  # devices that differ in `data` or `seq` hold the same part

    def part(index):
        i = 0 if axis is None else (index[axis].start or 0) // size
        if i not in parts:
            rows = [(0, shape[0])] if axis is None else _rows(config, mesh, key, i)
            before = (slice(None),) * (axis or 0)
            pieces = [read((*before, slice(a, b))) for a, b in rows if a < b]
            if (rest := size - sum(b - a for a, b in rows)) and axis is not None:
                pieces.append(np.zeros((rest, *shape[1:]), value.dtype))
            parts[i] = np.concatenate(pieces, axis or 0)
        return parts[i]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def shard_by_head(params: Params, config: Mamba2Config, mesh: Mesh) -> Params:
    """Lay out parameters over a mesh, as `prefill` and `decode_step` here want them.

    Works on arrays that each process has whole, and on `ShapeDtypeStruct`s: those gain
    a sharding and can be compiled for a mesh of absent devices. Raises ValueError if
    the mesh does not fit the model.
    """
    local_config(config, mesh)
    check_tree(params)

    def place(_, key, value):
        if isinstance(value, jax.ShapeDtypeStruct):
            return _place(config, mesh, key, value, None)
        return _place(config, mesh, key, value, np.asarray(value).__getitem__)

    return map_params(place, params)


def load(
    source, mesh: Mesh, dtype=jnp.float32, revision: str | None = None
) -> tuple[Params, Mamba2Config]:
    """`ssdlib.load` onto a mesh: each process reads the slices of its own devices.

    Beside its shards a process holds the slices of one parameter at a time. Needs
    safetensors. Names and shapes are checked as in `ssdlib.load`, values where read.
    Raises ValueError and OSError as there, and ValueError if the mesh does not fit.
    """
    config, parts = open_slices(source, dtype, revision)
    local_config(config, mesh)
    params: dict = {"layers": tuple({} for _ in range(config.n_layers))}
    for (layer, key), (value, read) in parts.items():
        place = params if layer is None else params["layers"][layer]
        place[key] = _parts(partial(_place, config, mesh), key, value, read)
    return params, config


def shard_as_is(tree: Params | Cache, mesh: Mesh) -> Params | Cache:
    """Lay out parameters, or a cache, for `forward`, `prefill` and `generate`.

    They run on a mesh as they are: XLA sees where the arrays lie and adds what must be
    sent. `model` splits parameters, `data` the rows of a cache. Rows of W_in keep the
    order of `ssdlib.model`, so its parts straddle devices and more is sent than by
    `parallel`. What an axis does not divide lies whole on every device. Raises
    ValueError for any other tree or mesh, if `data` does not divide the batch, and on
    jax 0.7 if `model` leaves parts of unequal size: its XLA computes those wrongly.
    """
    check_mesh(mesh)
    n = mesh.shape["model"]

    def put(v, *axes):
        fits = (
            axis if axis and v.shape[i] % mesh.shape[axis] == 0 else None
            for i, axis in enumerate(axes)
        )
        return jax.device_put(v, NamedSharding(mesh, PartitionSpec(*fits)))

    if not isinstance(tree, Cache):
        check_tree(tree, name="tree")
        for p in tree["layers"]:
            check_parts(n, *(len(p[key]) for key in ("A_log", "gate_norm", "conv")))
        return map_params(lambda _, key, v: put(v, *spec(key)), tree)
    check_batch(mesh, len(tree.length))
    for v in tree.h:
        check_parts(n, v.shape[1], v.shape[1] * v.shape[2], tree.conv.shape[-1])
    h = tuple(put(v, "data", "model") for v in tree.h)
    return Cache(conv=put(tree.conv, "data"), h=h, length=put(tree.length, "data"))


def cache_spec(config: Mamba2Config) -> Cache:
    """How a cache is split: rows over `data`, channels and heads over `model`."""
    h = PartitionSpec("data", "model")
    conv, length = PartitionSpec("data", None, None, "model"), PartitionSpec("data")
    return Cache(conv=conv, h=(h,) * config.n_layers, length=length)


def init_cache(
    config: Mamba2Config, mesh: Mesh, batch_size: int, dtype=jnp.float32
) -> Cache:
    """`ssdlib.init_cache` over a mesh. Channels of conv lie as in `shard_by_head`.

    Raises ValueError if `data` does not divide the batch size.
    """
    shapes = cache_shapes(config, mesh, batch_size, dtype)
    return jax.tree.map(lambda v: jnp.zeros_like(v, device=v.sharding), shapes)


def cache_shapes(config, mesh, batch_size, dtype=jnp.float32) -> Cache:
    """`init_cache` as `ShapeDtypeStruct`s, to compile with."""
    check_batch(mesh, batch_size)
    local, n = local_config(config, mesh), mesh.shape["model"]
    cache = jax.eval_shape(lambda: one_device.init_cache(config, batch_size, dtype))
    conv = (*cache.conv.shape[:3], n * local.d_xBC)
    cache = replace(cache, conv=jax.ShapeDtypeStruct(conv, cache.conv.dtype))

    def struct(v, at):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, at))

    return jax.tree.map(struct, cache, cache_spec(config))


def check_mesh(mesh) -> None:
    """Raise ValueError unless mesh has the axes of `make_mesh`."""
    if not isinstance(mesh, AnyMesh) or set(mesh.axis_names) != {*AXES}:
        is_mesh = isinstance(mesh, AnyMesh)
        was = f"axes {mesh.axis_names}" if is_mesh else described(mesh)
        raise ValueError(f"mesh: {was}; it must have the axes {', '.join(AXES)}")


def check_batch(mesh, b, name="batch_size") -> None:
    """Raise ValueError unless `data` divides the batch."""
    check_mesh(mesh)
    check_size(name, b)
    if b % mesh.shape["data"]:
        raise ValueError(
            f"mesh: data = {mesh.shape['data']}; it must divide the batch size {b}"
        )


def check_params(params, config, mesh) -> None:
    """Raise ValueError unless `shard_by_head` or `load` laid out params for this mesh.

    Rows of W_in in the order of `model` can have the same shape and compute nonsense.
    """
    check_is("config", config, Mamba2Config)
    check_mesh(mesh)
    check_tree(params)
    embedding = jax.tree.leaves(params["embedding"])[0]
    if is_traced(embedding):
        return
    sharding = getattr(embedding, "sharding", None)
    if getattr(sharding, "mesh", None) != mesh:
        raise ValueError(
            f"params: laid out as {sharding}; they must come from shard_by_head or "
            "load of ssdlib.scale.sharding, with this mesh"
        )


def check_cache(config, mesh, cache, batch_size) -> None:
    """Raise ValueError unless the cache has this mesh's layout, model and batch."""
    want = cache_shapes(config, mesh, batch_size)
    conv, h = jax.tree.map(jnp.shape, (want.conv, list(want.h)))
    check_layout(cache, conv, h, "this mesh and batch need")
