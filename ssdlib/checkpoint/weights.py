"""Checkpoints in and out, in both published layouts.

`load` reads the layout of `transformers` (safetensors) and the original one of
`mamba_ssm` (config.json with ssm_cfg); `save` writes the first. Strict both ways: every
tensor of a file must be used, every parameter filled, every shape equal. `tensor_files`
has the formats.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from ssdlib._checks import check_is, floating
from ssdlib.checkpoint.config_json import QUANTIZED, load_config, to_json
from ssdlib.checkpoint.hub import resolve, weight_files
from ssdlib.checkpoint.tensor_files import headers
from ssdlib.int8 import Int8Matrix
from ssdlib.params import MATRICES, Mamba2Config, Params, check_params, is_int8

__all__ = ["load", "save"]

FLOAT32 = {"norm", "gate_norm", "A_log", "D", "dt_bias"}  # whatever dtype is asked for
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"

Place = tuple[int | None, str]  # (layer, or None for the model itself; parameter)


def load(
    source: str | Path, dtype=jnp.float32, revision: str | None = None
) -> tuple[Params, Mamba2Config]:
    """(params, config) from "tiny", a folder, a weight file or a hub id.

    "tiny" is the byte-level model inside this package. A hub id such as
    "org/name" is downloaded once, through the `huggingface_hub` cache, at `revision`.
    Matrices are converted to `dtype`; decays, skips and norms are float32. With "int8"
    matrices are those of `quantize`, and all else is float32. Names and shapes are
    checked before any weight is read, and weights are read one by one, so the peak of
    memory is one copy of the model and its largest tensor. In a terminal, loads of more
    than two seconds show their progress.

    Raises OSError for a missing file, ImportError where a format needs torch, and
    ValueError that names the tensor or key for anything unknown, missing, double,
    misshapen, not finite or unreadable.
    """
    dtype = _of_weights(dtype)
    config, stored, want = _open(source, revision)
    return _read(config, stored, want, dtype), config


def open_slices(
    source: str | Path, dtype=jnp.float32, revision: str | None = None
) -> tuple[Mamba2Config, dict[Place, tuple[jax.ShapeDtypeStruct, Callable]]]:
    """(config, parameter -> (its shape and dtype, a function that reads a part of it)).

    For a matrix of eight bits, both are of its values and of its scale.

    The function takes a tuple of slices and reads only those bytes, as an array in
    NumPy. Names and shapes are checked here as in `load`, values as they are read.
    Raises as `load` does, and ValueError for a format that has no slices.
    """
    dtype = _of_weights(dtype)
    config, stored, want = _open(source, revision)
    out: dict = {}
    for name, (place, shape) in want.items():
        file, _, read = stored[name]
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file}: no slices; convert it once with ssdlib.save")
        copy = stored.get(HEAD) if name == EMBEDDING and config.tie_embeddings else None
        kind = _kind(place[1], dtype)
        part: Any = partial(_read_part, file, name, read, copy and copy[2], kind)
        like: Any = jax.ShapeDtypeStruct(shape, kind)
        if kind == jnp.int8:
            like = Int8Matrix(like, jax.ShapeDtypeStruct(shape[:1], jnp.float32))
            part = Int8Matrix(*(partial(_field, part, k) for k in ("values", "scale")))
        out[place] = like, part
    return config, out


def _field(read, name, index):
    return getattr(read(index), name)


def _of_weights(dtype) -> jnp.dtype:
    """The dtype of the matrices: floating point, or int8."""
    return jnp.dtype(jnp.int8) if is_int8(dtype) else floating(dtype, " or int8")


def _kind(key: str, dtype) -> jnp.dtype:
    """The dtype of a parameter where matrices have this one."""
    whole = key in FLOAT32 or (dtype == jnp.int8 and key not in MATRICES)
    return jnp.dtype(jnp.float32) if whole else dtype


def _open(source, revision):
    """(config, what the files hold, what config asks for), names and shapes checked."""
    folder, files = resolve(source, revision)
    config = load_config(folder)
    stored = headers(files)
    if config.n_layers > len(stored):
        raise ValueError(
            f"config.json: {config.n_layers} layers; {folder.name} holds only "
            f"{len(stored)} tensors"
        )
    want = _layout(config)
    _check_names(folder, config, stored, want)
    return config, stored, want


def _read(config, stored, want, dtype) -> Params:
    """The parameters, tensor by tensor."""
    params: dict = {"layers": tuple({} for _ in range(config.n_layers))}
    total = sum(math.prod(shape) for _, shape in want.values())
    bar = dict(unit=" weights", unit_scale=True, delay=2, leave=False, disable=None)
    with tqdm(total=total, **bar) as progress:
        for name, ((layer, key), shape) in want.items():
            file, _, read = stored[name]
            tensor = read()
            if name == EMBEDDING and config.tie_embeddings and HEAD in stored:
                _check_tied(file, tensor, stored[HEAD][2]())
            tensor = tensor[:, 0] if name.endswith("conv1d.weight") else tensor
            value = _convert(file, name, tensor, _kind(key, dtype))
            place = params if layer is None else params["layers"][layer]
            place[key] = jax.device_put(value)  # compiles nothing
            progress.update(math.prod(shape))
    return params


def _read_part(file, name, read, read_copy, dtype, index) -> np.ndarray | Int8Matrix:
    """A part of a parameter."""
    index, columns = (index[:1], index[1:]) if dtype == jnp.int8 else (index, ())
    values = read(index)  # whole rows where a row has one scale
    if read_copy:
        _check_tied(file, values, read_copy(index))
    if name.endswith("conv1d.weight"):
        values = values[:, 0]
    values = _convert(file, name, values, dtype)
    if columns:
        return Int8Matrix(values.values[:, *columns], values.scale)
    return values


def _check_tied(file, embedding, head) -> None:
    a, b = map(jax.tree.leaves, (embedding, head))  # two each for eight bits
    if len(a) != len(b) or not all(map(np.array_equal, a, b)):
        raise ValueError(
            f"{file}: config.json ties embedding and head, but {HEAD!r} differs"
        )


def _convert(file, name, values, dtype):
    """An array of this dtype, or an `Int8Matrix`, in NumPy: nothing to compile."""
    whole = isinstance(values, Int8Matrix) and dtype == jnp.int8
    if not whole:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32 if dtype == jnp.int8 else dtype)
    if not np.isfinite(values.scale if whole else values).all():
        raise ValueError(
            f"{file}: tensor {name!r} has values that are not finite in {values.dtype}"
        )
    if whole or dtype != jnp.int8:
        return values
    return Int8Matrix.of(values, np)


def save(folder: str | Path, params: Params, config: Mamba2Config) -> None:
    """Write config.json and model.safetensors; `transformers` and `load` read them.

    Matrices of `quantize` are written as they are, and `transformers` refuses them.

    Weight files of an earlier model in this folder are removed, so that none of them
    is ever read with this config. Raises ValueError, before anything is written, for
    parameters that are not those of this config, not floating point or not finite.
    transformers itself wants `d_inner` to be a whole multiple of `d_model`.
    """
    check_is("folder", folder, str, os.PathLike)
    check_is("config", config, Mamba2Config)
    check_params(params)
    tensors = {}
    for name, ((layer, key), shape) in _layout(config).items():
        value = (params if layer is None else params["layers"][layer]).get(key)
        if np.shape(value) != shape:
            where = key if layer is None else f"layers[{layer}][{key!r}]"
            raise ValueError(
                f"params: {where} has shape {np.shape(value)}; config asks for {shape}"
            )
        if isinstance(value, Int8Matrix):
            tensors[name] = np.asarray(value.values)
            name, value, shape = f"{name}_scale", value.scale, (*shape[:1], 1)
        value = np.asarray(value).reshape(_stored(name, shape))
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"params: {name} is {value.dtype}; it must be floating point"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"params: {name} has values that are not finite")
        tensors[name] = np.ascontiguousarray(value)
    if len(jax.tree.leaves(params)) != len(tensors):
        raise ValueError("params: they hold more arrays than config asks for")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "model.safetensors.new"
    save_file(tensors, new, metadata={"format": "pt"})
    for old in weight_files(folder):  # an index and its shards would be read first
        old.unlink()
    about = to_json(config)
    if any(v.dtype == np.int8 for v in tensors.values()):
        about["quantization_config"] = QUANTIZED
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    new.rename(folder / "model.safetensors")


# --- names and shapes -----------------------------------------------------------------


def _layout(config: Mamba2Config) -> dict[str, tuple[Place, tuple]]:
    """Name in a checkpoint -> (our parameter, its shape)."""
    d, d_inner, d_xBC, H = config.d_model, config.d_inner, config.d_xBC, config.n_heads
    d_in = d_inner + d_xBC + H
    layer = {
        "norm.weight": ("norm", (d,)),
        "mixer.in_proj.weight": ("in", (d_in, d)),
        "mixer.conv1d.weight": ("conv", (d_xBC, config.d_conv)),
        "mixer.dt_bias": ("dt_bias", (H,)),
        "mixer.A_log": ("A_log", (H,)),
        "mixer.D": ("D", (H,)),
        "mixer.norm.weight": ("gate_norm", (d_inner,)),
        "mixer.out_proj.weight": ("out", (d, d_inner)),
    }
    if config.conv_bias:
        layer["mixer.conv1d.bias"] = "conv_bias", (d_xBC,)
    if config.proj_bias:
        layer["mixer.in_proj.bias"] = "in_bias", (d_in,)
        layer["mixer.out_proj.bias"] = "out_bias", (d,)

    out: dict = {EMBEDDING: ((None, "embedding"), (config.vocab_size, d))}
    for i in range(config.n_layers):
        for name, (key, shape) in layer.items():
            out[f"backbone.layers.{i}.{name}"] = (i, key), shape
    out["backbone.norm_f.weight"] = (None, "norm"), (d,)
    if not config.tie_embeddings:
        out[HEAD] = (None, "head"), (config.vocab_size, d)
    return out


def _stored(name: str, shape: tuple) -> tuple:
    """The shape in a checkpoint: filters of a convolution have an axis of 1 more."""
    return (shape[0], 1, *shape[1:]) if name.endswith("conv1d.weight") else shape


def _check_names(folder, config, stored, want) -> None:
    """Raise ValueError unless the files hold exactly the tensors that are wanted."""
    for name, (file, shape, _) in stored.items():
        if name == HEAD and config.tie_embeddings:  # a copy that some files keep
            expected = want[EMBEDDING][1]
        elif name in want:
            expected = _stored(name, want[name][1])
        else:
            raise ValueError(f"{file}: unknown tensor {name!r}")
        if shape != expected:
            raise ValueError(
                f"{file}: tensor {name!r} has shape {shape}; config.json asks for "
                f"{expected}"
            )
    if missing := [name for name in want if name not in stored]:
        raise ValueError(
            f"{folder.name}: {len(missing)} tensors missing, first {missing[0]!r}"
        )
