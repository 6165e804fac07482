"""Sizes and parameters of a Mamba-2 model: a frozen config, a plain pytree of arrays.

    A = -exp(A_log) ∈ -[1, 16]        softplus(dt_bias) ∈ [0.001, 0.1]

`init_params` draws them at random; `weights` reads trained ones into the same names and
shapes.
Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; reference code
github.com/state-spaces/mamba at e9594ce, mamba_ssm/modules/mamba2.py; for the presets,
config.json of state-spaces/mamba2-130m, -370m, -780m, -1.3b and -2.7b.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ssdlib._checks import (
    check_fields,
    check_is,
    check_key,
    described,
    floating,
    is_number,
)
from ssdlib.int8 import Int8Matrix

__all__ = [
    "PRESETS",
    "Mamba2Config",
    "Params",
    "check_params",
    "checked_params",
    "init_params",
    "quantize",
]


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 language model. Frozen and hashable: a static jit argument.

    Raises ValueError if a size is not a positive integer, a switch not a bool, if the
    groups do not divide the heads, or if time_step_limit is not 0 <= low <= high.
    """

    vocab_size: int  # V
    d_model: int  # width of the residual stream
    n_layers: int
    n_heads: int  # H
    head_dim: int = 64  # P
    d_state: int = 128  # N
    n_groups: int = 1  # G, groups of heads that share B and C
    d_conv: int = 4  # taps of the causal convolution
    chunk_size: int = 256  # Q
    tie_embeddings: bool = True  # the head reuses the embedding matrix
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)  # dt is clipped to it

    def __post_init__(self):
        check_fields(self)
        if self.n_heads % self.n_groups:
            raise ValueError(
                f"n_groups: {self.n_groups}; it must divide n_heads = {self.n_heads}"
            )
        limit = self.time_step_limit
        pair = isinstance(limit, tuple) and len(limit) == 2
        if not pair or not all(map(is_number, limit)) or not 0 <= limit[0] <= limit[1]:
            raise ValueError(
                f"time_step_limit: {limit!r}; it must be (low, high), 0 <= low <= high"
            )
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps: {self.norm_eps!r}; it must be between 0 and 1")
        # Numbers of Python: an array has no hash.
        object.__setattr__(self, "norm_eps", float(self.norm_eps))
        object.__setattr__(self, "time_step_limit", tuple(map(float, limit)))

    @property
    def d_inner(self) -> int:
        """Width of the SSM input, H P."""
        return self.n_heads * self.head_dim

    @property
    def d_xBC(self) -> int:
        """Channels that pass the convolution: x, B and C side by side, H P + 2 G N."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @classmethod
    def tiny(cls, **changes) -> "Mamba2Config":
        """Sizes for tests: small, with two groups; fields given are set otherwise."""
        sizes = dict(vocab_size=61, d_model=24, n_layers=2, n_heads=4, head_dim=12)
        sizes |= dict(d_state=10, n_groups=2, chunk_size=8)
        return cls(**(sizes | changes))

    @classmethod
    def preset(cls, name: str) -> "Mamba2Config":
        """A published model: "130m", "370m", "780m", "1.3b" or "2.7b"."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"name: {name!r}; it must be one of {', '.join(PRESETS)}")
        d_model, n_layers = PRESETS[name]
        H = 2 * d_model // 64
        return cls(vocab_size=50288, d_model=d_model, n_layers=n_layers, n_heads=H)


PRESETS = {  # name: (d_model, n_layers); all have d_inner = 2 d_model, P = 64, N = 128
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}

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
