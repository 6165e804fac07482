"""A strict world: no silent promotion of dtypes or ranks, full-precision products."""

import contextlib
import os

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# LLVM need not optimize what runs for its values alone: that halves the processor time
# of test_forms. XLA's own passes stay, so the text of a program is the same. Modules
# that measure, or compare last digits or whole processes, get what users get; in the
# weekly job all do, by OPTIMIZED in the environment.
OPTIMIZED = "bench cli compare estimate guard hlo parity profile quadratic roofline"
OPTIMIZED = {f"test_{name}" for name in OPTIMIZED.split()}


@pytest.fixture(autouse=True, scope="module")
def compiler(request):
    """Compile a module's programs in full, or quickly; here and in what it starts."""
    full = request.module.__name__ in OPTIMIZED or os.environ.get("OPTIMIZED")
    jax.config.update("jax_disable_most_optimizations", not full)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(not full)))
        # Programs of other modules: all together take gigabytes, and some were compiled
        # while modules were imported.
        jax.clear_caches()
        yield


@pytest.fixture
def as_user():
    """Without the run-time shape checker that pytest adds: what a user's call meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compilations():
    """with compilations() as log: names of what JAX traced or compiled meanwhile."""

    @contextlib.contextmanager
    def record():
        log, on = [], [True]

        def listen(event, duration, **facts):
            if on[0] and ("trace" in event or "compile" in event):
                log.append((event, facts.get("fun_name")))

        jax.monitoring.register_event_duration_secs_listener(listen)
        yield log
        on[0] = False  # a listener cannot be removed

    return record
