"""Mistakes that users of other implementations met: one test each, by its number.

transformers, SGLang and state-spaces/mamba are on GitHub; the number is the issue or
pull request there.
"""

import dataclasses
import itertools
import tomllib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdlib import Mamba2Config, decode_step, forward, generate, init_params, prefill

CONFIG = Mamba2Config.tiny()  # chunks of 8, convolution over 4 tokens
Q, T = CONFIG.chunk_size, 27
PARAMS = init_params(CONFIG, jax.random.key(3))
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (3, T))
LOGITS = forward(PARAMS, CONFIG, TOKENS)
_, WHOLE = prefill(PARAMS, CONFIG, TOKENS)


def same(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert oracle.error(x, y) <= tolerance


def row(tree, i):
    return jax.tree.map(lambda v: v[i : i + 1], tree)


def stepped(tokens):
    """The cache after one token at a time: what every other way must give."""
    _, cache = prefill(PARAMS, CONFIG, tokens[:, :1])
    for t in range(1, tokens.shape[1]):
        _, cache = decode_step(PARAMS, CONFIG, tokens[:, t], cache)
    return cache


def test_transformers_46741_many_tokens_after_a_cache_are_all_read():
    """There they took the path of a single token."""
    _, cache = prefill(PARAMS, CONFIG, TOKENS[:, :5])
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[:, 5:], cache)
    assert oracle.error(logits, LOGITS[:, -1]) <= 1e-5
    same(cache, stepped(TOKENS))
    same(WHOLE, stepped(TOKENS))


def test_transformers_48256_right_padding_leaves_both_states_right():
    lengths = np.array([2, 9, T])  # shorter than the convolution, past a chunk, all
    logits, cache = prefill(PARAMS, CONFIG, TOKENS, lengths=lengths)
    for i, n in enumerate(lengths):
        same(row(cache, i), stepped(TOKENS[i : i + 1, :n]))
        assert oracle.error(logits[i], LOGITS[i, n - 1]) <= 1e-5


def test_transformers_46773_padding_counts_at_batch_size_1_too():
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[:1], lengths=np.array([9]))
    alone, cache_alone = prefill(PARAMS, CONFIG, TOKENS[:1, :9])
    assert oracle.error(logits, alone) <= 1e-5
    same(cache, cache_alone)


@pytest.mark.parametrize("start", [1, Q - 1, Q, Q + 1])
def test_sglang_37836_a_piece_may_start_anywhere_in_a_chunk(start):
    _, cache = prefill(PARAMS, CONFIG, TOKENS[:, :start])
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[:, start:], cache)
    assert oracle.error(logits, LOGITS[:, -1]) <= 1e-5
    same(cache, WHOLE)


@pytest.mark.parametrize("n", [1, Q + 1, 3 * Q + 1])
def test_sglang_29633_a_prompt_of_one_token_more_than_whole_chunks(n):
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[:, :n])
    assert oracle.error(logits, LOGITS[:, n - 1]) <= 1e-5
    same(cache, stepped(TOKENS[:, :n]))


@settings(max_examples=10, deadline=None)
@given(junk=st.integers(0, CONFIG.vocab_size - 1), n=st.integers(1, T - 1))
def test_mamba_783_padding_to_a_fixed_shape_changes_no_real_token(junk, n):
    padded = TOKENS.copy()
    padded[:, n:] = junk
    lengths = np.full(3, n)
    assert oracle.error(forward(PARAMS, CONFIG, padded)[:, :n], LOGITS[:, :n]) <= 1e-5
    with_lengths = forward(PARAMS, CONFIG, padded, lengths)
    assert oracle.error(with_lengths[:, :n], LOGITS[:, :n]) <= 1e-5


def test_a_padding_token_whose_embedding_is_nan_changes_nothing():
    """The padding id may be a row that training never touched."""
    pad, n = CONFIG.vocab_size - 1, np.asarray([5, 9, 0])
    real = np.arange(T) < n[:, None]
    padded = np.where(real, np.where(TOKENS == pad, 1, TOKENS), pad)
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    good = PARAMS | {"head": PARAMS["embedding"].at[pad].set(0)}
    bad = good | {"embedding": PARAMS["embedding"].at[pad].set(jnp.nan)}
    how = dict(lengths=n)
    for run in (forward, prefill, partial(generate, max_new_tokens=4, eos_id=3)):
        got, want = run(bad, config, padded, **how), run(good, config, padded, **how)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (want.tokens != pad).all()


def test_transformers_48978_no_array_of_all_positions_heads_and_states():
    """There a product was broadcast to (T, Q, H, P, N)-like shapes and then summed."""
    config = Mamba2Config.tiny(n_heads=16, head_dim=32, d_state=64, chunk_size=32)
    params = init_params(config, jax.random.key(0))
    length = 512
    run = jax.jit(lambda tokens: forward(params, config, tokens))
    compiled = run.lower(jnp.zeros((1, length), jnp.int32)).compile()
    broadcast = 4 * length * config.d_inner * config.d_state  # (T, H, P, N), float32
    assert compiled.memory_analysis().temp_size_in_bytes < broadcast / 2


def test_mamba_97_237_753_the_package_needs_no_nvidia_toolchain():
    path = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    needs = " ".join(project["dependencies"]).lower()
    for name in ("torch", "triton", "cuda", "nvidia", "causal", "mamba", "flax"):
        assert name not in needs


# --- properties -----------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_the_order_of_a_batch_does_not_matter(order):
    order = np.array(order)
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[order])
    assert oracle.error(logits, LOGITS[order, -1]) <= 1e-6
    same(cache, jax.tree.map(lambda v: v[order], WHOLE), 1e-6)


@pytest.mark.parametrize("n", [1, CONFIG.d_conv - 1])
def test_a_sequence_shorter_than_the_convolution_is_padded_with_nothing(n):
    logits, cache = prefill(PARAMS, CONFIG, TOKENS[:, :n])
    assert oracle.error(logits, LOGITS[:, n - 1]) <= 1e-5
    K = CONFIG.d_conv - 1
    for conv in jnp.moveaxis(cache.conv, 1, 0):
        np.testing.assert_array_equal(conv[:, : max(K - n, 0)], 0)
        assert (np.asarray(conv[:, max(K - n, 0) :]) != 0).any()
    same(cache, stepped(TOKENS[:, :n]))
