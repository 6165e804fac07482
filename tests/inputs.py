"""Random inputs for the three forms, in several regimes of decay."""

import jax
import jax.numpy as jnp
import numpy as np

REGIMES = {  # range of dt and of -A: how far the state remembers
    "weak decay": ((1e-4, 1e-3), (0.01, 0.1)),
    "published": ((1e-3, 1e-1), (1.0, 16.0)),
    "strong decay": ((1.0, 10.0), (4.0, 16.0)),
    "mixed decay": ((1e-4, 20.0), (0.01, 16.0)),
}

try:
    enable_x64 = jax.enable_x64
except AttributeError:  # before jax 0.8
    from jax.experimental import enable_x64  # noqa: F401


def ssd_inputs(
    T, b=2, H=4, P=3, G=2, N=5, regime="published", dtype=jnp.float32, seed=0
):
    """x, dt, A, B, C, D, h0 with a state that is not zero."""
    rng = np.random.default_rng(seed)
    (dt_low, dt_high), (a_low, a_high) = REGIMES[regime]
    dt = np.exp(rng.uniform(np.log(dt_low), np.log(dt_high), (b, T, H)))
    A = -np.exp(rng.uniform(np.log(a_low), np.log(a_high), H))
    normal = rng.standard_normal
    x, B, C = normal((b, T, H, P)), normal((b, T, G, N)), normal((b, T, G, N))
    D, h0 = normal(H), normal((b, H, P, N))
    return tuple(jnp.asarray(v, dtype) for v in (x, dt, A, B, C, D, h0))
