"""Checkpoints: a round trip loses nothing, and whatever does not fit is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssdlib import Mamba2Config, init_params, load, save
from ssdlib.text import ByteTokenizer, load_tokenizer

VARIANTS = {
    "default": {},
    "untied, biases, time step limit": dict(
        tie_embeddings=False, proj_bias=True, time_step_limit=(0.01, 0.1)
    ),
    "no convolution bias": dict(conv_bias=False),
}


@pytest.fixture
def folder(tmp_path):
    config = Mamba2Config.tiny()
    save(tmp_path, init_params(config, jax.random.key(0)), config)
    return tmp_path


def edit(folder, **changes):
    """Change tensors of a saved checkpoint; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}
    save_file(kept, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load_changes_nothing(change, dtype, tmp_path):
    config = Mamba2Config.tiny(**change)
    params = init_params(config, jax.random.key(0), dtype)
    save(tmp_path, params, config)
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        loaded, loaded_config = load(source, dtype)
        assert loaded_config == config
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_stored_projection_is_z_x_B_C_dt(folder):
    """The order of the rows in the published layout."""
    params, config = load(folder)
    stored = load_file(folder / "model.safetensors")
    parts = [params["layers"][1][name] for name in ("z", "xBC", "dt")]
    name = "backbone.layers.1.mixer.in_proj.weight"
    np.testing.assert_array_equal(stored[name], np.concatenate(parts))
    conv = stored["backbone.layers.1.mixer.conv1d.weight"]
    assert conv.shape == (config.d_xBC, 1, config.d_conv)


def test_a_sharded_checkpoint_loads(folder):
    whole, _ = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for shard, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-{shard:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    sharded, _ = load(folder)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dtype_is_converted_but_decays_and_norms_stay_float32(folder):
    params, _ = load(folder, jnp.bfloat16)
    layer = params["layers"][0]
    assert {layer[k].dtype for k in ("z", "xBC", "dt", "out", "conv")} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert {layer[k].dtype for k in ("A_log", "D", "dt_bias", "norm")} == {
        jnp.dtype(jnp.float32)
    }


# --- whatever does not fit is named ---------------------------------------------------


def test_an_unknown_tensor_is_named(folder):
    edit(folder, extra=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="unknown tensor 'extra'"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    edit(folder, **{"backbone.layers.1.mixer.D": None})
    with pytest.raises(ValueError, match=r"1 tensors missing.*layers\.1\.mixer\.D'"):
        load(folder)


def test_a_wrong_shape_is_named(folder):
    edit(folder, **{"backbone.norm_f.weight": np.zeros(5, np.float32)})
    with pytest.raises(
        ValueError, match=r"'backbone\.norm_f\.weight' has shape \(5,\)"
    ):
        load(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -50])
def test_a_truncated_file_is_named(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mamba"), "model_type is 'mamba'; it must be 'mamba2'"),
        (dict(hidden_size=-1), "d_model: -1; it must be a positive integer"),
        (dict(n_groups=3), "n_groups: 3; it must divide"),
        (dict(norm_before_gate=True), "norm_before_gate=true is not supported"),
        (dict(hidden_act="gelu"), "only rms_norm=true, hidden_act='silu'"),
    ],
)
def test_a_bad_config_is_named(folder, change, message):
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_broken_json_and_missing_files_are_named(folder, tmp_path):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="is no folder, no file and no hub id"):
        load("nowhere")


def test_an_index_that_points_outside_its_folder_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="is not a file name in this folder"):
        load(folder)


# --- text -----------------------------------------------------------------------------


def test_bytes_round_trip_every_text():
    tokenizer = ByteTokenizer()
    for text in ("", "plain", "naïve ☃ 𝕊𝕊𝔻", "\n\t"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0xE2, 0x98]) == "\ufffd"  # half a character


def test_a_checkpoint_without_a_tokenizer_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)
