"""config.json of `transformers`, `mamba_ssm` and others, and `Mamba2Config`.

Every key is used, or listed below as one that changes no logits, or refused by name.
An unknown key that is null asks for nothing.
Source: transformers 5.23.0, models/mamba2/configuration_mamba2.py; state-spaces/mamba
at e9594ce, mamba_ssm/modules/mamba2.py and models/config_mamba.py; flash-linear-
attention at 05c7460, fla/models/mamba2/configuration_mamba2.py.
"""

import math
from pathlib import Path
from reprlib import repr  # of what a file may hold: one line, cut where it is long
from textwrap import shorten

from ssdlib.checkpoint.hub import read_json, title
from ssdlib.params import Mamba2Config

__all__ = ["QUANTIZED", "load_config", "to_json"]

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
OTHER_NAMES = {  # what else a key of TRANSFORMERS is called; of two, both must agree
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
    "dt_limit": "time_step_limit",
    "tie_embedding_weights": "tie_word_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
}
FLA = {  # flash-linear-attention: other values of keys that are left out
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "n_groups": 1,
}
FLA_KEYS = {
    "norm_eps",
    "dt_limit",
    "rmsnorm",
    "D_has_hdim",
    "A_init_range",
    "fuse_norm",
}
QUANTIZED = {  # one scale a row, as github.com/vllm-project/compressed-tensors says it
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "Embedding"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
            },
        }
    },
}
FIXED = {  # the values that this library computes
    "rms_norm": [True],
    "hidden_act": ["silu", "swish"],
    "is_encoder_decoder": [False],
    "add_cross_attention": [False],
    "pruned_heads": [{}],
    "quantization_config": [QUANTIZED],
    "d_intermediate": [0],
    "layer": ["Mamba2"],
    "rmsnorm": [True],
    "norm_before_gate": [False],
    "D_has_hdim": [False],
    "d_ssm": [None],
}
HYBRID = "attn_layer_idx", "attention_layers_idx"  # layers of attention
HARMLESS = set(  # initialization, kernels, training, sampling, names
    """
    A_init_range A_initializer_range conv_init conv_initializer_range dt_init_floor
    dt_max dt_min emb_initializer_range initializer_range rescale_prenorm_residual
    time_step_floor time_step_init_scheme time_step_max time_step_min time_step_rank
    time_step_scale

    fuse_cross_entropy fuse_linear_cross_entropy fuse_norm fused_add_norm
    output_last_ssm_states pad_vocab_size_multiple residual_in_fp32 sequence_parallel
    use_cache use_l2warp use_mem_eff_path use_triton_kernels

    architectures attn_cfg attn_implementation auto_map chunk_size_feed_forward
    cross_attention_hidden_size dtype finetuning_task id2label is_decoder label2id
    max_position_embeddings model_type name_or_path output_attentions
    output_hidden_states prefix problem_type return_dict task_specific_params
    tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16

    bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id
    forced_eos_token_id pad_token_id sep_token_id unk_token_id

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)


def load_config(folder: Path) -> Mamba2Config:
    """`Mamba2Config` from a folder's config.json, whoever wrote it.

    Raises FileNotFoundError if there is none, ValueError that names a key that is
    unknown, or whose value is missing, of a wrong type, inconsistent or not supported.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{title(folder)}: no config.json")
    raw = read_json(folder / "config.json")
    try:
        if "d_model" in raw and "hidden_size" not in raw:
            fields = _from_mamba_ssm(raw)
        else:
            fields = _from_transformers(raw)
        fields["time_step_limit"] = _limit(fields["time_step_limit"])
        return Mamba2Config(**fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"config.json: {shorten(str(error), 300)}") from error


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
        # Not known here: without these words transformers takes 0, 2 and 1.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _from_transformers(raw: dict) -> dict:
    if raw.get("model_type") != "mamba2":
        kind = repr(raw.get("model_type"))
        raise ValueError(f"model_type is {kind}; it must be 'mamba2'")
    if raw.keys() & FLA_KEYS:
        raw = FLA | raw
    else:  # transformers has no such option: the gate comes first, whatever files say,
        raw = raw | {"norm_before_gate": False}  # as that of Mamba-Codestral-7B does
    for other, key in OTHER_NAMES.items():
        if other in raw and raw.setdefault(key, raw[other]) != raw[other]:
            raise ValueError(
                f"{other} is {raw[other]!r}, but {key} is {raw[key]!r}; both mean the "
                "same, so they must be equal"
            )
    _check_keys(raw, {*TRANSFORMERS, *OTHER_NAMES, "expand", "intermediate_size"})
    fields = _fields(raw, TRANSFORMERS)
    d_model, d_inner = _size("hidden_size", fields["d_model"]), 1
    for key in ("num_heads", "head_dim"):
        d_inner *= _size(key, fields[TRANSFORMERS[key][0]])
    expand = raw.get("expand", d_inner / d_model)
    if type(expand) not in (int, float) or round(expand * d_model) != d_inner:
        raise ValueError(
            f"expand is {repr(expand)}; times hidden_size = {d_model} it must be "
            f"num_heads * head_dim = {d_inner}"
        )
    if (size := raw.get("intermediate_size")) not in (None, d_inner):
        raise ValueError(
            f"intermediate_size is {repr(size)}; it must be num_heads * head_dim = "
            f"{d_inner}"
        )
    return fields


def _from_mamba_ssm(raw: dict) -> dict:
    kind, kinds = raw.get("model_type"), ["mamba2", "mamba", "mamba_ssm", "", None]
    if kind not in kinds:
        raise ValueError(f"model_type is {repr(kind)}; it must be 'mamba2'")
    layer = "Mamba2" if kind == "mamba2" else "Mamba1"  # of a file that does not say
    pad = "pad_vocab_size_multiple"
    _check_keys(raw, {"d_model", "n_layer", "vocab_size", "ssm_cfg", "tie_embeddings"})
    ssm = {} if raw.get("ssm_cfg") is None else raw["ssm_cfg"]
    if not isinstance(ssm, dict):
        raise ValueError(f"ssm_cfg is {repr(ssm)}; it must be an object")
    _check_keys({"layer": layer} | ssm, {*MAMBA_SSM, "expand"}, "ssm_cfg: ")
    fields = _fields(ssm, MAMBA_SSM)
    d_model, expand = _size("d_model", raw["d_model"]), ssm.get("expand", 2)
    if type(expand) not in (int, float):
        raise ValueError(f"expand is {repr(expand)}; it must be a number")
    d_inner = _size("expand * d_model", expand * d_model)
    heads, rest = divmod(d_inner, _size("headdim", fields["head_dim"]))
    if rest:
        raise ValueError(
            f"headdim is {fields['head_dim']}; it must divide expand * d_model = "
            f"{d_inner}"
        )
    vocab_size = _size("vocab_size", raw.get("vocab_size"))
    multiple = _size(pad, raw.get(pad, 8))
    return fields | {
        "vocab_size": -(-vocab_size // multiple) * multiple,  # rows, padding included
        "d_model": d_model,
        "n_layers": _whole("n_layer", raw.get("n_layer")),
        "n_heads": heads,
        "tie_embeddings": raw.get("tie_embeddings", True),
    }


def _check_keys(raw: dict, used: set, where: str = "") -> None:
    """Raise ValueError for a key that changes the model and is not supported."""
    for key in HYBRID:
        if raw.get(key) not in (None, []):
            raise ValueError(
                f"{key} is {repr(raw[key])}: these layers are attention; every layer "
                "must be Mamba-2"
            )
    for key, value in raw.items():
        if key in FIXED:
            if (value, type(value)) not in [(v, type(v)) for v in FIXED[key]]:
                want = " or ".join(map(repr, FIXED[key]))
                raise ValueError(f"{where}{key} is {repr(value)}; it must be {want}")
        elif value is not None and not (
            key in used or key in HARMLESS or key in HYBRID or key.startswith("_")
        ):
            raise ValueError(
                f"{where}unknown key {repr(key)}; remove it if it does not change "
                "what the model computes"
            )


def _fields(raw: dict, keys: dict) -> dict:
    """Fields of Mamba2Config from the keys of a table."""
    return {ours: _whole(key, raw.get(key, left)) for key, (ours, left) in keys.items()}


def _whole(key: str, value):
    """An integer for a float that is one, as JSON has but one kind of number."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int and abs(value) >= 2**31:
        raise ValueError(f"{key} is {repr(value)}; it must be below 2**31")
    return value


def _size(key: str, value) -> int:
    value = _whole(key, value)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {repr(value)}; it must be a positive integer")
    return value


def _limit(value) -> tuple:
    """(low, high) of a time step limit; infinity is written in several ways."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"time_step_limit is {repr(value)}; it must be two numbers")
    infinite = {"__float__": "Infinity"}, "Infinity", "inf"
    low, high = (math.inf if v in infinite else v for v in value)
    if not all(type(v) in (int, float) for v in (low, high)):
        raise ValueError(f"time_step_limit is {repr(value)}; it must be two numbers")
    return float(low), float(high)
