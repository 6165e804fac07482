"""Checkpoints of other projects: each loads with the right logits, or says why not.

The table in book/api/checkpoints.md is made from the cases of this file. To write it
anew after a change: python tests/test_checkpoints.py
"""

import json
import math
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssdlib import Mamba2Config, forward, init_params, load, save
from ssdlib.checkpoint.config_json import FIXED, HARMLESS, load_config
from ssdlib.checkpoint.tokenizer import load_tokenizer

PAGE = Path(__file__).parent.parent / "book/api/checkpoints.md"
CONFIG = Mamba2Config.tiny(vocab_size=64, norm_eps=1e-3, time_step_limit=(0.01, 0.02))
FIELDS = dict(norm_eps=1e-5, time_step_limit=(0.0, math.inf))
PLAIN = Mamba2Config.tiny(vocab_size=64)
WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 19))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, init_params(PLAIN, jax.random.key(0)), PLAIN)
    return tmp_path


def edit(folder, **changes):
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def mamba_ssm(folder, **changes):
    """Replace config.json by one of mamba_ssm, for the same tensors."""
    ssm = {"layer": "Mamba2", "headdim": 12, "d_state": 10, "ngroups": 2}
    raw = {"d_model": 24, "n_layer": 2, "vocab_size": 64, "d_intermediate": 0}
    raw |= {"ssm_cfg": ssm | {"chunk_size": 8}, "attn_layer_idx": [], "attn_cfg": {}}
    raw |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    (folder / "config.json").write_text(json.dumps(raw | changes))


def fla(folder, **changes):
    """Replace config.json by one of flash-linear-attention, with all of its keys."""
    raw = json.loads((folder / "config.json").read_text())
    kept = "vocab_size hidden_size num_hidden_layers num_heads head_dim state_size "
    kept += "n_groups conv_kernel chunk_size tie_word_embeddings model_type"
    raw = {key: raw[key] for key in kept.split()} | {"norm_eps": 1e-5, "expand": 2}
    raw |= {"dt_limit": [0.0, math.inf], "dt_min": 0.001, "dt_max": 0.1}
    raw |= {"dt_init_floor": 1e-4, "A_init_range": [1, 16], "conv_init": None}
    raw |= {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
    raw |= {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}
    raw |= {"initializer_range": 0.02, "rescale_prenorm_residual": True}
    raw |= {"residual_in_fp32": True, "use_cache": True, "fuse_norm": True}
    raw |= {"fuse_cross_entropy": True, "fuse_linear_cross_entropy": False}
    raw |= {"use_l2warp": False, "pad_token_id": 0, "bos_token_id": 1}
    raw |= {"eos_token_id": 2, "transformers_version": "4.53.0"}
    raw |= {"torch_dtype": "bfloat16", "architectures": ["Mamba2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw | changes))


def take(folder):
    """The tensors of a saved checkpoint, whose file is gone then."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    return tensors


def pickled(folder, make=lambda tensors: tensors, name=BIN):
    """The same weights as torch stores them."""
    torch = pytest.importorskip("torch")
    tensors = {k: torch.tensor(v) for k, v in take(folder).items()}
    torch.save(make(tensors), folder / name)


def trainable(tensors):
    """What named_parameters() gives: tensors that require grad."""
    torch = sys.modules["torch"]
    return {k: torch.nn.Parameter(v) for k, v in tensors.items()}


def sparse(tensors):
    name = "lm_head.weight"
    return tensors | {name: tensors["backbone.embeddings.weight"].to_sparse()}


def sharded(folder, index=True, suffix=".safetensors", missing=()):
    """Cut the weights in two files, with an index or without."""
    tensors, places = take(folder), {}
    for i, names in enumerate((sorted(tensors)[:7], sorted(tensors)[7:]), 1):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        file = f"{stem}-{i:05}-of-00002{suffix}"
        part = {name: tensors[name] for name in names}
        if i not in missing and suffix == ".safetensors":
            save_file(part, folder / file)
        elif i not in missing:
            torch = pytest.importorskip("torch")
            torch.save({k: torch.tensor(v) for k, v in part.items()}, folder / file)
        places |= dict.fromkeys(names, file)
    if index:
        path = folder / (f"{stem}{suffix}.index.json")
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def renamed(folder, name):
    (folder / WEIGHTS).rename(folder / name)


def prefixed(prefix):
    return lambda tensors: {prefix + k: v for k, v in tensors.items()}


# (project, file, what it holds): (how to make it, the beginning of the error or None)
CASES = {
    ("transformers", "config.json", "`model_type` mamba2"): (lambda f: None, None),
    ("transformers", "config.json", "`norm_before_gate` true, as Codestral has it"): (
        lambda f: edit(f, norm_before_gate=True, time_step_scale=1.0),
        None,
    ),
    ("transformers", "config.json", "another `hidden_act`"): (
        lambda f: edit(f, hidden_act="gelu"),
        "config.json: hidden_act is 'gelu'; it must be",
    ),
    ("transformers", "config.json", "`quantization_config`, not of `ssdlib.save`"): (
        lambda f: edit(f, quantization_config={"bits": 4}),
        "config.json: quantization_config is {'bits': 4}",
    ),
    ("transformers", "config.json", "another `model_type`: Zamba2, Bamba, ..."): (
        lambda f: edit(f, model_type="zamba2"),
        "config.json: model_type is 'zamba2'; it must be 'mamba2'",
    ),
    ("flash-linear-attention", "config.json", "its own keys"): (fla, None),
    ("flash-linear-attention", "config.json", "`rmsnorm` false"): (
        lambda f: fla(f, rmsnorm=False),
        "config.json: rmsnorm is False; it must be True",
    ),
    ("flash-linear-attention", "config.json", "`norm_before_gate` true"): (
        lambda f: fla(f, norm_before_gate=True),
        "config.json: norm_before_gate is True; it must be False",
    ),
    ("flash-linear-attention", "config.json", "`D_has_hdim` true"): (
        lambda f: fla(f, D_has_hdim=True),
        "config.json: D_has_hdim is True; it must be False",
    ),
    ("mamba_ssm", "config.json", "`ssm_cfg` of Mamba-2"): (mamba_ssm, None),
    ("mamba_ssm", "config.json", "`model_type` added by a converter"): (
        lambda f: mamba_ssm(f, model_type="mamba2"),
        None,
    ),
    ("mamba_ssm", "config.json", "no `layer` in `ssm_cfg`: Mamba-1"): (
        lambda f: mamba_ssm(f, ssm_cfg=None),
        "config.json: ssm_cfg: layer is 'Mamba1'; it must be 'Mamba2'",
    ),
    ("mamba_ssm", "config.json", "attention in some layers"): (
        lambda f: mamba_ssm(f, attn_layer_idx=[9, 18]),
        "config.json: attn_layer_idx is [9, 18]: these layers are attention",
    ),
    ("mamba_ssm", "config.json", "an MLP in each layer (`d_intermediate`)"): (
        lambda f: mamba_ssm(f, d_intermediate=64),
        "config.json: d_intermediate is 64; it must be 0",
    ),
    ("safetensors", WEIGHTS, "one file"): (lambda f: None, None),
    ("safetensors", "model-0000*-of-00002.safetensors", "shards and an index"): (
        sharded,
        None,
    ),
    ("safetensors", "model-0000*-of-00002.safetensors", "all shards, no index"): (
        lambda f: sharded(f, index=False),
        None,
    ),
    ("safetensors", "model-0000*-of-00002.safetensors", "not all shards"): (
        lambda f: sharded(f, index=False, missing=[1]),
        "FOLDER: no model-00001-of-00002.safetensors",
    ),
    ("safetensors", "consolidated.safetensors", "the path of the folder"): (
        lambda f: renamed(f, "consolidated.safetensors"),
        "FOLDER: no model.safetensors and no pytorch_model.bin; load one of its files "
        "by its own path: consolidated.safetensors",
    ),
    ("safetensors", "consolidated.safetensors", "the path of the file"): (
        lambda f: renamed(f, "consolidated.safetensors") or "consolidated.safetensors",
        None,
    ),
    ("PyTorch", BIN, "`model.state_dict()`"): (pickled, None),
    ("PyTorch", BIN, "`dict(model.named_parameters())`"): (
        lambda f: pickled(f, trainable),
        None,
    ),
    ("PyTorch", BIN, "in a `state_dict` or `model` beside other things"): (
        lambda f: pickled(f, lambda t: {"epoch": 3, "state_dict": {"model": t}}),
        None,
    ),
    ("PyTorch", BIN, "names behind `module.` or `_orig_mod.`"): (
        lambda f: pickled(f, prefixed("module._orig_mod.")),
        None,
    ),
    ("PyTorch", "pytorch_model-0000*-of-00002.bin", "shards and an index"): (
        lambda f: sharded(f, suffix=".bin"),
        None,
    ),
    ("PyTorch", "last.ckpt", "the path of the file"): (
        lambda f: pickled(f, name="last.ckpt") or "last.ckpt",
        None,
    ),
    ("PyTorch", BIN, "a sparse tensor"): (
        lambda f: pickled(f, sparse),
        "pytorch_model.bin: tensor 'lm_head.weight' is torch.sparse_coo; it must be",
    ),
    ("PyTorch", BIN, "a whole pickled model: it could run code"): (
        lambda f: pickled(f, lambda t: Path("model")),
        "pytorch_model.bin: torch cannot read it as plain weights",
    ),
}
IDS = [f"{project}: {what}" for project, _, what in CASES]


def outcome(make, folder):
    """(logits, None), or (None, the error)."""
    source = folder / (make(folder) or "")
    try:
        return forward(*load(source), TOKENS), None
    except (ValueError, OSError) as error:
        return None, str(error).replace(folder.name, "FOLDER")


@pytest.mark.parametrize(("make", "message"), CASES.values(), ids=IDS)
def test_a_file_of_another_project_loads_right_or_says_why_not(folder, make, message):
    want = forward(*load(folder), TOKENS)
    logits, error = outcome(make, folder)
    if message is None:
        assert error is None
        np.testing.assert_array_equal(logits, want)
    else:
        assert error.startswith(message)
        assert "\n" not in error


def table():
    """The table of the page, from what happens."""
    rows = ["| from | file | that holds | |", "|---|---|---|---|"]
    for (project, file, what), (make, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            save(folder, init_params(PLAIN, jax.random.key(0)), PLAIN)
            _, error = outcome(make, folder)
        shown = (
            "loads"
            if error is None
            else f"`{re.split('; it must|; remove| [(]', error)[0]}`"
        )
        rows.append(f"| {project} | `{file}` | {what} | {shown} |")
    return "\n".join(rows).replace("FOLDER", "my-model")


def test_the_table_of_the_reference_is_what_happens():
    pytest.importorskip("torch")
    assert table() in PAGE.read_text(), "python tests/test_checkpoints.py writes it"


# --- keys of a config -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "limit"),
    [
        ("layer_norm_epsilon", "time_step_limit"),
        ("norm_eps", "dt_limit"),
        ("rms_norm_eps", "time_step_limit"),
    ],
)
def test_a_key_by_another_name_has_its_effect_and_transformers_agrees(
    folder, norm, limit
):
    """Mamba2ForCausalLM computes the same, with eps and limit by its own names."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3}
    raw |= {"time_step_limit": [0.01, 0.02]}
    path.write_text(json.dumps(raw))
    model = transformers.Mamba2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(torch.as_tensor(TOKENS), use_cache=False).logits.numpy()
    raw[norm], raw[limit] = raw.pop("layer_norm_epsilon"), raw.pop("time_step_limit")
    path.write_text(json.dumps(raw))
    params, config = load(folder)
    assert (config.norm_eps, config.time_step_limit) == (1e-3, (0.01, 0.02))
    ours = np.asarray(forward(params, config, TOKENS))
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_two_names_of_one_thing_must_agree(folder):
    edit(folder, norm_eps=1e-5, d_model=24)
    assert load_config(folder) == PLAIN
    edit(folder, norm_eps=1e-3)
    message = "norm_eps is 0.001, but layer_norm_epsilon is 1e-05; both mean the same"
    with pytest.raises(ValueError, match=message):
        load_config(folder)


def test_every_key_that_transformers_may_write_is_known(tmp_path):
    """Those of version 5 from itself; the older ones are in the lists by hand."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(num_heads=128, hidden_size=4096)
    whole = json.loads(config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert load_config(tmp_path).d_model == 4096


def test_the_lists_of_keys_are_disjoint():
    assert not HARMLESS & FIXED.keys()


@pytest.mark.parametrize(
    "change",
    [
        dict(ssm_cfg={"layer": "Mamba2", "expand": 2.0, "headdim": 12.0}),
        dict(attn_layer_idx=None, attn_cfg=None, torch_dtype="float16"),
        dict(d_model=24.0, ssm_cfg={"layer": "Mamba2", "headdim": 12, "d_ssm": None}),
        dict(model_type="mamba2", ssm_cfg=None, d_model=64),
    ],
)
def test_a_null_a_whole_float_and_a_harmless_key_are_accepted(tmp_path, change):
    mamba_ssm(tmp_path, **change)
    config = load_config(tmp_path)
    assert config.d_inner == 2 * change.get("d_model", 24)
    assert all(type(n) is int for n in (config.d_model, config.head_dim))


@pytest.mark.parametrize("sizes", [dict(chunk_size=8.0), dict(expand=2.0)])
def test_a_size_may_be_a_whole_float(folder, sizes):
    edit(folder, **sizes)
    assert load_config(folder) == PLAIN


@pytest.mark.parametrize("key", ["chunk_sise", "a" * 500, "line\nbreak"])
def test_an_unknown_key_is_refused_by_name_unless_it_is_null(folder, key):
    edit(folder, **{key: None, "_name_or_path": "x"})
    assert load_config(folder) == PLAIN
    edit(folder, **{key: 1})
    with pytest.raises(ValueError, match="unknown key") as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


# --- where files are ------------------------------------------------------------------


@pytest.mark.parametrize("read", [load, load_tokenizer])
def test_an_empty_folder_that_hides_a_repository_is_named(tmp_path, monkeypatch, read):
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    message = "the folder 'org/model' is empty; it hides the repository of that name"
    with pytest.raises(FileNotFoundError, match=message):
        read("org/model")
    with pytest.raises(FileNotFoundError, match=r"is empty$"):
        read(tmp_path / "org/model")


@pytest.mark.parametrize("read", [load, load_tokenizer])
def test_a_source_without_a_name_is_not_this_folder(folder, monkeypatch, read):
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError, match="source: '' is no folder"):
        read("")


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition("| from | file |")
    after = rest[rest.index("\n\n") :]
    PAGE.write_text(before + table() + after)
