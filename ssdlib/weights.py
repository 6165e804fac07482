"""Checkpoints in and out: safetensors and config.json in the `transformers` layout.

Strict both ways: every tensor of a file must be used, every parameter filled, every
shape equal. Only safetensors are read, so loading never executes code.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ssdlib.config import Mamba2Config
from ssdlib.model import Params, init_params

__all__ = ["load", "load_config", "resolve", "save"]

TINY = Path(__file__).parent / "tiny"
INDEX = "model.safetensors.index.json"

CONFIG_KEYS = {  # config.json (transformers): Mamba2Config
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_heads": "n_heads",
    "head_dim": "head_dim",
    "state_size": "d_state",
    "n_groups": "n_groups",
    "conv_kernel": "d_conv",
    "chunk_size": "chunk_size",
    "tie_word_embeddings": "tie_embeddings",
    "use_conv_bias": "conv_bias",
    "use_bias": "proj_bias",
    "layer_norm_epsilon": "norm_eps",
    "time_step_limit": "time_step_limit",
}
LAYER_KEYS = {  # transformers, under backbone.layers.i: parameter of a layer
    "norm.weight": ("norm",),
    "mixer.in_proj.weight": ("z", "xBC", "dt"),  # stacked along the outputs
    "mixer.in_proj.bias": ("z_bias", "xBC_bias", "dt_proj_bias"),
    "mixer.conv1d.weight": ("conv",),  # stored as (d_xBC, 1, d_conv)
    "mixer.conv1d.bias": ("conv_bias",),
    "mixer.dt_bias": ("dt_bias",),
    "mixer.A_log": ("A_log",),
    "mixer.D": ("D",),
    "mixer.norm.weight": ("gate_norm",),
    "mixer.out_proj.weight": ("out",),
    "mixer.out_proj.bias": ("out_bias",),
}
MODEL_KEYS = {
    "backbone.embeddings.weight": "embedding",
    "backbone.norm_f.weight": "norm",
    "lm_head.weight": "head",
}


def load(
    source: str | Path, dtype=jnp.float32, revision: str | None = None
) -> tuple[Params, Mamba2Config]:
    """(params, config) from "tiny", a folder, a .safetensors file or a hub id.

    "tiny" is the byte-level model inside this package. A hub id such as
    "org/name" is downloaded once, through the `huggingface_hub` cache, at `revision`.
    Matrices are converted to `dtype` tensor by tensor; decays, skips and norms are
    float32. Raises FileNotFoundError for a missing file, and ValueError that names the
    tensor or key for anything unknown, missing, misshapen or unreadable.
    """
    folder, files = resolve(source, revision)
    config = load_config(folder)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    want = _external_keys(shapes, config)

    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as f:
                for name in f.keys():
                    if name not in want:
                        if name == "lm_head.weight" and config.tie_embeddings:
                            continue  # a copy of the embedding that some files keep
                        raise ValueError(f"{file.name}: unknown tensor {name!r}")
                    tensor, (parts, shape) = f.get_tensor(name), want[name]
                    if tensor.shape != shape:
                        raise ValueError(
                            f"{file.name}: tensor {name!r} has shape {tensor.shape}; "
                            f"config.json asks for {shape}"
                        )
                    tensors |= _split(tensor, parts)
                    del tensor
        except SafetensorError as error:
            raise ValueError(
                f"{file.name}: not a readable safetensors file ({error})"
            ) from error
    paths, structure = jax.tree.flatten_with_path(shapes)
    missing = [name for name, (parts, _) in want.items() if parts[0][0] not in tensors]
    if missing:
        raise ValueError(
            f"{folder.name}: {len(missing)} tensors missing, first {missing[0]!r}"
        )
    return jax.tree.unflatten(structure, [tensors[path] for path, _ in paths]), config


def save(folder: str | Path, params: Params, config: Mamba2Config) -> None:
    """Write config.json and model.safetensors; `transformers` and `load` read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = dict(jax.tree.flatten_with_path(params)[0])
    tensors = {}
    for name, (parts, shape) in _external_keys(params, config).items():
        whole = np.concatenate([np.asarray(leaves[path]) for path, *_ in parts])
        tensors[name] = np.ascontiguousarray(whole.reshape(shape))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {k: getattr(config, v) for k, v in CONFIG_KEYS.items()}
    expand = config.d_inner / config.d_model  # transformers reads whole numbers only
    low, high = config.time_step_limit
    if math.isinf(high):
        high = {"__float__": "Infinity"}
    fields |= {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "expand": int(expand) if expand.is_integer() else expand,
        "time_step_limit": [low, high],
        "rms_norm": True,
        "hidden_act": "silu",
        "norm_before_gate": False,
        "residual_in_fp32": True,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def resolve(source: str | Path, revision: str | None = None) -> tuple[Path, list[Path]]:
    """The folder of a source and its safetensors files; downloads a hub id."""
    if source == "tiny":
        folder = TINY
    elif Path(source).exists():
        folder = Path(source)
        if folder.suffix == ".safetensors":
            return folder.parent, [folder]
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        wanted = ["config.json", "tokenizer.json", "*.safetensors", INDEX]
        try:
            folder = Path(
                snapshot_download(str(source), revision=revision, allow_patterns=wanted)
            )
        except Exception as error:  # the client raises errors of several libraries
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"source: cannot download {str(source)!r}: {reason}"
            ) from error
    else:
        raise FileNotFoundError(
            f"source: {str(source)!r} is no folder, no file and no hub id (owner/name)"
        )
    if (folder / INDEX).exists():
        names = set(_read_json(folder / INDEX).get("weight_map", {}).values())
        if bad := [n for n in names if Path(n).name != n]:
            raise ValueError(f"{INDEX}: {bad[0]!r} is not a file name in this folder")
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder.name}: no {file.name}")
    return folder, files


def load_config(folder: Path) -> Mamba2Config:
    """`Mamba2Config` from a folder's config.json. ValueError names a bad key."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder.name}: no config.json")
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") != "mamba2":
        raise ValueError(
            f"config.json: model_type is {raw.get('model_type')!r}; it must be 'mamba2'"
        )
    if raw.get("norm_before_gate"):
        raise ValueError("config.json: norm_before_gate=true is not supported")
    if not (raw.get("rms_norm", True) and raw.get("hidden_act", "silu") == "silu"):
        raise ValueError("config.json: only rms_norm=true, hidden_act='silu' fit")
    fields = {ours: raw[key] for key, ours in CONFIG_KEYS.items() if key in raw}
    if "time_step_limit" in fields:
        limit = fields["time_step_limit"]
        if isinstance(limit, list) and len(limit) == 2:
            limit = [v["__float__"] if isinstance(v, dict) else v for v in limit]
            fields["time_step_limit"] = tuple(float(v) for v in limit)
    try:
        return Mamba2Config(**fields)
    except TypeError as error:
        raise ValueError(f"config.json: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: holds no JSON object")
    return value


def _external_keys(params, config) -> dict:
    """Checkpoint name -> ((path, rows, shape, dtype) of each part, stored shape)."""
    leaves = dict(jax.tree.flatten_with_path(params)[0])
    key, index = jax.tree_util.DictKey, jax.tree_util.SequenceKey
    groups = {name: [(key(ours),)] for name, ours in MODEL_KEYS.items()}
    for i in range(config.n_layers):
        for name, parts in LAYER_KEYS.items():
            paths = [(key("layers"), index(i), key(part)) for part in parts]
            groups[f"backbone.layers.{i}.{name}"] = paths
    out = {}
    for name, paths in groups.items():
        if paths[0] not in leaves:
            continue  # an optional parameter that this model does not have
        parts = [(p, leaves[p].shape, leaves[p].dtype) for p in paths]
        rows = sum(shape[0] for _, shape, _ in parts)
        rest = parts[0][1][1:]
        out[name] = parts, (rows, *((1, *rest) if "conv1d.weight" in name else rest))
    return out


def _split(tensor: np.ndarray, parts) -> dict:
    """Cut a stored tensor along its rows into our parameters, in our dtype."""
    out, row = {}, 0
    for path, shape, dtype in parts:
        part = tensor[row : row + shape[0]].reshape(shape)
        out[path] = jnp.asarray(part).astype(dtype)
        row += shape[0]
    return out
