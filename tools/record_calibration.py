"""Record what estimates of time are calibrated on: book/results/calibration.json.

    pip install ".[tpu]"
    python tools/record_calibration.py [ssd retention ...]

Compiles 27 programs for a TPU v6e that need not be there, and writes cycles, FLOPs and
bytes beside the time that others measured for the same mathematics on a real one (see
`SOURCE`). `ssdlib.measure.estimate` fits its model to the record, and chapter 9 shows
it. The programs are written anew: no code of that source is here. Those named as
arguments are compiled and the other rows stay. Takes about ten minutes.
"""

import datetime
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp

from ssdlib.compiler import hlo
from ssdlib.compiler.chips import CHIPS
from ssdlib.measure.estimate import PATH, TARGET
from ssdlib.measure.roofline import Work

SOURCE = {
    "of": "median device time by the profiler, on one TPU v6e chip, with JAX 0.9.2",
    "from": "github.com/aryatschand/JAXBench at ebc95e6b, results of its baselines",
    "license": "MIT",
}
b16, f32 = jnp.bfloat16, jnp.float32
pairs = partial(jnp.einsum, "bhtd,bhsd->bhts")  # every query with every key
mixed = partial(jnp.einsum, "bhts,bhsd->bhtd")


# --- products, and what follows them --------------------------------------------------


def gated(x, W_gate, W_up, W_down):
    return (jax.nn.silu(x @ W_gate) * (x @ W_up)) @ W_down


def cross_entropy(x, W, labels):
    logits = jax.nn.log_softmax(x @ W)
    return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, W.shape[1]) * logits, axis=-1))


def groups(x, W):
    return jnp.einsum("gmk,gkn->gmn", x, W)


def scaled_relu(x, W, b):
    return jax.nn.relu((x @ W + b - 2.0) * 1.5)


def relu(x, W, b):
    return jax.nn.relu(x @ W + b)


def residual(x, W, b):
    y = x @ W + b
    return 0.5 * y + y


def row_sums(x, W, b):
    return jnp.sum(x @ W.T + b, axis=1, keepdims=True)


def gelu_softmax(x, W, b):
    return jax.nn.softmax(jax.nn.gelu(x @ W + b), axis=-1)


def log_sum_exp(x, W1, b1, W2, b2):
    hidden = jax.nn.sigmoid(x @ W1.T + b1)
    return jax.nn.logsumexp(hidden @ W2.T + b2, axis=1)


# --- products, and norms of their results ---------------------------------------------


def normalized(y, axis):
    mean, var = jnp.mean(y, axis, keepdims=True), jnp.var(y, axis, keepdims=True)
    return (y - mean) * jax.lax.rsqrt(var + 1e-5)


def rms_norm(x, scale):
    wide = x.astype(f32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-6)).astype(x.dtype) * scale


def batch_norm(x, W, b, scale, shift):
    y = normalized(x @ W.T + b, 0) * scale + shift
    return jax.nn.relu(jax.nn.gelu(y))


def group_norm(x, W, b, scale, shift, n=64):
    y = jax.nn.silu(x @ W) + b
    y = normalized(y.reshape(len(y), n, -1), -1).reshape(y.shape)
    return y * scale + shift


def group_norm_min(x, W, b, scale, shift, n=512):
    y = x @ W.T + b
    y = normalized(y.reshape(len(y), n, -1), -1).reshape(y.shape) * scale + shift
    return jnp.min(y, axis=1, keepdims=True)


# --- all pairs of tokens --------------------------------------------------------------


def attention(q, k, v):
    T, d = q.shape[-2:]
    scores = pairs(q, k) * d**-0.5
    allowed = jnp.tril(jnp.ones((T, T), bool))
    return mixed(jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf)), v)


def shared_keys(q, k, v):
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    return attention(q, k, v).transpose(0, 2, 1, 3)


def over_sum(scores, v):
    total = jnp.sum(jnp.abs(scores), axis=-1, keepdims=True)
    return mixed((scores / jnp.maximum(total, 1.0)).astype(v.dtype), v)


def retention(q, k, v):
    H, T = q.shape[1:3]
    apart = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    log_gamma = jnp.log(1 - 2.0 ** (-5.0 - jnp.arange(H)))
    mask = jnp.where(apart >= 0, jnp.exp(log_gamma[:, None, None] * apart), 0.0)
    return over_sum(pairs(q, k, preferred_element_type=f32) * mask, v)


def ssd(C, B, x, a):
    T, total = a.shape[-1], jnp.cumsum(jnp.log(jax.nn.sigmoid(a)), axis=-1)
    S = total[..., :, None] - total[..., None, :]
    S = jnp.where(jnp.tril(jnp.ones((T, T), bool)), S, -jnp.inf)
    return over_sum(pairs(C, B, preferred_element_type=f32) * jnp.exp(S), x)


# --- convolutions, channels first; and a gather ---------------------------------------


def conv(x, W, b):
    y = jax.lax.conv_general_dilated(x, W, (1,) * (x.ndim - 2), "VALID")
    return y + b.reshape(-1, *(1,) * (x.ndim - 2))


def conv_relu(x, W, b, shift):
    return jax.nn.relu(conv(x, W, b)) + shift


def conv_instance_norm(x, W, b, scale, shift):
    y = normalized(conv(x, W, b), (2, 3))
    return (y * scale[:, None, None] + shift[:, None, None]) / 2.0


def conv_batch_norm(x, W, b, scale, shift):
    y = normalized(mish(conv(x, W, b)), (0, 2, 3))
    return y * scale[:, None, None] + shift[:, None, None]


def mish(x):
    return x * jnp.tanh(jax.nn.softplus(x))


def conv_mish(x, W, b):
    return jnp.tanh(mish(conv(x, W, b)))


def conv_mean(x, W, b):
    return jnp.mean(jax.nn.gelu(conv(x, W, b)), axis=(2, 3))


def in_groups(y, n, scale, shift):
    """The norm over each of n groups of channels and all places."""
    grouped = y.reshape(len(y), n, -1, *y.shape[2:])
    y = normalized(grouped, tuple(range(2, grouped.ndim))).reshape(y.shape)
    one = (-1, *(1,) * (y.ndim - 2))
    return y * scale.reshape(one) + shift.reshape(one)


def conv_group_norm(x, W, b, scale, shift):
    y = conv(x, W, b)
    z = jnp.tanh(in_groups(y, 16, scale, shift))
    return jax.nn.logsumexp(y + jax.nn.hard_swish(z), axis=1, keepdims=True)


def conv_group_mean(x, W, b, scale, shift):
    return jnp.mean(in_groups(conv(x, W, b), 8, scale, shift), axis=(1, 2, 3, 4))


def triangle(x, mask, W_left, W_right, G_left, G_right, scale, W_out, G_out):
    y = x * mask
    left = (y @ W_left) * jax.nn.sigmoid(y @ G_left)
    right = (y @ W_right) * jax.nn.sigmoid(y @ G_right)
    z = jnp.einsum("ikc,jkc->ijc", left, right)
    z = z / jnp.sqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-6) * scale
    return (z @ W_out) * jax.nn.sigmoid(x @ G_out)


def paged(q, keys, values, lengths, table):
    """One query a row, its keys in pages that a table names."""
    b, H, d = q.shape
    k, v = (a[table].reshape(b, -1, *a.shape[2:]) for a in (keys, values))
    k, v = (jnp.repeat(a, H // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bhd,bthd->bht", q, k) * d**-0.5
    real = jnp.arange(k.shape[1]) < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(real[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bht,bthd->bhd", weights, v)


# --- the table: name in the source, what it is, milliseconds, function, arguments -----


def of(dtype, *shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def layer(m, k, n, vectors=1, outputs_first=False):
    """Rows, a matrix, and vectors of its outputs."""
    W = (n, k) if outputs_first else (k, n)
    return of(f32, (m, k), W, *[(n,)] * vectors)


def image(b, inputs, outputs, side, vectors=1):
    """Rows of square images, a 3 x 3 kernel, and vectors of its outputs."""
    kernel = outputs, inputs, 3, 3
    return of(f32, (b, inputs, side, side), kernel, *[(outputs,)] * vectors)


PROGRAMS = {
    "matmul": ("8p", "product in bfloat16", 5.3218, jnp.matmul,
               of(b16, (8192, 8192), (8192, 28672))),
    "gated": ("9p", "gated layer (SwiGLU) in bfloat16", 16.4977, gated,
              of(b16, (2, 4096, 8192), *[(8192, 28672)] * 2, (28672, 8192))),
    "rms_norm": ("12p", "RMS norm of 8 x 4,096 rows in bfloat16", 1.1385, rms_norm,
                 of(b16, (8, 4096, 8192), (8192,))),
    "cross_entropy": ("13p", "vocabulary of 128,256, cross-entropy", 14.2096,
                      cross_entropy, [*of(b16, (8192, 4096), (4096, 128256)),
                                      *of(jnp.int32, (8192,))]),
    "groups": ("14p", "eight products in bfloat16", 1.2445, groups,
               of(b16, (8, 1024, 4096), (8, 4096, 14336))),
    "retention": ("15p", "retention over 4,096 tokens, all pairs", 12.2, retention,
                  of(b16, *[(4, 16, 4096, 256)] * 3)),
    "ssd": ("16p", "SSD over 4,096 tokens in its quadratic form", 28.2603, ssd,
            [*of(b16, *[(4, 64, 4096, 64)] * 3), *of(f32, (4, 64, 4096))]),
    "attention": ("1p", "causal attention over 4,096 tokens", 22.9762, attention,
                  of(b16, *[(4, 64, 4096, 128)] * 3)),
    "shared_keys": ("2p", "the same, 128 heads share 8 keys", 50.3364, shared_keys,
                    of(b16, (4, 4096, 128, 128), *[(4, 4096, 8, 128)] * 2)),
    "scaled_relu": ("19k", "product, scale, ReLU", 0.6297, scaled_relu,
                    layer(4096, 8192, 8192)),
    "relu": ("41k", "product, ReLU", 0.6292, relu, layer(4096, 8192, 8192)),
    "residual": ("30k", "product, sum with half of itself", 0.644, residual,
                 layer(16384, 4096, 4096)),
    "row_sums": ("23k", "product, sum over its outputs", 0.7273, row_sums,
                 layer(4096, 8192, 8192, outputs_first=True)),
    "gelu_softmax": ("50k", "product, GELU, softmax", 0.8537, gelu_softmax,
                     layer(4096, 8192, 8192)),
    "group_norm": ("29k", "product, SiLU, norm of 64 groups", 1.1193, group_norm,
                   layer(8192, 4096, 4096, 3)),
    "batch_norm": ("31k", "product, norm over rows, GELU", 3.7396, batch_norm,
                   layer(16384, 8192, 8192, 3, outputs_first=True)),
    "log_sum_exp": ("32k", "two products, log-sum-exp", 0.5503, log_sum_exp,
                    of(f32, (16384, 2048), (4096, 2048), (4096,), (1024, 4096),
                       (1024,))),
    "group_norm_min": ("40k", "product, norm of 512 groups, minimum", 1.417,
                       group_norm_min, layer(4096, 8192, 8192, 3, outputs_first=True)),
    "conv_relu": ("18k", "3 x 3 convolution, ReLU", 1.7671, conv_relu,
                  [*image(128, 64, 128, 128), *of(f32, (128, 1, 1))]),
    "conv_instance_norm": ("22k", "3 x 3 convolution, norm of each channel", 2.8542,
                           conv_instance_norm, image(128, 64, 128, 128, 3)),
    "conv_batch_norm": ("34k", "3 x 3 convolution, Mish, norm over rows", 1.5584,
                        conv_batch_norm, image(64, 64, 128, 128, 3)),
    "conv_mish": ("33k", "3 x 3 x 3 convolution, Mish, tanh", 2.4173, conv_mish,
                  of(f32, (16, 32, 32, 64, 64), (64, 32, 3, 3, 3), (64,))),
    "conv_mean": ("39k", "3 x 3 convolution, GELU, mean", 1.3322, conv_mean,
                  image(128, 8, 64, 256)),
    "conv_group_norm": ("46k", "3 x 3 convolution, norm of 16 groups, log-sum-exp",
                        1.011, conv_group_norm, image(128, 8, 64, 128, 3)),
    "conv_group_mean": ("25k", "3 x 3 x 3 convolution, norm of 8 groups, mean", 0.3383,
                        conv_group_mean, of(f32, (128, 3, 24, 32, 32),
                                            (24, 3, 3, 3, 3), *[(24,)] * 3)),
    "triangle": ("17p", "triangle update of 1,536 x 1,536 pairs", 14.5211, triangle,
                 of(b16, (1536, 1536, 128), (1536, 1536, 1), *[(128, 128)] * 4, (128,),
                    *[(128, 128)] * 2)),
    "paged": ("6p", "attention of one query a row, keys in pages", 7.7828, paged,
              [*of(b16, (64, 64, 128), *[(16384, 16, 8, 128)] * 2),
               *of(jnp.int32, (64,), (64, 256))]),
}  # fmt: skip


def row(name: str) -> dict:
    """Compile one program: its row of the record."""
    there, what, ms, fn, args = PROGRAMS[name]
    program = hlo.compile_for(fn, *args, target=TARGET)
    least = Work(program.flops, program.bytes).seconds(CHIPS[TARGET])
    return {
        "name": name,
        "what": what,
        "name_there": there,
        "measured_ms": ms,
        "cycles": program.cycles,
        "flops": program.flops,
        "bytes": program.bytes,
        "roofline_ms": round(1e3 * least, 4),
        "kernels": program.launches,
        "compile_seconds": program.compile_seconds,
        "versions": program.versions,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Compile what the arguments name, or all, one program after another."""
    names = sys.argv[1:] or list(PROGRAMS)
    rows = json.loads(PATH.read_text())["programs"] if PATH.exists() else []
    rows = {r["name"]: r for r in rows}
    for name in names:
        # As it was measured: JAX multiplies float32 in one bfloat16 pass on a TPU.
        with jax.default_matmul_precision("default"):
            rows[name] = row(name)
        shown = "name", "measured_ms", "roofline_ms", "cycles", "compile_seconds"
        print(*(rows[name][k] for k in shown), flush=True)
        record = {
            "origin": "compiled here; times published elsewhere",
            "target": TARGET,
            "measured": SOURCE,
            "command": "python tools/record_calibration.py",
            "programs": [rows[k] for k in PROGRAMS if k in rows],
        }
        PATH.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
