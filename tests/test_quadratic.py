"""Segment sums and the 1-semiseparable mask."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import enable_x64

from ssdlib import decay_mask, segsum


def hard_decays(T, seed=0):
    """Weak decays that follow strong ones, where differences of sums cancel."""
    rng = np.random.default_rng(seed)
    weak = -np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), (3, T)))
    strong = np.where(rng.random((3, T)) < 0.1, -100.0, 0.0)
    return jnp.asarray(weak + strong, jnp.float32)


def masked_sum(log_a):
    """The authors' stable form: one masked cumulative sum for every column."""
    T = log_a.shape[-1]
    rows = jnp.broadcast_to(log_a[..., :, None], (*log_a.shape, T))
    sums = jnp.cumsum(jnp.where(jnp.tril(jnp.ones((T, T), bool), -1), rows, 0), axis=-2)
    return jnp.where(jnp.tril(jnp.ones((T, T), bool)), sums, -jnp.inf)


def difference(log_a):
    """The unstable form."""
    sums = jnp.cumsum(log_a, axis=-1)
    T = log_a.shape[-1]
    lower = jnp.tril(jnp.ones((T, T), bool))
    return jnp.where(lower, sums[..., :, None] - sums[..., None, :], -jnp.inf)


def mask_error(S, S_star):
    """Largest relative error of L = exp(S) where L is above 1e-6."""
    at = S_star > np.log(1e-6)
    return np.abs(np.exp(np.asarray(S, np.float64)[at] - S_star[at]) - 1).max()


@pytest.mark.parametrize("T", [2, 64, 256, 1000])
def test_segment_sums_are_as_exact_as_the_masked_sum(T):
    log_a = hard_decays(T)
    S_star = oracle.segment_sums(log_a)
    ours = mask_error(segsum(log_a), S_star)
    assert ours <= 2e-6
    assert ours <= mask_error(masked_sum(log_a), S_star) + 1e-7


def test_the_plain_difference_would_fail_the_same_check():
    log_a = hard_decays(256)
    assert mask_error(difference(log_a), oracle.segment_sums(log_a)) > 1e-4


@pytest.mark.parametrize("scale", [0.0, 1e-35, 1e-8, 1e8, 1e30])
def test_segment_sums_survive_every_scale(scale):
    log_a = -scale * jnp.abs(jax.random.normal(jax.random.key(0), (17,)))
    S = segsum(log_a)
    S_star = oracle.segment_sums(log_a)
    assert not np.isnan(S).any()
    np.testing.assert_allclose(S, S_star, rtol=3e-7, atol=1e-37)


def test_the_mask_holds_the_products_of_the_decays_in_between():
    log_a = -jnp.exp(jax.random.normal(jax.random.key(0), (3, 11)) - 1)
    L, a = np.asarray(decay_mask(log_a)), np.exp(np.asarray(log_a, np.float64))
    for t in range(11):
        for s in range(t + 1):
            product = a[:, s + 1 : t + 1].prod(axis=1)
            np.testing.assert_allclose(L[:, t, s], product, rtol=1e-6)


def test_the_mask_is_lower_triangular_with_ones_on_the_diagonal():
    L = np.asarray(decay_mask(hard_decays(40)))
    assert (np.triu(L, 1) == 0).all()
    assert (np.diagonal(L, axis1=-2, axis2=-1) == 1).all()


def test_every_block_below_the_diagonal_has_rank_one():
    with enable_x64(True):
        log_a = -jnp.exp(jax.random.normal(jax.random.key(0), (24,), jnp.float64) - 2)
        L = np.asarray(decay_mask(log_a))
    for cut in (1, 5, 12, 23):
        singular = np.linalg.svd(L[cut:, :cut], compute_uv=False)
        assert (singular[1:] <= 1e-14 * singular[0]).all()


def test_gradients_flow_as_through_plain_sums():
    log_a = hard_decays(30)[0]
    weight = jax.random.normal(jax.random.key(0), (30, 30))

    def scalar(mask):
        return jax.grad(lambda v: (weight * jnp.exp(mask(v))).sum())(log_a)

    assert oracle.error(scalar(segsum), scalar(masked_sum)) <= 1e-6
