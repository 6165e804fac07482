"""Parameters of a Mamba-2 model: a plain pytree of arrays, drawn at random.

    A = -exp(A_log) ∈ -[1, 16]        softplus(dt_bias) ∈ [0.001, 0.1]

`weights` reads trained ones into the same names and shapes.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; reference code
github.com/state-spaces/mamba at e9594ce, mamba_ssm/modules/mamba2.py.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ssdlib._checks import check_is, check_key, described, floating
from ssdlib.config import Mamba2Config
from ssdlib.int8 import Int8Matrix

__all__ = ["Params", "check_params", "checked_params", "init_params", "quantize"]

Params = dict
MATRICES = {"in", "out", "embedding", "head"}  # nearly all the weights


def init_params(config: Mamba2Config, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters as a plain pytree. Matrices are (outputs, inputs) in `dtype`.

    Decays, skips and norm weights stay float32. Initialization as the reference code,
    but for a convolution's bias, which is 0: A in -[1, 16], dt in [0.001, 0.1] on a log
    scale, output projections scaled by 1 / sqrt(n_layers). "int8" is `quantize` of
    float32. Raises ValueError for a wrong config, key or dtype.
    """
    check_is("config", config, Mamba2Config)
    check_key(key)
    if is_int8(dtype):
        return quantize(init_params(config, key))
    dtype = floating(dtype, " or int8")
    d, d_inner, d_xBC, H = config.d_model, config.d_inner, config.d_xBC, config.n_heads
    f32, matrix = jnp.float32, partial(random_matrix, dtype)

    def layer(key):
        k = jax.random.split(key, 5)
        dt = jnp.exp(jax.random.uniform(k[2], (H,), f32, *map(math.log, (1e-3, 1e-1))))
        p = {
            "norm": jnp.ones(d, f32),
            "in": matrix(k[0], d_inner + d_xBC + H, d),  # [z; x; B; C; dt]
            "conv": matrix(k[1], d_xBC, config.d_conv),
            "dt_bias": dt + jnp.log(-jnp.expm1(-dt)),  # inverse of softplus
            "A_log": jnp.log(jax.random.uniform(k[3], (H,), f32, 1.0, 16.0)),
            "D": jnp.ones(H, f32),
            "gate_norm": jnp.ones(d_inner, f32),
            "out": matrix(k[4], d, d_inner, 1 / math.sqrt(config.n_layers)),
        }
        if config.conv_bias:
            p["conv_bias"] = jnp.zeros(d_xBC, dtype)
        if config.proj_bias:
            p |= {f"{n}_bias": jnp.zeros(len(p[n]), dtype) for n in ("in", "out")}
        return p

    k_embed, k_head, *k_layers = jax.random.split(key, 2 + config.n_layers)
    normal = jax.random.normal(k_embed, (config.vocab_size, d), f32)
    params = {
        "embedding": (0.02 * normal).astype(dtype),
        "layers": tuple(layer(k) for k in k_layers),
        "norm": jnp.ones(d, f32),
    }
    if not config.tie_embeddings:
        params["head"] = matrix(k_head, config.vocab_size, d)
    return params


def random_matrix(dtype, key, outputs, inputs, scale=1.0) -> Array:
    """W (outputs, inputs), uniform in ± scale / √inputs."""
    bound = scale / math.sqrt(inputs)
    W = jax.random.uniform(key, (outputs, inputs), jnp.float32, -bound, bound)
    return W.astype(dtype)


def is_int8(dtype) -> bool:
    """Whether this is the dtype of `quantize`, by name or type."""
    try:
        return dtype is not None and jnp.dtype(dtype) == jnp.int8
    except TypeError:
        return False


def quantize(params: Params) -> Params:
    """The same parameters with matrices in eight bits, one scale for each output row.

        |W - diag(scale) values| ≤ scale / 2,    scale_o = max_i |W_oi| / 127

    Every function of the library takes them: decoding reads a quarter of the bytes of
    float32. Norms, decays, skips, biases and the convolution, which are small, become
    float32. Raises ValueError unless params are what `init_params` returns.
    """
    check_params(params)

    def convert(key, value):
        if isinstance(value, Int8Matrix):
            return value
        return Int8Matrix.of(value) if key in MATRICES else jnp.float32(value)

    layers = tuple({k: convert(k, v) for k, v in p.items()} for p in params["layers"])
    rest = {k: convert(k, v) for k, v in params.items() if k != "layers"}
    return rest | {"layers": layers}


def check_params(params, config=None, name="params") -> None:
    """Raise ValueError unless params are the pytree of a model, and of this config.

    Looks at the layers' number and the embedding alone, as it runs before every step.
    """
    tree = params if isinstance(params, dict) else {}
    layers, embedding = tree.get("layers"), tree.get("embedding")
    if not isinstance(layers, (tuple, list)) or not hasattr(embedding, "shape"):
        raise ValueError(
            f"{name}: {described(params)}; it must be what init_params returns"
        )
    if config is not None:
        got = len(layers), *embedding.shape
        want = config.n_layers, config.vocab_size, config.d_model
        if got != want:
            raise ValueError(
                f"{name}: (layers, rows and columns of the embedding) is {got}; config "
                f"asks for {want}"
            )


def checked_params(params, config: Mamba2Config) -> Params:
    """The parameters, if config is one and they are its own; layers as a tuple.

    A list of layers would be another pytree, and compile every program again.
    """
    check_is("config", config, Mamba2Config)
    check_params(params, config)
    if isinstance(params["layers"], tuple):
        return params
    return params | {"layers": tuple(params["layers"])}
