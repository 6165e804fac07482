"""Matrices in eight bits: only they are rounded, and every function takes them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import error
from safetensors.numpy import load_file, save_file

import ssdlib
from ssdlib import Mamba2Config, init_params, int8, quantize
from ssdlib.evaluate import evaluate
from ssdlib.int8 import Int8Matrix, product

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make_golden as golden

CONFIG = Mamba2Config.tiny(vocab_size=64, n_groups=2)
UNTIED = replace(CONFIG, tie_embeddings=False, proj_bias=True)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (2, 21))


def is_matrix(v):
    return isinstance(v, Int8Matrix)


def numbers(params):
    """The same parameters as arrays of float32."""
    widen = lambda v: v.astype(jnp.float32)  # noqa: E731
    return jax.tree.map(widen, params, is_leaf=is_matrix)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def matrix(outputs=40, inputs=96):
    """With an outlier, a row of zeros, and rows of very different sizes."""
    W = RNG.standard_normal((outputs, inputs)).astype(np.float32)
    W *= np.logspace(-20, 10, outputs, dtype=np.float32)[:, None]
    W[3], W[5, 7] = 0, 1e4
    return W


def test_a_weight_is_off_by_half_a_step_of_its_row_at_most():
    W = matrix()
    for xp in (np, jnp):
        q = Int8Matrix.of(W, xp)
        assert q.values.dtype == np.int8 and q.scale.dtype == np.float32
        np.testing.assert_allclose(q.scale, np.abs(W).max(1) / 127, 1e-6)
        off = np.abs(np.float64(q.values) * np.float64(q.scale)[:, None] - W)
        assert (off <= 0.5001 * np.asarray(q.scale)[:, None]).all()
        assert np.abs(np.asarray(q.values, np.int32)).max() == 127
    assert same(Int8Matrix.of(W, np), Int8Matrix.of(W))


@pytest.mark.parametrize("rows", [(), (1,), (3, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_rounds_the_weights_alone(rows, dtype, monkeypatch):
    q = Int8Matrix.of(matrix())
    u = RNG.standard_normal((*rows, 96)) * np.logspace(-3, 3, 96)
    u = jnp.asarray(u, jnp.float32).at[..., 5].set(0)
    want = np.float64(u) @ (np.float64(q.values) * np.float64(q.scale)[:, None]).T
    # An entry of u is off by half a step of the low byte, whatever the weights are.
    step = np.abs(np.float64(u)).max(-1, keepdims=True) / 127 / 254
    bound = step / 2 * np.abs(np.float64(q.astype(jnp.float32))).sum(-1)

    def off():
        got = product(q, u, dtype)
        assert got.dtype == dtype and got.shape == (*rows, 40)
        slack = 2 * float(jnp.finfo(dtype).eps) * np.abs(want)
        return np.abs(np.float64(got) - want) - slack

    assert (off() <= bound).all()
    if dtype == jnp.float32:
        monkeypatch.setattr(int8, "FINER", 1e-9)  # no low byte
        with pytest.raises(AssertionError):
            assert (off() <= bound).all()


def test_rows_of_zeros_and_of_nan_stay_what_they_are():
    q, u = Int8Matrix.of(matrix()), jnp.zeros((3, 96)).at[1, 4].set(jnp.nan)
    y = product(q, u, jnp.float32)
    assert (y[0] == 0).all() and jnp.isnan(y[1]).all() and (y[2] == 0).all()


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied, biases"])
def test_every_function_computes_the_model_of_the_rounded_matrices(config):
    params = quantize(init_params(config, jax.random.key(0), jnp.bfloat16))
    matrices = [v for v in jax.tree.leaves(params, is_leaf=is_matrix) if is_matrix(v)]
    assert len(matrices) == 2 * config.n_layers + 1 + (not config.tie_embeddings)
    rest = [v for v in jax.tree.leaves(params, is_leaf=is_matrix) if not is_matrix(v)]
    assert {v.dtype for v in rest} == {jnp.dtype(jnp.float32)}
    want = ssdlib.forward(numbers(params), config, TOKENS)
    got = ssdlib.forward(params, config, TOKENS)
    assert got.dtype == jnp.float32 and error(got, want) <= 5e-4

    logits, cache = ssdlib.prefill(params, config, TOKENS[:, :-1])
    assert cache.conv.dtype == jnp.float32
    assert error(logits, got[:, -2]) <= 1e-5
    logits, _ = ssdlib.decode_step(params, config, TOKENS[:, -1], cache)
    assert error(logits, got[:, -1]) <= 1e-5

    # A row of the batch is read with its own scale.
    alone = ssdlib.forward(params, config, TOKENS[:1])
    assert error(alone, got[:1]) <= 1e-5
    out_of_range = jnp.asarray(TOKENS).at[0, 3].set(64)
    made = jax.jit(ssdlib.forward, static_argnums=1)(params, config, out_of_range)
    assert jnp.isnan(made[0, 3:]).all() and not jnp.isnan(made[1]).any()


def test_generate_is_the_loop_of_its_steps():
    params = init_params(CONFIG, jax.random.key(0), "int8")
    made = ssdlib.generate(params, CONFIG, TOKENS, 12).tokens
    logits, cache = ssdlib.prefill(params, CONFIG, TOKENS)
    for i in range(12):
        token = logits.argmax(-1)
        np.testing.assert_array_equal(made[:, i], token)
        logits, cache = ssdlib.decode_step(params, CONFIG, token, cache)
    drawn = dict(temperature=1.0, top_p=0.9, key=jax.random.key(1))
    whole = ssdlib.generate(params, CONFIG, TOKENS, 12, **drawn)
    blocks = ssdlib.stream(params, CONFIG, TOKENS, 12, block=5, **drawn)
    np.testing.assert_array_equal(np.concatenate([*blocks], 1), whole.tokens)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied, biases"])
def test_save_and_load_keep_every_bit(config, tmp_path):
    params = init_params(config, jax.random.key(0))
    ssdlib.save(tmp_path / "float32", params, config)
    loaded, _ = ssdlib.load(tmp_path / "float32", "int8")
    assert same(loaded, quantize(params)) and same(loaded, quantize(loaded))
    assert same(loaded, init_params(config, jax.random.key(0), "int8"))

    ssdlib.save(tmp_path / "int8", loaded, config)
    again, config_again = ssdlib.load(tmp_path / "int8", jnp.int8)
    assert same(again, loaded) and config_again == config
    wide, _ = ssdlib.load(tmp_path / "int8")
    assert same(wide, numbers(loaded))
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    name = "backbone.layers.1.mixer.in_proj.weight"
    rows = len(stored[name])
    assert stored[name].dtype == np.int8 and stored[f"{name}_scale"].shape == (rows, 1)
    about = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert about["quantization_config"]["format"] == "int-quantized"


def test_bytes_without_a_scale_and_other_formats_are_refused(tmp_path):
    ssdlib.save(tmp_path, init_params(CONFIG, jax.random.key(0), "int8"), CONFIG)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "backbone.layers.0.mixer.out_proj.weight"
    scale = tensors.pop(f"{name}_scale")
    for wrong in ({}, {f"{name}_scale": scale[:-1]}, {f"{name}_scale": scale * np.nan}):
        save_file(tensors | wrong, file)
        with pytest.raises(ValueError, match=name):
            ssdlib.load(tmp_path, "int8")
    whole = tensors | {f"{name}_scale": scale}
    norm = "backbone.layers.0.norm.weight"  # no matrix, though as many scales fit
    many = np.ones((len(whole[norm]), 1), np.float32)
    bytes_ = {norm: np.ones(len(many), np.int8), f"{norm}_scale": many}
    save_file(whole | bytes_, file)
    with pytest.raises(ValueError, match=norm):
        ssdlib.load(tmp_path)
    save_file(whole, file)
    about = json.loads((tmp_path / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="quantization_config is"):
        ssdlib.load(tmp_path)


def test_a_copy_of_the_tied_embedding_must_be_its_equal(tmp_path):
    ssdlib.save(tmp_path, init_params(CONFIG, jax.random.key(0), "int8"), CONFIG)
    file, copied = tmp_path / "model.safetensors", {}
    tensors = load_file(file)
    for name in ("weight", "weight_scale"):
        copied[f"lm_head.{name}"] = tensors[f"backbone.embeddings.{name}"]
    save_file(tensors | copied, file)
    whole = ssdlib.load(tmp_path, "int8")[0]
    assert is_matrix(whole["embedding"]) and "head" not in whole
    for name, other in copied.items():
        save_file(tensors | copied | {name: other[::-1].copy()}, file)
        with pytest.raises(ValueError, match=r"'lm_head.weight' differs"):
            ssdlib.load(tmp_path, "int8")


def test_a_narrower_dtype_rounds_once():
    q = Int8Matrix.of(RNG.standard_normal((40, 96)).astype(np.float32), np)
    wide = q.astype(np.float32)
    np.testing.assert_array_equal(q.astype(jnp.bfloat16), wide.astype(jnp.bfloat16))


def test_a_checkpoint_in_eight_bits_is_refused_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ssdlib.save(tmp_path, init_params(CONFIG, jax.random.key(0), "int8"), CONFIG)
    # Without the package that its config.json names, and with it (0.15), as that has
    # no such embedding.
    with pytest.raises((ImportError, AttributeError)):
        transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["int4", jnp.int16, "eight", None, 8])
def test_other_integers_are_no_dtype_of_weights(value):
    with pytest.raises(ValueError, match="of at least 16 bits or int8"):
        init_params(CONFIG, jax.random.key(0), value)
    with pytest.raises(ValueError, match="of at least 16 bits or int8"):
        ssdlib.load("tiny", value)


def test_the_shipped_model_loses_less_than_half_a_percent_of_perplexity():
    params, config = ssdlib.load("tiny")
    text = golden.passage("shipped")[0]
    whole = evaluate(params, config, text).perplexity
    rounded = evaluate(quantize(params), config, text).perplexity
    assert abs(rounded / whole - 1) <= 5e-3
