"""Checkpoints: a round trip loses nothing, and whatever does not fit is named."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssdlib import Mamba2Config, init_cache, init_params, load, save
from ssdlib.checkpoint.config_json import load_config, to_json
from ssdlib.checkpoint.tokenizer import ByteTokenizer, load_tokenizer
from ssdlib.checkpoint.weights import _layout, _stored

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
    name = "backbone.layers.1.mixer.in_proj.weight"
    np.testing.assert_array_equal(stored[name], params["layers"][1]["in"])
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
    assert {layer[k].dtype for k in ("in", "out", "conv")} == {jnp.dtype(jnp.bfloat16)}
    assert {layer[k].dtype for k in ("A_log", "D", "dt_bias", "norm")} == {
        jnp.dtype(jnp.float32)
    }


# --- the original layout --------------------------------------------------------------


def to_original(folder, **changes):
    """Rewrite a saved checkpoint as mamba_ssm does; returns its tensors."""
    raw = json.loads((folder / "config.json").read_text())
    ssm_cfg = {"layer": "Mamba2", "headdim": raw["head_dim"], "chunk_size": 8}
    ssm_cfg |= {"d_state": raw["state_size"], "ngroups": raw["n_groups"]}
    config = {"d_model": raw["hidden_size"], "n_layer": raw["num_hidden_layers"]}
    config |= {"vocab_size": 57, "pad_vocab_size_multiple": 61, "ssm_cfg": ssm_cfg}
    config |= {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors


def test_the_original_layout_loads_from_safetensors(folder):
    whole, config = load(folder)
    save_file(to_original(folder), folder / "model.safetensors")
    original, original_config = load(folder)
    assert original_config == config  # the vocabulary is padded to 61 rows
    jax.tree.map(np.testing.assert_array_equal, original, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_original_layout_loads_from_a_pytorch_file(folder, dtype):
    torch = pytest.importorskip("torch")
    _, config = load(folder)
    tensors = {k: torch.tensor(v) for k, v in to_original(folder).items()}
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]  # tied, as stored
    torch.save(tensors, folder / "pytorch_model.bin")
    for source in (folder, folder / "pytorch_model.bin"):
        params, loaded = load(source, jnp.dtype(dtype))
        assert loaded == config
        W = params["layers"][1]["in"]
        stored = tensors["backbone.layers.1.mixer.in_proj.weight"]
        assert W.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(W.astype(jnp.float32), stored.float().numpy())


def test_a_pytorch_file_runs_no_code(folder, tmp_path):
    torch = pytest.importorskip("torch")

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "boom"), "w")

    to_original(folder)
    torch.save({"backbone.embedding.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: torch cannot read it"):
        load(folder)
    assert not (tmp_path / "boom").exists()


def test_without_torch_the_error_says_what_to_do(folder, monkeypatch):
    to_original(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs torch.*load the model from .* in saf"
    ):
        load(folder)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ssm_cfg={}), "layer is 'Mamba1'; it must be 'Mamba2'"),
        (dict(ssm_cfg={"layer": "Mamba2", "rank": 1}), "unknown key 'rank'"),
        (dict(ssm_cfg={"layer": "Mamba2", "rmsnorm": False}), "rmsnorm is False"),
        (dict(ssm_cfg={"layer": "Mamba2", "headdim": 7}), "headdim is 7; it must div"),
        (dict(ssm_cfg=[]), "ssm_cfg is ..; it must be an object"),
        (
            dict(attn_layer_idx=[3]),
            r"attn_layer_idx is \[3\]: these layers are attention",
        ),
        (dict(n_layer=None), "n_layers: None; it must be a positive integer"),
        (dict(vocab_size="57"), "vocab_size is '57'"),
        (dict(pad_vocab_size_multiple=0), "pad_vocab_size_multiple is 0"),
    ],
)
def test_an_original_config_that_differs_in_kind_is_named(folder, change, message):
    save_file(to_original(folder, **change), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_the_published_configuration_of_130m_is_the_preset(tmp_path):
    config = {"d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277}
    config |= {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}}
    config |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    config |= {"pad_vocab_size_multiple": 16, "tie_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path) == Mamba2Config.preset("130m")


def test_a_key_that_transformers_leaves_out_has_its_default_there(tmp_path):
    """transformers before version 5 wrote only what differs from its defaults."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    config = load_config(tmp_path)
    assert (config.n_groups, config.tie_embeddings, config.d_model) == (8, False, 4096)


def test_norm_before_gate_is_not_looked_at_in_the_transformers_layout(folder):
    """Published files say true and are run with the gate first all the same."""
    whole, _ = load(folder)
    edit_config(folder, norm_before_gate=True)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[0], whole)


# --- memory ---------------------------------------------------------------------------


def test_loading_130m_needs_at_most_1_6_times_the_file(tmp_path):
    """Of a whole process. Skipped where 2 GiB of memory and disk are not at hand."""
    if shutil.disk_usage(tmp_path).free < 2**31:
        pytest.skip("needs 2 GiB of disk")
    config = Mamba2Config.preset("130m")
    tensors = {
        n: np.zeros(_stored(n, s), np.float32) for n, (_, s) in _layout(config).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    code = """
import resource, sys, jax, ssdlib
jax.block_until_ready(ssdlib.load("tiny"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jax.block_until_ready(ssdlib.load(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    unit = 1 if sys.platform == "darwin" else 1024
    file = (tmp_path / "model.safetensors").stat().st_size
    assert file > 5e8
    assert int(done.stdout) * unit <= 1.6 * file, done.stderr


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
        (dict(hidden_size=-1), "hidden_size is -1; it must be a positive integer"),
        (dict(n_groups=3), "n_groups: 3; it must divide"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; it must be 'silu'"),
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
    (folder / "model.safetensors").rename(folder / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="is no folder, no file and no hub id"):
        load("nowhere")


def test_a_tensor_that_comes_twice_is_named(folder):
    name = "backbone.norm_f.weight"
    tensors = load_file(folder / "model.safetensors")
    files = {"a.safetensors": tensors, "b.safetensors": {name: tensors[name]}}
    for file, part in files.items():
        save_file(part, folder / file)
    index = {"weight_map": {str(i): file for i, file in enumerate(files)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"b\.safetensors: tensor '{name}' comes twi"):
        load(folder)


def test_a_tied_head_that_differs_from_the_embedding_is_named(folder):
    whole, _ = load(folder)
    edit(folder, **{"lm_head.weight": np.asarray(whole["embedding"])})
    jax.tree.map(np.testing.assert_array_equal, load(folder)[0], whole)
    edit(folder, **{"lm_head.weight": np.ones((61, 24), np.float32)})
    with pytest.raises(ValueError, match=r"ties .*'lm_head\.weight' differs"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    bad = np.full(24, value, np.float32)
    edit(folder, **{"backbone.layers.1.norm.weight": bad})
    bad = np.full((24, 48), value, np.float32)
    edit(folder, **{"backbone.layers.1.mixer.out_proj.weight": bad})
    with pytest.raises(ValueError, match=r"layers\.1\..*not finite in float"):
        load(folder, jnp.float16)


def test_a_dtype_that_is_no_floating_point_is_named(folder):
    with pytest.raises(ValueError, match="dtype: int32; it must be floating point"):
        load(folder, jnp.int32)
    edit(folder, **{"backbone.norm_f.weight": np.ones(24, np.int32)})
    with pytest.raises(ValueError, match=r"'backbone\.norm_f\.weight' is I32; it must"):
        load(folder)


def test_saving_what_does_not_fit_the_config_is_refused(folder, tmp_path):
    params, config = load(folder)
    del params["layers"][1]["in"]
    with pytest.raises(ValueError, match=r"params: layers\[1\]\['in'\] has shape \(\)"):
        save(tmp_path / "new", params, config)
    with pytest.raises(ValueError, match="params: they hold more arrays"):
        save(tmp_path / "new", load(folder)[0] | {"more": np.ones(1)}, config)
    assert not (tmp_path / "new").exists()


def test_saving_into_the_folder_of_a_sharded_model_replaces_it(folder):
    old = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(old)
    names = dict.fromkeys(load_file(old), old.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    before, config = load(folder)
    new = init_params(config, jax.random.key(1))
    save(folder, new, config)
    after, _ = load(folder)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(before["embedding"]) != np.asarray(after["embedding"])).any()
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (np.int32(1), "is int32")],
)
def test_saving_what_load_would_refuse_is_refused(folder, value, message):
    params, config = load(folder)
    kept = (folder / "model.safetensors").read_bytes()
    wrong = params | {"norm": np.full(config.d_model, value)}
    with pytest.raises(ValueError, match=f"norm_f.weight.* {message}"):
        save(folder, wrong, config)
    assert (folder / "model.safetensors").read_bytes() == kept


def test_float64_is_refused_where_jax_would_make_float32_of_it(folder):
    config = Mamba2Config.tiny()
    for make in (
        lambda: load(folder, jnp.float64),
        lambda: init_params(config, jax.random.key(0), "float64"),
        lambda: init_cache(config, 1, float),
    ):
        with pytest.raises(ValueError, match="dtype: float64; set jax_enable_x64"):
            make()


def test_numbers_in_arrays_leave_a_config_hashable(as_user):
    config = Mamba2Config.tiny(norm_eps=np.array(1e-5))
    assert hash(config) == hash(Mamba2Config.tiny())


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


def test_a_saved_config_names_no_special_tokens_that_nobody_chose(tmp_path):
    """Where config.json has none, transformers takes 0, 1 and 2 of its own."""
    save(tmp_path, *load("tiny"))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert {raw[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")} == {None}
    assert load(tmp_path)[1] == load("tiny")[1]
