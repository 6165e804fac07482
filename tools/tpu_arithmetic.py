"""A second device of this CPU that computes as inexactly as a TPU.

    import tpu_arithmetic
    tpu_arithmetic.install()  # before JAX starts

`jax.devices()` is then a chip whose float32 arithmetic is that of a TPU: a product
takes one pass of bfloat16, or for precision "highest" the six largest of the nine
products of three bfloat16 pieces; exp, log, rsqrt and their kin are off by up to two
units in the last place. `jax.devices("cpu")` computes as before. What is assumed:
exp(0) is 1, and no result leaves the range of the function. Nothing else is imitated,
no layout, no order of sums, no compiler: `compile_for` has the real one.
Source of the six products: Henry, Tang and Heinecke 2019, arXiv 1904.06376.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import dispatch
from jax._src.interpreters import mlir

INEXACT = lax.exp_p, lax.exp2_p, lax.expm1_p, lax.log_p, lax.log1p_p, lax.rsqrt_p
INEXACT += lax.tanh_p, lax.logistic_p
PASSES = {lax.Precision.DEFAULT: 1, lax.Precision.HIGH: 3, lax.Precision.HIGHEST: 6}
PLAIN = lax.Precision.HIGHEST, lax.Precision.DEFAULT  # marks a product of pieces


def install() -> None:
    """Add the device, make it the default one and give it its arithmetic."""
    jax.config.update("jax_num_cpu_devices", 2)
    real, chip = jax.devices("cpu")
    jax.config.update("jax_default_device", chip)
    jax.devices = lambda backend=None: [real] if backend == "cpu" else [chip]
    jax.local_devices = lambda *_, backend=None, **__: jax.devices(backend)
    # So that a rule for lowering can tell for which device it lowers.
    dispatch.jaxpr_has_prim_requiring_devices = lambda jaxpr: True
    _override(lax.dot_general_p, chip, _product)
    for primitive in INEXACT:
        _override(primitive, chip, _inexact)


def split(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 pieces, as float32: their sum is x but for its last bit or two."""
    pieces = []
    for _ in range(3):
        pieces.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - pieces[-1]
    return pieces


def off_by_ulps(x: jax.Array, y: jax.Array) -> jax.Array:
    """y = f(x) moved by -2 to 2 units in the last place, always alike for one x."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) * jnp.uint32(0x9E3779B1)
    move = (bits >> 16).astype(jnp.int32) % 5 - 2
    moved = lax.bitcast_convert_type(y, jnp.int32) + move
    moved = lax.bitcast_convert_type(moved, jnp.float32)
    moved = jnp.where(jnp.abs(y) <= 1, jnp.clip(moved, -1, 1), moved)
    return jnp.where((x == 0) | (y == 0) | ~jnp.isfinite(y), y, moved)


def _product(rule, ctx, a, b, *, precision, **how):
    kinds = {aval.dtype for aval in ctx.avals_in}
    passes = PASSES.get((precision or [lax.Precision.DEFAULT])[0])
    if kinds != {jnp.dtype("float32")} or precision == PLAIN or passes is None:
        return rule(ctx, a, b, precision=precision, **how)

    def of_pieces(a, b):
        a, b = split(a), split(b)
        pairs = sorted(((i, j) for i in range(3) for j in range(3)), key=sum)[:passes]
        parts = [
            lax.dot_general_p.bind(a[i], b[j], precision=PLAIN, **how)
            for i, j in reversed(pairs)
        ]
        return sum(parts[1:], parts[0])

    return mlir.lower_fun(of_pieces, multiple_results=False)(ctx, a, b)


def _inexact(rule, ctx, x, **how):
    y = rule(ctx, x, **how)
    if ctx.avals_in[0].dtype != jnp.float32:
        return y
    after = ctx.replace(avals_in=[*ctx.avals_in, *ctx.avals_out], tokens_out=None)
    return mlir.lower_fun(off_by_ulps, multiple_results=False)(after, x, *y)


def _override(primitive, chip, change) -> None:
    entry = mlir._platform_specific_lowerings["cpu"].get(primitive)
    rule = (entry or mlir._lowerings[primitive]).rule

    def lower(ctx, *args, **how):
        devices = getattr(ctx.module_context.axis_context, "device_assignment", None)
        if not devices or tuple(devices) != (chip,):
            return rule(ctx, *args, **how)
        return change(rule, ctx, *args, **how)

    mlir.register_lowering(primitive, lower, platform="cpu")
