"""A strict world: no silent promotion of dtypes or ranks, full-precision products."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Forget a module's compiled programs: all of them together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def as_user():
    """Without the run-time shape checker that pytest adds: what a user's call meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
