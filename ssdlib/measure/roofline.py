"""Rooflines: the work of a program from its sizes, and the time that it takes at least.

    time >= max(FLOPs / peak, bytes / bandwidth)

The work is counted by hand, from a `Mamba2Config` alone: 2 FLOPs a multiply-add, each
weight and each state read once. `hlo` counts what a compiler made of it.
Source: Williams, Waterman and Patterson 2009, "Roofline" (CACM 52:4).
"""

import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ssdlib._checks import check_is, check_size
from ssdlib.compiler.chips import Chip
from ssdlib.params import Mamba2Config
from ssdlib.platforms import LONGEST_CHUNK

__all__ = [
    "Work",
    "chunked",
    "decode",
    "forward",
    "measure_cpu",
    "parameters",
    "prefill",
    "quadratic",
    "recurrent",
    "with_chunks_of",
]


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that must cross main memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, n: float | int) -> "Work":
        return Work(n * self.flops, n * self.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def seconds(self, chip: Chip) -> float:
        """The roofline: no program that does this work is faster."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)

    def ceiling(self, chip: Chip) -> float:
        """The largest MFU that the roofline allows, min(1, intensity / ridge)."""
        return min(1.0, self.intensity / chip.ridge)

    def mfu(self, seconds: float, chip: Chip) -> float:
        """Model FLOPs utilization: FLOPs / (seconds x peak)."""
        return self.flops / (seconds * chip.flops)

    def hbu(self, seconds: float, chip: Chip) -> float:
        """Bandwidth utilization: bytes / (seconds x bandwidth)."""
        return self.bytes / (seconds * chip.bandwidth)


# --- one SSD layer -------------------------------------------------------------------

_MASK = 6  # FLOPs an entry of L ∘ C Bᵀ: differences, selects, the product; exp is free


def recurrent(config: Mamba2Config, b: int, T: int) -> Work:
    """The recurrence: 5 b T H P N FLOPs; the state is read and written every step."""
    _check(config, b=b, T=T)
    H, P, N = config.n_heads, config.head_dim, config.d_state
    state = 8.0 * b * T * H * P * N
    return Work(5.0 * b * T * H * P * N, state + _inputs(config, b, T))


def quadratic(config: Mamba2Config, b: int, T: int) -> Work:
    """The dual form: O(T²) FLOPs, in products with sides T, N and P.

    Scores 2 G N T², mask 6 H T², values 2 H P T², the final state 2 H P N T, and the
    same once more to read the initial state. Bytes: inputs and outputs, no T x T array.
    """
    _check(config, b=b, T=T)
    H, P, N, G = config.n_heads, config.head_dim, config.d_state, config.n_groups
    pairs = 2.0 * G * N + _MASK * H + 2.0 * H * P
    state = 4.0 * H * P * N
    return Work(b * T * (T * pairs + state), _inputs(config, b, T) + _state(config, b))


def chunked(config: Mamba2Config, b: int, T: int) -> Work:
    """The dual form on each of T/Q chunks, the state handed on: O(T Q) FLOPs.

    Q is the config's chunk length. A prefill takes shorter chunks where those are
    faster (`platforms.LONGEST_CHUNK`), and then fewer FLOPs.
    """
    _check(config, b=b, T=T)
    Q = min(config.chunk_size, T)
    chunks = -(-T // Q)
    flops = chunks * quadratic(config, b, Q).flops
    return Work(flops, _inputs(config, b, T) + _state(config, b))


def with_chunks_of(platform: str, config: Mamba2Config) -> Mamba2Config:
    """The config with the chunks that a prefill takes on this platform."""
    check_is("platform", platform, str)
    _check(config)
    longest = LONGEST_CHUNK.get(platform, LONGEST_CHUNK["default"])
    return replace(config, chunk_size=min(longest, config.chunk_size))


def _check(config, **sizes) -> None:
    check_is("config", config, Mamba2Config)
    for name, n in sizes.items():
        check_size(name, n)


def _inputs(config: Mamba2Config, b: int, T: int) -> float:
    """Bytes of x, B, C, dt and y in float32."""
    return 4.0 * b * T * (config.d_xBC + config.n_heads + config.d_inner)


def _state(config: Mamba2Config, b: int) -> float:
    """Bytes of the state, read and written in float32."""
    return 8.0 * b * config.d_inner * config.d_state


# --- the model -----------------------------------------------------------------------


def parameters(config: Mamba2Config) -> dict[str, int]:
    """Number of weights by part; matrices first, then what stays float32."""
    _check(config)
    d, H, layers = config.d_model, config.n_heads, config.n_layers
    bias = config.proj_bias
    inner, outer = config.d_inner + config.d_xBC + H, config.d_inner
    return {
        "embedding": config.vocab_size * d,
        "head": 0 if config.tie_embeddings else config.vocab_size * d,
        "in_proj": layers * (d * inner + bias * inner),
        "out_proj": layers * (outer * d + bias * d),
        "conv": layers * config.d_xBC * (config.d_conv + config.conv_bias),
        "vectors": layers * (d + config.d_inner + 3 * H) + d,
    }


def prefill(config: Mamba2Config, b: int, T: int, itemsize: int = 4) -> Work:
    """Read T tokens a row: logits of the last one, and the cache.

    FLOPs: projections, convolution, the chunked form, one row of the head. Bytes, a
    lower bound: every weight once, the cache written; activations stay on the chip.
    """
    ssd = chunked(config, b, T).flops
    return _model(config, b, T, itemsize, config.n_layers * ssd, states=1)


def forward(config: Mamba2Config, b: int, T: int, itemsize: int = 4) -> Work:
    """Read T tokens a row: logits of every one, and no cache."""
    ssd = chunked(config, b, T).flops
    last = _model(config, b, T, itemsize, config.n_layers * ssd, states=0)
    logits = b * (T - 1) * config.vocab_size
    return last + Work(2.0 * logits * config.d_model, 4.0 * logits)


def decode(config: Mamba2Config, b: int, itemsize: int = 4) -> Work:
    """One token a row: about 2 FLOPs a weight; every weight and both states once.

    FLOPs are those that b rows need: 2 b (matrices + head) + 5 b n_layers H P N. Where
    a step pads its rows with zeros, a compiler counts up to padded rows / b as many.
    """
    ssd = recurrent(config, b, 1).flops
    return _model(config, b, 1, itemsize, config.n_layers * ssd, states=2)


def _model(config, b, T, itemsize, ssd, states) -> Work:
    check_size("itemsize", itemsize)
    n = parameters(config)
    head = config.vocab_size * config.d_model
    matrices = n["in_proj"] + n["out_proj"]
    flops = 2.0 * b * T * (matrices + n["conv"]) + 2.0 * b * head + ssd
    rows = 0 if config.tie_embeddings else b * T * config.d_model
    weights = itemsize * (matrices + head + rows) + 4.0 * n["vectors"]
    if itemsize == 1:  # float32 beside them, and a scale for each output
        itemsize = 4
        outputs = config.d_inner + config.d_xBC + config.n_heads + config.d_model
        weights += 4.0 * (config.vocab_size + config.n_layers * outputs)
    weights += itemsize * n["conv"]
    conv = itemsize * (config.d_conv - 1) * config.d_xBC
    state = 4.0 * config.d_inner * config.d_state
    logits = 4.0 * b * config.vocab_size
    return Work(flops, weights + states * b * config.n_layers * (conv + state) + logits)


# --- the processor at hand -----------------------------------------------------------


def measure_cpu(seconds: float = 1.0, nbytes: int = 2**30) -> Chip:
    """Peaks of this CPU as XLA reaches them: the best of many runs, float32.

    FLOPs: the product of two 2,000 x 2,000 matrices. Bandwidth: a sum over a matrix of
    `nbytes`, or its product with a vector. Give the bytes of the weights that a record
    is about: what is read is then as far from the caches as they are. Other programs
    running make both slower.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        n = 2000
        square, long = jnp.ones((n, n)), jnp.ones((max(1, nbytes // 2**15), 2**13))
        product = _best(lambda a: a @ a, square, seconds)
        read = _best(jnp.sum, long, seconds)
        read = min(read, _best(lambda W: W @ W[0], long, seconds))
    return Chip("this CPU", 2.0 * n**3 / product, long.nbytes / read, 0.0, "measured")


def _best(fn, x, seconds: float) -> float:
    fn = jax.jit(fn)
    fn(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        fn(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best
