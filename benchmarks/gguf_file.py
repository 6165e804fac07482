"""Mamba-2 checkpoints as GGUF, for llama.cpp."""

import json

import numpy as np


def write_gguf(folder, path, dtype):
    """The checkpoint in `folder` as GGUF: matrices in dtype, the rest in float32.

    Names and shapes as llama.cpp reads them (src/models/mamba2.cpp): A itself instead
    of its logarithm, A and D as columns, the norm of the gate one row a group.
    """
    import gguf
    from safetensors.numpy import load_file

    c = json.loads((folder / "config.json").read_text())
    kind = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    kind = gguf.GGMLQuantizationType[kind]
    out = gguf.GGUFWriter(path, "mamba2")
    out.add_context_length(2**20)
    out.add_embedding_length(c["hidden_size"])
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_block_count(c["num_hidden_layers"])
    out.add_ssm_conv_kernel(c["conv_kernel"])
    out.add_ssm_inner_size(c["num_heads"] * c["head_dim"])
    out.add_ssm_state_size(c["state_size"])
    out.add_ssm_time_step_rank(c["num_heads"])
    out.add_ssm_group_count(c["n_groups"])
    out.add_layer_norm_rms_eps(c["layer_norm_epsilon"])
    out.add_vocab_size(c["vocab_size"])
    out.add_tokenizer_model("no_vocab")
    for name, value in load_file(folder / "model.safetensors").items():
        name, value = gguf_tensor(name, value.astype(np.float32), c["n_groups"])
        if name.endswith(("embd.weight", "in.weight", "out.weight")):
            value = gguf.quantize(value, kind)
            out.add_tensor(name, value, raw_dtype=kind)
        else:
            out.add_tensor(name, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_tensor(name, value, n_groups):
    """(name, value) of a tensor of the published layout, as llama.cpp wants it."""
    if not name.startswith("backbone.layers."):
        names = {"embeddings": "token_embd", "norm_f": "output_norm"}
        return f"{names[name.split('.')[1]]}.weight", value
    i, name = name.removeprefix("backbone.layers.").split(".", 1)
    names = {"norm.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight"}
    names |= {f"mixer.conv1d.{k}": f"ssm_conv1d.{k}" for k in ("weight", "bias")}
    names |= {"mixer.dt_bias": "ssm_dt.bias", "mixer.A_log": "ssm_a"}
    names |= {"mixer.D": "ssm_d", "mixer.norm.weight": "ssm_norm.weight"}
    names |= {"mixer.out_proj.weight": "ssm_out.weight"}
    if name == "mixer.A_log":
        value = -np.exp(value)
    if name in ("mixer.A_log", "mixer.D"):
        value = value[:, None]
    elif name == "mixer.conv1d.weight":
        value = value[:, 0]
    elif name == "mixer.norm.weight":
        value = value.reshape(n_groups, -1)
    return f"blk.{i}.{names[name]}", value
