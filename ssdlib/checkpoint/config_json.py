"""config.json, as `transformers` or `mamba_ssm` writes it, and `Mamba2Config`.

Whatever would change the computation and is not supported raises an error; what only
concerns initialization or kernels is skipped.
Source: transformers 5.23.0, models/mamba2/configuration_mamba2.py; state-spaces/mamba
at e9594ce, mamba_ssm/modules/mamba2.py and models/config_mamba.py.
"""

import math
from pathlib import Path

from ssdlib.checkpoint.hub import read_json
from ssdlib.config import Mamba2Config

__all__ = ["load_config", "to_json"]

TRANSFORMERS = {  # key: (field of Mamba2Config, the value of a key that is left out)
    "vocab_size": ("vocab_size", 32768),
    "hidden_size": ("d_model", 4096),
    "num_hidden_layers": ("n_layers", 64),
    "num_heads": ("n_heads", 128),
    "head_dim": ("head_dim", 64),
    "state_size": ("d_state", 128),
    "n_groups": ("n_groups", 8),
    "conv_kernel": ("d_conv", 4),
    "chunk_size": ("chunk_size", 256),
    "tie_word_embeddings": ("tie_embeddings", False),
    "use_conv_bias": ("conv_bias", True),
    "use_bias": ("proj_bias", False),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "time_step_limit": ("time_step_limit", [0.0, math.inf]),
}
MAMBA_SSM = {  # the same for ssm_cfg
    "d_state": ("d_state", 128),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "d_conv": ("d_conv", 4),
    "chunk_size": ("chunk_size", 256),
    "conv_bias": ("conv_bias", True),
    "bias": ("proj_bias", False),
    "dt_limit": ("time_step_limit", [0.0, math.inf]),
}
FIXED = {  # in ssm_cfg: the one value that this library computes
    "layer": "Mamba2",
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "d_ssm": None,
}
SKIPPED = {  # in ssm_cfg: initialization and kernels
    "expand",  # used below
    "conv_init",
    "A_init_range",
    "dt_min",
    "dt_max",
    "dt_init_floor",
    "use_mem_eff_path",
}


def load_config(folder: Path) -> Mamba2Config:
    """`Mamba2Config` from a folder's config.json, in either layout.

    Raises FileNotFoundError if there is none, ValueError that names a key whose value
    is missing, of a wrong type, inconsistent or not supported.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder.name}: no config.json")
    raw = read_json(folder / "config.json")
    try:
        if "model_type" not in raw and "d_model" in raw:
            fields = _from_mamba_ssm(raw)
        else:
            fields = _from_transformers(raw)
        fields["time_step_limit"] = _limit(fields["time_step_limit"])
        return Mamba2Config(**fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"config.json: {error}") from error


def to_json(config: Mamba2Config) -> dict:
    """What `transformers` expects in config.json."""
    fields = {key: getattr(config, ours) for key, (ours, _) in TRANSFORMERS.items()}
    expand = config.d_inner / config.d_model  # transformers reads whole numbers only
    fields["expand"] = int(expand) if expand.is_integer() else expand
    low, high = config.time_step_limit
    fields["time_step_limit"] = [
        low,
        {"__float__": "Infinity"} if math.isinf(high) else high,
    ]
    return fields | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "rms_norm": True,
        "hidden_act": "silu",
        "norm_before_gate": False,
        "residual_in_fp32": True,
    }


def _from_transformers(raw: dict) -> dict:
    # norm_before_gate is not looked at: published files say true (Mamba-Codestral-7B),
    # transformers has no such option, and the gate always comes first.
    _require({"model_type": None} | raw, {"model_type": "mamba2"})
    _require(raw, {"rms_norm": True, "hidden_act": "silu"})
    fields = {ours: raw.get(key, value) for key, (ours, value) in TRANSFORMERS.items()}
    d_inner = _integer("num_heads", fields["n_heads"])
    d_inner *= _integer("head_dim", fields["head_dim"])
    expand = raw.get("expand", d_inner / _integer("hidden_size", fields["d_model"]))
    if type(expand) not in (int, float) or round(expand * fields["d_model"]) != d_inner:
        raise ValueError(
            f"expand is {expand!r}; times hidden_size = {fields['d_model']} it must be "
            f"num_heads * head_dim = {d_inner}"
        )
    return fields


def _from_mamba_ssm(raw: dict) -> dict:
    _require(raw, {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []})
    ssm = raw.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise ValueError(f"ssm_cfg is {ssm!r}; it must be an object")
    _require({"layer": "Mamba1"} | ssm, FIXED)
    if unknown := ssm.keys() - MAMBA_SSM.keys() - FIXED.keys() - SKIPPED:
        raise ValueError(f"ssm_cfg holds the unknown key {min(unknown)!r}")
    fields = {ours: ssm.get(key, value) for key, (ours, value) in MAMBA_SSM.items()}
    d_inner = _integer("d_model", raw.get("d_model"))
    d_inner *= _integer("expand", ssm.get("expand", 2))
    heads, rest = divmod(d_inner, _integer("headdim", fields["head_dim"]))
    if rest:
        raise ValueError(
            f"headdim is {fields['head_dim']}; it must divide expand * d_model = "
            f"{d_inner}"
        )
    vocab_size = _integer("vocab_size", raw.get("vocab_size"))
    pad = "pad_vocab_size_multiple"
    multiple = _integer(pad, raw.get(pad, 8))
    return fields | {
        "vocab_size": -(-vocab_size // multiple) * multiple,  # rows, padding included
        "d_model": raw["d_model"],
        "n_layers": raw.get("n_layer"),
        "n_heads": heads,
        "tie_embeddings": raw.get("tie_embeddings", True),
    }


def _require(raw: dict, values: dict) -> None:
    """Raise ValueError for a key that is there with another value."""
    for key, value in values.items():
        got = raw.get(key, value)
        if got != value or type(got) is not type(value):
            raise ValueError(f"{key} is {got!r}; it must be {value!r}")


def _integer(key: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a positive integer")
    return value


def _limit(value) -> tuple:
    """(low, high) of a time step limit; infinity is written in several ways."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"time_step_limit is {value!r}; it must be two numbers")
    infinite = {"__float__": "Infinity"}, "Infinity", "inf"
    low, high = (math.inf if v in infinite else v for v in value)
    if not all(type(v) in (int, float) for v in (low, high)):
        raise ValueError(f"time_step_limit is {value!r}; it must be two numbers")
    return float(low), float(high)
