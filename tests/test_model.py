"""The language model and its cache."""

import dataclasses
import itertools
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ssdlib import (
    Mamba2Config,
    decode_step,
    forward,
    generate,
    init_cache,
    init_params,
    prefill,
    save,
)
from ssdlib.model import pieces, read_all
from ssdlib.model import read as unchecked

CONFIG = Mamba2Config.tiny()
PARAMS = init_params(CONFIG, jax.random.key(0))
T = 21  # not a multiple of the chunk of 8
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, T))
LOGITS = forward(PARAMS, CONFIG, TOKENS)

VARIANTS = {
    "two groups": {},
    "one group": dict(n_groups=1),
    "a group per head": dict(n_groups=4),
    "untied head": dict(tie_embeddings=False),
    "biases": dict(proj_bias=True, conv_bias=False),
    "a time step limit that bites": dict(time_step_limit=(0.01, 0.02)),
    "odd sizes": dict(d_model=15, head_dim=7, d_state=9, n_groups=1, d_conv=3),
    "a one-tap convolution": dict(d_conv=1),
}


def disturbed(params, seed=1):
    """Random values for what `init_params` leaves at one or zero."""
    rng = np.random.default_rng(seed)

    def noisy(v):
        return jnp.asarray(v + 0.1 * rng.standard_normal(v.shape), v.dtype)

    return jax.tree.map(noisy, jax.tree.map(np.asarray, params))


def biased():
    """A model whose blocks give even an input of zeros a result: (params, config)."""
    config = Mamba2Config.tiny(proj_bias=True)
    return disturbed(init_params(config, jax.random.key(0))), config


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_model_equals_the_oracle_on_the_saved_checkpoint(change, tmp_path):
    config = Mamba2Config.tiny(**change)
    params = disturbed(init_params(config, jax.random.key(0)))
    save(tmp_path, params, config)
    tensors = load_file(tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    logits = forward(params, config, TOKENS)
    last, cache = prefill(params, config, TOKENS)
    for i, row in enumerate(TOKENS):
        logits_star, states = oracle.mamba2(tensors, raw, row)
        assert oracle.error(logits[i], logits_star) <= 1e-5
        assert oracle.error(last[i], logits_star[-1]) <= 1e-5
        for h, h_star in zip(cache.h, states, strict=True):
            assert oracle.error(h[i], h_star) <= 1e-5


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.sampled_from([1, 7, 8, 14, T - 1])))  # few lengths of a part
def test_any_split_carried_by_the_cache_equals_the_whole(cuts):
    """transformers #46741: a later multi-token call must not take a one-token path."""
    edges = [0, *sorted(cuts), T]
    _, whole = prefill(PARAMS, CONFIG, TOKENS)
    cache = None
    for start, stop in itertools.pairwise(edges):
        logits, cache = prefill(PARAMS, CONFIG, TOKENS[:, start:stop], cache)
        assert oracle.error(logits, LOGITS[:, stop - 1]) <= 1e-5
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        assert oracle.error(a, b) <= 1e-5


def test_prefill_then_steps_equal_forward():
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[:, :5])
    for t in range(5, T):
        logits, cache = decode_step(PARAMS, CONFIG, TOKENS[:, t], cache)
        assert oracle.error(logits, LOGITS[:, t]) <= 1e-5


def test_steps_from_nothing_equal_forward():
    cache = init_cache(CONFIG, 3)
    for t in range(T):
        logits, cache = decode_step(PARAMS, CONFIG, TOKENS[:, t], cache)
        assert oracle.error(logits, LOGITS[:, t]) <= 1e-5


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 3, 8, 13, T]), min_size=3, max_size=3),
    junk=st.integers(0, CONFIG.vocab_size - 1),
    continued=st.booleans(),
)
def test_right_padding_changes_no_logit_and_no_cache(lengths, junk, continued):
    """transformers #48256, #46773 and mamba #783."""
    lengths = np.asarray(lengths)
    padded = np.where(np.arange(T) < lengths[:, None], TOKENS, junk)
    start = prefill(PARAMS, CONFIG, TOKENS)[1] if continued else None
    logits, cache = prefill(PARAMS, CONFIG, padded, start, lengths=lengths)
    for i, n in enumerate(lengths):
        one = jax.tree.map(lambda v, i=i: v[i : i + 1], start)
        alone, cache_alone = prefill(PARAMS, CONFIG, TOKENS[i : i + 1, :n], one)
        assert oracle.error(logits[i], alone[0]) <= 1e-5
        rows = jax.tree.map(lambda v, i=i: v[i], cache)
        for a, b in zip(
            jax.tree.leaves(rows), jax.tree.leaves(cache_alone), strict=True
        ):
            assert oracle.error(a, b[0]) <= 1e-5


def test_forward_with_lengths_keeps_real_logits_and_zeroes_the_rest():
    lengths = np.asarray([1, 9, T])
    params, config = biased()
    logits = forward(params, config, TOKENS, lengths)
    real = np.arange(T) < lengths[:, None]
    assert oracle.error(logits[real], forward(params, config, TOKENS)[real]) <= 1e-6
    assert (np.asarray(logits)[~real] == 0).all()


def test_no_logit_depends_on_a_later_token():
    """But for the last bits, as in test_forms."""
    changed = TOKENS.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % CONFIG.vocab_size
    logits = forward(PARAMS, CONFIG, changed)
    assert oracle.error(logits[:, :12], LOGITS[:, :12]) <= 1e-6
    assert np.abs(logits[:, 12:] - LOGITS[:, 12:]).max() > 1e-3


def test_a_row_of_a_batch_equals_the_row_alone():
    for i in range(3):
        alone = forward(PARAMS, CONFIG, TOKENS[i : i + 1])
        assert oracle.error(alone[0], LOGITS[i]) <= 1e-6


def test_chunk_size_changes_nothing():
    for Q in (1, 5, 64):
        logits = forward(PARAMS, Mamba2Config.tiny(chunk_size=Q), TOKENS)
        assert oracle.error(logits, LOGITS) <= 1e-5


def test_bfloat16_weights_keep_state_and_residual_in_float32():
    params = init_params(CONFIG, jax.random.key(0), jnp.bfloat16)
    logits, cache = prefill(params, CONFIG, TOKENS)
    assert {v.dtype for v in cache.h} == {jnp.dtype(jnp.float32)}
    assert cache.conv.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert oracle.error(logits, LOGITS[:, -1]) <= 3e-2
    _, after = decode_step(params, CONFIG, TOKENS[:, 0], cache)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), after) == jax.tree.map(
        lambda v: (v.shape, v.dtype), cache
    )


def test_the_cache_is_a_pytree_whose_size_ignores_the_length():
    _, short = prefill(PARAMS, CONFIG, TOKENS[:, :1])
    _, long = prefill(PARAMS, CONFIG, TOKENS)
    assert jax.tree.structure(short) == jax.tree.structure(long)
    assert short.nbytes == long.nbytes == init_cache(CONFIG, 3).nbytes


def test_the_cost_of_a_step_does_not_contain_the_chunk_size():
    def flops(Q):
        config = Mamba2Config.tiny(chunk_size=Q)
        step = jax.jit(lambda token, cache: decode_step(PARAMS, config, token, cache))
        compiled = step.lower(TOKENS[:, 0], init_cache(config, 3)).compile()
        return compiled.cost_analysis()["flops"], compiled.as_text()

    (small, _), (large, text) = flops(8), flops(251)
    assert small == large
    shapes = set(re.findall(r"\[([\d,]+)\]", text))
    assert {"3,61"} <= shapes and not any("251" in s.split(",") for s in shapes)


@pytest.mark.parametrize("n", [1, T], ids=["a step", "many tokens"])
def test_more_layers_are_traced_and_lowered_once(n):
    products = []
    for layers in (1, 5):
        config = dataclasses.replace(CONFIG, n_layers=layers)
        params = init_params(config, jax.random.key(0))
        read = jax.jit(unchecked, static_argnames="config")
        lowered = read.lower(params, config, TOKENS[:, :n], init_cache(config, 3))
        products.append(lowered.as_text().count("dot_general"))
    assert products[0] == products[1] > 0


@pytest.mark.parametrize("size", ["130m", "370m", "780m", "1.3b", "2.7b"])
def test_presets_have_the_published_number_of_parameters(size):
    millions = {"130m": 128.99, "370m": 368.35, "780m": 780.16}
    millions |= {"1.3b": 1343.76, "2.7b": 2702.60}
    config = Mamba2Config.preset(size)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 2) == millions[size]


def test_gradients_reach_every_parameter():
    def loss(params):
        return (forward(params, CONFIG, TOKENS) ** 2).mean()

    for path, g in jax.tree.flatten_with_path(jax.grad(loss)(PARAMS))[0]:
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path


# --- bad input ------------------------------------------------------------------------

BAD_TOKENS = {
    "float": (
        TOKENS.astype(np.float32),
        "tokens: dtype float32; it must hold integers",
    ),
    "rank": (TOKENS[0], r"tokens: shape \(21,\); it must be \(b, T\)"),
    "empty": (TOKENS[:, :0], r"tokens: shape \(3, 0\) holds nothing"),
    "too large": (TOKENS + 60, r"tokens: \d+ is outside 0..60"),
    "negative": (TOKENS - 61, r"tokens: -\d+ is outside 0..60"),
}


@pytest.mark.parametrize("n", [1, 13])
def test_a_row_of_length_0_keeps_its_cache_and_has_no_logits(n):
    params, config = biased()
    _, before = prefill(params, config, TOKENS)
    lengths = np.asarray([n, 0, 1])
    logits, after = prefill(params, config, TOKENS[:, :n], before, lengths)
    assert not logits[1].any() and logits[0].any() and logits[2].any()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert (new[0] != old[0]).any()
    np.testing.assert_array_equal(after.length, before.length + lengths)
    assert not forward(params, config, TOKENS[:, :n], lengths)[1].any()


@pytest.mark.parametrize("piece", [1, 8, 20, 64])
def test_reading_in_pieces_gives_the_logits_and_the_cache_of_one_pass(piece):
    _, before = prefill(PARAMS, CONFIG, TOKENS)
    for lengths in (None, np.asarray([T, 0, 9])):
        whole = prefill(PARAMS, CONFIG, TOKENS, before, lengths)
        cut = prefill(PARAMS, CONFIG, TOKENS, before, lengths, piece)
        for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
            assert oracle.error(a, b) <= 1e-5
    tokens = TOKENS[:, : 2 * piece + 1]  # three pieces, for the compiler's sake
    rows = jax.jit(lambda tokens: prefill(PARAMS, CONFIG, tokens, piece=piece))(tokens)
    assert oracle.error(rows[0], prefill(PARAMS, CONFIG, tokens)[0]) <= 1e-5


def test_logits_ahead_are_those_of_reading_on_and_the_cache_does_not_read_on():
    lengths, k = np.asarray([5, 1, T - 3], np.int32), 3
    read_ahead = jax.jit(partial(read_all, PARAMS, CONFIG, ahead=k))
    logits, cache = read_ahead(TOKENS, init_cache(CONFIG, 3), lengths)
    at = lengths[:, None] - 1 + np.arange(k + 1)[None]
    assert oracle.error(logits, np.take_along_axis(LOGITS, at[..., None], 1)) <= 1e-5
    _, alone = prefill(PARAMS, CONFIG, TOKENS, lengths=lengths)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(alone), strict=True):
        assert oracle.error(a, b) <= 1e-5


BAD_LENGTHS = {
    "negative": ([-3, 1, 2], r"lengths: -3 is outside 0..21"),
    "beyond": ([22, 1, 2], r"lengths: 22 is outside"),
    "shape": ([1, 2], r"lengths: shape \(2,\); it must be \(3\)"),
    "dtype": ([1.0, 2.0, 3.0], r"lengths: dtype float"),
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("function", [forward, prefill])
@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_tokens_are_named(function, tokens, message):
    with pytest.raises(ValueError, match=message):
        function(PARAMS, CONFIG, tokens)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("function", [forward, prefill])
@pytest.mark.parametrize(("lengths", "message"), BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_lengths_are_named(function, lengths, message):
    with pytest.raises(ValueError, match=message):
        function(PARAMS, CONFIG, TOKENS, lengths=np.asarray(lengths))


@pytest.mark.usefixtures("as_user")
def test_a_bad_step_is_named():
    cache = init_cache(CONFIG, 3)
    with pytest.raises(ValueError, match=r"token: shape \(3, 1\); it must be \(b\)"):
        decode_step(PARAMS, CONFIG, TOKENS[:, :1], cache)
    with pytest.raises(ValueError, match=r"token: 61 is outside 0..60"):
        decode_step(PARAMS, CONFIG, np.full(3, 61), cache)
    with pytest.raises(ValueError, match=r"cache: .* this model and batch need"):
        decode_step(PARAMS, CONFIG, TOKENS[:2, 0], cache)
    with pytest.raises(ValueError, match=r"cache: h is .*; it must be a tuple"):
        decode_step(
            PARAMS, CONFIG, TOKENS[:, 0], dataclasses.replace(cache, h=list(cache.h))
        )
    half = tuple(h.astype(jnp.bfloat16) for h in cache.h)
    with pytest.raises(ValueError, match="cache: h is bfloat16; it must be float32"):
        decode_step(PARAMS, CONFIG, TOKENS[:, 0], dataclasses.replace(cache, h=half))
    with pytest.raises(ValueError, match="batch_size: 0"):
        init_cache(CONFIG, 0)
    with pytest.raises(ValueError, match=r"dtype: float8.*; .* of at least 16 bits"):
        init_cache(CONFIG, 1, "float8_e4m3fn")


def test_inside_a_compiled_program_an_unknown_token_gives_nan():
    tokens = jnp.asarray(TOKENS).at[1, 7].set(CONFIG.vocab_size)
    logits = jax.jit(lambda tokens: forward(PARAMS, CONFIG, tokens))(tokens)
    assert np.isnan(logits[1, 7:]).all()
    assert not np.isnan(logits[::2]).any()


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_groups=3), "n_groups: 3; it must divide n_heads = 4"),
        (dict(d_state=0), "d_state: 0; it must be a positive integer"),
        (dict(d_model="24"), "d_model: '24'; it must be a positive integer"),
        (dict(n_layers=True), "n_layers: True; it must be a positive integer"),
        (dict(time_step_limit=(0.2, 0.1)), "time_step_limit: .* 0 <= low <= high"),
        (dict(norm_eps=-1.0), "norm_eps: -1.0"),
    ],
)
def test_a_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config.tiny(**change)


def test_an_integer_of_numpy_is_an_integer(as_user):
    config = Mamba2Config.tiny(n_layers=np.int64(2))
    assert config == Mamba2Config.tiny(n_layers=2) and type(config.n_layers) is int


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="name: '7b'; it must be one of 130m, 370m"):
        Mamba2Config.preset("7b")


@pytest.mark.parametrize(("b", "T"), [(3, 1), (1, 5), (3, 40)])
def test_float16_is_as_near_to_float32_as_bfloat16(b, T):
    """A T4 has no bfloat16. Forward, prefill, a step and the loop, rows of 1 and 3."""
    config = Mamba2Config.tiny()
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(b).integers(0, config.vocab_size, (b, T))

    def errors(dtype):
        half = init_params(config, jax.random.key(0), dtype)
        logits, cache = prefill(half, config, tokens)
        after, _ = decode_step(half, config, tokens[:, 0], cache)
        exact, cache = prefill(params, config, tokens)
        want, _ = decode_step(params, config, tokens[:, 0], cache)
        whole = forward(half, config, tokens)
        full = forward(params, config, tokens)
        pairs = (logits, exact), (after, want), (whole, full)
        return [oracle.error(a, b) for a, b in pairs]

    for ours, theirs in zip(errors(jnp.float16), errors(jnp.bfloat16), strict=True):
        assert ours <= theirs
    half = init_params(config, jax.random.key(0), jnp.float16)
    made = generate(half, config, tokens, 5)
    assert made.tokens.shape == (b, 5)


def test_no_piece_of_padding_alone_is_read():
    tokens = np.zeros((2, 40), np.int32)
    parts = list(pieces(tokens, np.array([3, 9]), 8))
    assert [left.tolist() for _, left in parts] == [[3, 8], [0, 1]]
    assert len(list(pieces(tokens, np.array([0, 0]), 8))) == 1
    assert len(list(pieces(tokens, None, 8))) == 5


def test_a_residual_near_the_largest_float16_is_normed_like_any_other():
    params = jax.tree.map(lambda v: v, init_params(CONFIG, jax.random.key(0)))
    params["embedding"] = params["embedding"].at[:, 3].set(60_000.0)
    params["layers"] = tuple(p | {"norm": 4 * p["norm"]} for p in params["layers"])
    params |= {"head": params["embedding"] * 0 + 0.1}
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    half = jax.tree.map(lambda v: v.astype(jnp.float16), params)
    want = forward(params, config, TOKENS)
    for got in (
        forward(half, config, TOKENS),
        decode_step(half, config, TOKENS[:, 0], init_cache(config, 3, "float16"))[0],
    ):
        assert jnp.isfinite(got).all()
    error = abs(forward(half, config, TOKENS) - want).max() / abs(want).max()
    assert error < 2e-2
