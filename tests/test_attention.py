"""The growing-cache baseline: causal attention against loops, cached against whole."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ssdlib import Mamba2Config
from ssdlib import init_params as init_mamba_params
from ssdlib.beyond import transformer
from ssdlib.beyond.transformer import (
    AttentionConfig,
    decode_step,
    forward,
    generate,
    init_cache,
    init_params,
    prefill,
    stream,
)

CONFIG = AttentionConfig(
    vocab_size=61, d_model=24, n_layers=2, n_heads=4, head_dim=6, n_kv_heads=2, d_ff=40
)
each_group = pytest.mark.parametrize("G", [1, 2, 4], ids=["G=1", "1<G<H", "G=H"])


def model(seed=0, dtype=jnp.float32, b=2, T=19, **changes):
    """params, config and random tokens; large embeddings, so that attention matters."""
    config = dataclasses.replace(CONFIG, **changes)
    k_params, k_tokens = jax.random.split(jax.random.key(seed))
    params = init_params(config, k_params, dtype)
    params["embedding"] = 50 * params["embedding"]
    return params, config, jax.random.randint(k_tokens, (b, T), 0, config.vocab_size)


def attention_by_loops(p, config, u, k_past, v_past):
    """Softmax over the past and the present in float64, one query at a time.

    Rotations are products with complex numbers. Keys and values are (b, G, s, P).
    """
    p = {name: np.asarray(W, np.float64) for name, W in p.items()}
    u, k_past, v_past = (np.asarray(w, np.float64) for w in (u, k_past, v_past))
    (b, T, _), (H, G, P) = (
        u.shape,
        (config.n_heads, config.n_kv_heads, config.head_dim),
    )
    start = k_past.shape[2]
    rate = config.rope_base ** (-2 * np.arange(P // 2) / P)

    def rotate(w, t):
        turned = (w[: P // 2] + 1j * w[P // 2 :]) * np.exp(1j * t * rate)
        return np.concatenate([turned.real, turned.imag])

    out = np.zeros((b, T, H * P))
    for i, n in np.ndindex(b, H):
        g = n * G // H
        W_q, W_k, W_v = (
            p[name][m * P : (m + 1) * P] for name, m in (("q", n), ("k", g), ("v", g))
        )
        keys, values = list(k_past[i, g]), list(v_past[i, g])
        for t in range(T):
            keys.append(rotate(W_k @ u[i, t], start + t))
            values.append(W_v @ u[i, t])
            q = rotate(W_q @ u[i, t], start + t)
            weights = np.exp([q @ key / np.sqrt(P) for key in keys])
            mean = sum(w * value for w, value in zip(weights, values, strict=True))
            out[i, t, n * P : (n + 1) * P] = mean / weights.sum()
    return out @ p["out"].T


def attention_case(G, start=7, T=11, capacity=23):
    """One layer on random input, with `start` random keys and values in its cache."""
    params, config, _ = model(n_kv_heads=G)
    rng = np.random.default_rng(1)
    u = rng.standard_normal((2, T, config.d_model))
    past = rng.standard_normal((2, 2, G, start, config.head_dim))
    cache = rng.standard_normal((2, 2, G, capacity, config.head_dim))  # noise beyond
    cache[..., :start, :] = past
    k, v = cache.reshape(2, 2 * G, capacity, -1).astype(np.float32)
    p, u = params["layers"][0], u.astype(np.float32)
    past = past.astype(np.float32)
    ours, *_ = transformer._attention(p, config, u, k, v, jnp.int32(start))
    return ours, attention_by_loops(p, config, u, *past)


@each_group
@pytest.mark.parametrize("start", [0, 7])
def test_attention_equals_loops_from_any_start(G, start):
    assert oracle.error(*attention_case(G, start)) <= 2e-6


@each_group
def test_cached_steps_equal_forward(G):
    params, config, tokens = model(n_kv_heads=G)
    star = forward(params, config, tokens)
    logits, cache = prefill(params, config, tokens[:, :8], init_cache(config, 2, 30))
    assert oracle.error(logits, star[:, 7]) <= 1e-5
    for t in range(8, 19):
        logits, cache = decode_step(params, config, tokens[:, t], cache)
        assert oracle.error(logits, star[:, t]) <= 1e-5
    assert int(cache.length) == 19


@pytest.mark.parametrize("cut", [1, 8, 18])
def test_any_split_with_the_cache_carried_equals_the_whole(cut):
    params, config, tokens = model()
    whole, whole_cache = prefill(params, config, tokens, init_cache(config, 2, 19))
    _, cache = prefill(params, config, tokens[:, :cut], init_cache(config, 2, 19))
    logits, cache = prefill(params, config, tokens[:, cut:], cache)
    assert oracle.error(logits, whole) <= 1e-5
    for ours, theirs in zip(
        jax.tree.leaves(cache), jax.tree.leaves(whole_cache), strict=True
    ):
        assert oracle.error(ours, theirs) <= 1e-5


def test_no_logit_depends_on_a_later_token():
    params, config, tokens = model()
    t = 9
    logits = forward(params, config, tokens)
    changed = forward(params, config, tokens.at[:, t + 1 :].set(3))
    np.testing.assert_array_equal(logits[:, : t + 1], changed[:, : t + 1])
    assert np.abs(logits[:, t + 1 :] - changed[:, t + 1 :]).max() > 0.1


def test_spare_capacity_changes_nothing():
    params, config, tokens = model()
    exact, _ = prefill(params, config, tokens, init_cache(config, 2, 19))
    spare, _ = prefill(params, config, tokens, init_cache(config, 2, 64))
    assert oracle.error(spare, exact) <= 1e-6


def test_a_row_of_a_batch_equals_the_row_alone():
    params, config, tokens = model(b=3)
    logits = forward(params, config, tokens)
    for i in range(3):
        alone = forward(params, config, tokens[i : i + 1])
        assert oracle.error(alone[0], logits[i]) <= 1e-5


def test_scores_depend_on_the_distance_of_two_tokens_only():
    w = jax.random.normal(jax.random.key(0), (2, 1, 6))
    scores = []
    for shift in (0, 5, 40):
        q, k = (
            transformer._rotate(w[i : i + 1], jnp.array([at + shift]), 1e4)
            for i, at in ((0, 9), (1, 2))
        )
        scores.append(float((q * k).sum()))
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


# --- generation -----------------------------------------------------------------------


def test_the_compiled_loop_equals_a_loop_on_the_host():
    params, config, prompt = model()
    tokens, _, cache = generate(params, config, prompt, 12)
    logits, host_cache = prefill(params, config, prompt, init_cache(config, 2, 31))
    tokens_star = [jnp.argmax(logits, axis=-1).astype(jnp.int32)]
    for _ in range(11):  # the last token is made and not read
        logits, host_cache = decode_step(params, config, tokens_star[-1], host_cache)
        tokens_star.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
    np.testing.assert_array_equal(tokens, jnp.stack(tokens_star, axis=1))
    for ours, theirs in zip(
        jax.tree.leaves(cache), jax.tree.leaves(host_cache), strict=True
    ):
        assert oracle.error(ours, theirs) <= 1e-5


def test_generation_goes_on_from_a_cache_that_stays_valid():
    params, config, prompt = model()
    whole = generate(params, config, prompt, 9).tokens
    _, cache = prefill(params, config, prompt[:, :-1], init_cache(config, 2, 40))
    for _ in range(2):
        tokens = generate(params, config, prompt[:, -1:], 9, cache=cache).tokens
        np.testing.assert_array_equal(tokens, whole)


def test_the_baseline_draws_ends_and_streams_as_the_model_does():
    params, config, prompt = model()
    how = dict(temperature=20.0, top_k=20, key=jax.random.key(1))
    free = generate(params, config, prompt, 20, **how).tokens
    assert len(np.unique(free)) > 5
    eos = int(free[0, 7])
    ended = generate(params, config, prompt, 20, eos_id=eos, **how)
    for row, n, unbound in zip(ended.tokens, ended.lengths, free, strict=True):
        assert n == (list(unbound).index(eos) + 1 if eos in unbound else 20)
        np.testing.assert_array_equal(row[:n], unbound[:n])
        assert (np.asarray(row)[n:] == eos).all()
    blocks = stream(params, config, prompt, 20, block=6, **how)
    np.testing.assert_array_equal(np.concatenate(list(blocks), axis=1), free)
    cache = init_cache(config, 2, prompt.shape[1] + 20)
    first = generate(params, config, prompt, 6, cache=cache, **how)
    rest = first.tokens[:, -1:]
    rest = generate(params, config, rest, 14, cache=first.cache, **how).tokens
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest], 1), free)


def test_the_loop_updates_the_cache_in_place():
    """No copy of a key or value array in the program; all of the cache is aliased."""
    params, config, prompt = model(b=1, T=1)
    capacity = 77
    cache = init_cache(config, 1, capacity)
    compiled = jax.jit(
        lambda params, prompt, cache: generate(params, config, prompt, 16, cache=cache),
        donate_argnums=2,
    )
    compiled = compiled.lower(params, prompt, cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes
    if jax.default_backend() == "cpu":
        shape = rf"f32\[2,{capacity},{config.head_dim}\]"
        assert re.search(rf"= {shape}\S* fusion\(", compiled.as_text())
        assert not re.search(rf"= {shape}\S* copy\(", compiled.as_text())


# --- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "130m", "2.7b"])
def test_a_transformer_like_a_mamba_has_as_many_parameters(name):
    theirs = Mamba2Config.tiny() if name == "tiny" else Mamba2Config.preset(name)
    for n_kv_heads in (None, 1):
        ours = AttentionConfig.like(theirs, n_kv_heads)
        sizes = [
            sum(
                leaf.size
                for leaf in jax.tree.leaves(
                    jax.eval_shape(lambda c=c, f=f: f(c, jax.random.key(0)))
                )
            )
            for c, f in ((ours, init_params), (theirs, init_mamba_params))
        ]
        assert abs(sizes[0] / sizes[1] - 1) <= (2e-2 if name == "tiny" else 1e-3)


def test_the_cache_grows_with_its_capacity():
    sizes = [init_cache(CONFIG, 2, n).nbytes for n in (100, 200, 300)]
    layer = 2 * 2 * CONFIG.n_kv_heads * 100 * CONFIG.head_dim * 4
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == CONFIG.n_layers * layer


def test_bfloat16_parameters_give_float32_logits_near_those_of_float32():
    params, config, tokens = model()
    half = init_params(config, jax.random.key(0), jnp.bfloat16)
    assert half["embedding"].dtype == jnp.bfloat16
    half = jax.tree.map(
        lambda w, h: w.astype(jnp.float32) if w.ndim == 1 else w.astype(h.dtype),
        params,
        half,
    )
    star = forward(params, config, tokens)
    logits = forward(half, config, tokens)
    assert logits.dtype == jnp.float32
    assert oracle.error(logits, star) <= 3e-2
    _, cache = prefill(half, config, tokens, init_cache(config, 2, 19, jnp.bfloat16))
    assert cache.k[0].dtype == jnp.bfloat16


# --- the checks can fail --------------------------------------------------------------


@pytest.mark.parametrize("mutant", ["no mask", "no positions", "position off by one"])
def test_a_broken_layer_is_noticed(monkeypatch, mutant):
    rotate = transformer._rotate
    if mutant == "no mask":
        monkeypatch.setattr(jnp, "where", lambda seen, scores, other: scores)
    elif mutant == "no positions":
        monkeypatch.setattr(transformer, "_rotate", lambda w, *_: w)
    else:
        monkeypatch.setattr(
            transformer,
            "_rotate",
            lambda w, at, base: rotate(w, at + 1, base),
        )
    assert oracle.error(*attention_case(2)) > 1e-2


# --- bad input ------------------------------------------------------------------------


def test_more_tokens_than_the_cache_holds_are_an_error():
    params, config, tokens = model()
    cache = init_cache(config, 2, 18)
    with pytest.raises(ValueError, match="cache: 0 of 18 tokens are taken; 19 more"):
        prefill(params, config, tokens, cache)
    with pytest.raises(ValueError, match="19 more do not fit"):
        generate(params, config, tokens[:, :10], 10, cache=cache)
    _, full = prefill(params, config, tokens[:, :18], cache)
    with pytest.raises(ValueError, match="18 of 18 tokens are taken; 1 more"):
        decode_step(params, config, tokens[:, 18], full)


def test_inside_a_program_more_tokens_than_the_cache_holds_give_nan():
    params, config, tokens = model()
    _, full = prefill(params, config, tokens, init_cache(config, 2, 19))
    step = jax.jit(lambda token, cache: decode_step(params, config, token, cache))
    logits, _ = step(tokens[:, 0], full)
    assert np.isnan(logits).all()


@pytest.mark.usefixtures("as_user")
def test_bad_sizes_and_a_cache_of_another_model_are_named():
    for change, message in (
        ({"d_ff": 0}, "d_ff: 0; it must be a positive integer"),
        ({"head_dim": 5}, "head_dim: 5; it must be even"),
        ({"n_kv_heads": 3}, "n_kv_heads: 3; it must divide n_heads = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match="max_len: 0; it must be an integer of at"):
        init_cache(CONFIG, 1, 0)
    params, config, tokens = model()
    with pytest.raises(ValueError, match="cache: 2 layers of"):
        prefill(params, config, tokens, init_cache(config, 3, 19))
    with pytest.raises(ValueError, match="max_new_tokens: 0"):
        generate(params, config, tokens, 0)
    with pytest.raises(ValueError, match="tokens: 61 is outside"):
        forward(params, config, tokens.at[0, 0].set(61))
