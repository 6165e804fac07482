"""Files of named tensors: what is in them, and a function that reads each tensor.

Two formats, safetensors and the zip that torch writes. Reading executes no code:
safetensors hold none, and torch reads its own format with weights_only=True. What
names mean is the topic of `weights`.
Source: the format at github.com/huggingface/safetensors, README.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ssdlib.checkpoint.hub import check_torch, unique
from ssdlib.int8 import Int8Matrix

__all__ = ["headers"]

WRAPPED = re.compile(r"^((module|model|_orig_mod|_forward_module)\.)+")  # in a name
NESTED = "state_dict", "model_state_dict", "model", "module"  # in a file of training


def headers(files: list[Path]) -> dict[str, tuple[str, tuple, Callable]]:
    """Tensor name -> (file, shape, function that reads it); no weight is read yet."""
    stored: dict = {}
    for file in files:
        tensors = _safetensors if file.suffix == ".safetensors" else _torch
        for name, shape, read in tensors(file):
            name = WRAPPED.sub("", name)
            # The one name in which the two layouts differ.
            name = name.replace("backbone.embedding.", "backbone.embeddings.")
            if name in stored:
                raise ValueError(f"{file.name}: tensor {name!r} comes twice")
            stored[name] = file.name, shape, read
    return stored


def _safetensors(path: Path) -> Iterator[tuple[str, tuple, Callable]]:
    try:
        with safe_open(path, framework="numpy") as f:
            slices = [(name, f.get_slice(name)) for name in f.keys()]
            about = [(name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices]
        with open(path, "rb") as file:  # its parser lets the last of two keys win
            size = int.from_bytes(file.read(8), "little")
            json.loads(file.read(size), object_pairs_hook=unique)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path.name}: not a readable safetensors file ({error})"
        ) from error
    kinds = {name: (dtype, shape) for name, dtype, shape in about}
    scales = {f"{name}_scale" for name, dtype, _ in about if dtype == "I8"}
    for name, dtype, shape in about:
        read = partial(_read_safetensors, path, name)
        one_a_row = kinds.get(f"{name}_scale") == ("F32", (*shape[:1], 1))
        if dtype == "I8" and len(shape) == 2 and one_a_row:
            read = partial(_read_int8, path, name)
        elif dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{path.name}: tensor {name!r} is {dtype}; it must be floating point "
                "of 16 bits or more, or a matrix in I8 with a scale for each row"
            )
        if name not in scales:
            yield name, shape, read


def _read_safetensors(path: Path, name: str, index: tuple = ()) -> np.ndarray:
    # A mapping of its own for each tensor: what was read through one stays in memory
    # until it is closed, and one mapping for all would make a second copy of the model.
    with safe_open(path, framework="numpy") as f:
        return f.get_slice(name)[index] if index else f.get_tensor(name)


def _read_int8(path: Path, name: str, index: tuple = ()) -> Int8Matrix:
    values = _read_safetensors(path, name, index)
    scale = _read_safetensors(path, f"{name}_scale", index[:1])
    return Int8Matrix(values, scale[:, 0])


def _torch(path: Path) -> Iterator[tuple[str, tuple, Callable]]:
    check_torch(path.name)
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, EOF and RuntimeError
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path.name}: torch cannot read it as plain weights ({reason}); save "
            "model.state_dict() alone, best as safetensors"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path.name}: holds no dictionary of tensors")
    for key in NESTED:
        if isinstance(state.get(key), dict):
            state = state[key]
    for name, tensor in list(state.items()):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path.name}: {name!r} is no floating point tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.itemsize < 2:
            kind = "without values" if tensor.is_meta else tensor.dtype
            kind = kind if tensor.layout == torch.strided else tensor.layout
            raise ValueError(
                f"{path.name}: tensor {name!r} is {kind}; it must be dense, of 16 bits "
                "or more"
            )
        yield str(name), tuple(tensor.shape), partial(_take, state, name)


def _take(state: dict, name: str) -> np.ndarray:
    tensor = state.pop(name).detach()  # its memory is then free; mmap would keep it
    return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
