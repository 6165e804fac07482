"""A cache on disk, and back to an earlier place of a text.

The file is safetensors: `conv`, `h.0`, `h.1`, ..., `length`, and in its header whose
they are and a SHA-256 of all that. Its size does not depend on the tokens read.
Format: github.com/huggingface/safetensors, README.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ssdlib._checks import check_integers, check_is, check_tokens, floating
from ssdlib.cache import Cache, check_cache, init_cache
from ssdlib.generate import LONGEST, bucket
from ssdlib.model import ArrayLike, prefill
from ssdlib.params import Mamba2Config, Params, checked_params
from ssdlib.recurrence import accumulator

__all__ = ["load_cache", "rewind", "save_cache"]

FORMAT = "ssdlib.cache/1"


def save_cache(
    path: str | Path, cache: Cache, config: Mamba2Config, params: Params | None = None
) -> None:
    """Write a cache to one file, from which `load_cache` goes on, here or elsewhere.

    With `params` the file carries a hash of the weights, so that a model of the same
    sizes and other weights is told from this one; that takes a pass over them. Values
    are stored as they are, from one device or many. A file of that name is replaced
    once the new one is whole: who reads it meanwhile gets one of the two.

    Raises ValueError for a cache of another model, and for one whose channels are split
    over devices, as they may lie in another order there (`scale.parallel`).
    """
    check_is("path", path, str, os.PathLike)
    check_is("config", config, Mamba2Config)
    check_is("cache", cache, Cache)
    check_cache(config, cache, *(np.shape(cache.length)[:1] or [1]))
    sharding, shape = getattr(cache.conv, "sharding", None), np.shape(cache.conv)
    if sharding is not None and sharding.shard_shape(shape)[3] < shape[3]:
        raise ValueError(
            "cache: channels of conv are split over devices; they must be whole, from "
            "scale.parallel.gather_cache if scale.parallel made it, else jax.device_get"
        )
    arrays = {"conv": cache.conv, "length": cache.length}
    arrays |= {f"h.{i}": v for i, v in enumerate(cache.h)}
    tensors = {name: np.asarray(v) for name, v in arrays.items()}
    whose = _sizes(config) | {"format": FORMAT}
    whose["weights"] = "" if params is None else fingerprint(params, config)
    whose["sha256"] = _digest(whose, tensors)
    path = Path(path)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        save_file(tensors, new, metadata=whose)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def load_cache(
    path: str | Path, config: Mamba2Config, params: Params | None = None, dtype=None
) -> Cache:
    """The cache that `save_cache` wrote, to go on from as if the text were just read.

    `dtype` is that of the convolution's inputs as in `init_cache`, None as they were
    saved; their values are rounded to it. The states are float32, or float64 with such
    a dtype. With `params` the weights must be those that the file names, in float32 or
    bfloat16; in float16 or int8 they pass for other ones, unless saved so.

    Raises FileNotFoundError if there is no such file, and ValueError that says what is
    wrong with it: not a cache, damaged, of another model, or of other weights.
    """
    check_is("path", path, str, os.PathLike)
    check_is("config", config, Mamba2Config)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path.name}")
    try:
        with safe_open(path, framework="numpy") as file:
            whose = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name}: not readable ({error})") from error
    if whose.get("format") != FORMAT:
        what = whose.get("format", "none")
        raise ValueError(f"{path.name}: its format is {what}; it must be {FORMAT}")
    if whose.pop("sha256", None) != _digest(whose, tensors):
        raise ValueError(f"{path.name}: damaged: its checksum is another")
    sizes = _sizes(config)
    for name in sorted(sizes.keys() | whose.keys() - {"format", "weights"}):
        theirs, ours = (v.get(name, "absent") for v in (whose, sizes))
        if theirs != ours:
            raise ValueError(
                f"{path.name}: a cache of another model, whose {name} is {theirs}; it "
                f"must be {ours}"
            )
    if params is not None and whose["weights"] != fingerprint(params, config):
        what = "other weights" if whose["weights"] else "weights that it does not name"
        raise ValueError(
            f"{path.name}: a cache of {what}; it must be saved with these params, and "
            "in float16 or int8 with these of that dtype"
        )
    conv, length = tensors["conv"], tensors["length"]
    conv_dtype = floating(conv.dtype if dtype is None else dtype)
    h_dtype = floating(tensors["h.0"].dtype if dtype is None else dtype)
    h_dtype = accumulator(h_dtype)
    h = tuple(jnp.asarray(tensors[f"h.{i}"], h_dtype) for i in range(config.n_layers))
    return Cache(jnp.asarray(conv, conv_dtype), h, jnp.asarray(length))


def fingerprint(params: Params, config: Mamba2Config) -> str:
    """A hash of all weights, rounded to bfloat16: equal in float32 and bfloat16."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(checked_params(params, config)):
        digest.update(np.asarray(leaf).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def rewind(
    params: Params,
    config: Mamba2Config,
    tokens: Int[ArrayLike, "b T"],
    caches: Sequence[Cache],
    position: int,
) -> Cache:
    """The cache after the first `position` tokens of a text that was read further.

    A state cannot be run backwards. So keep a cache every k tokens while you read:
    this takes the last of them before the position, an empty one if there is none, and
    reads the at most k - 1 tokens in between again. Where one stands at the position
    itself, it is returned as it is. Raises ValueError for a position outside the text,
    and for a cache of another model or whose rows differ in length.
    """
    params = checked_params(params, config)
    tokens, _ = check_tokens(tokens, config.vocab_size)
    position = int(check_integers("position", position, (), 0, tokens.shape[1]))
    best, read = init_cache(config, len(tokens), params["embedding"].dtype), 0
    check_is("caches", caches, list, tuple)
    for cache in caches:
        check_cache(config, cache, len(tokens))
        least, most = int(cache.length.min()), int(cache.length.max())
        if least < most:
            raise ValueError(
                f"caches: rows that have read {least} to {most} tokens; all rows of a "
                "cache must have read as many"
            )
        if read <= most <= position:
            best, read = cache, most
    if read == position:
        return best
    piece = min(bucket(position - read), LONGEST)
    return prefill(params, config, tokens[:, read:position], best, piece=piece)[1]


def _sizes(config) -> dict[str, str]:
    """What a model is, without the length of chunks, on which no cache depends."""
    return {k: str(v) for k, v in asdict(config).items() if k != "chunk_size"}


def _digest(whose, tensors) -> str:
    digest = hashlib.sha256(json.dumps(whose, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
