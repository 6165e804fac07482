"""What is written differently for a chip: equal results, by rules that were measured.

A program holds one variant only, that of the platform for which it is lowered.
Chapter 14 shows in the compiled programs what each rule changes.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ssdlib.chunked import ssd_chunked

__all__ = ["CHUNK", "by_rows", "product", "ssd"]

CHUNK = {"cpu": 64, "tpu": 128, "default": 256}  # longest chunk of a prefill
SPANS = {"cpu": 2}  # least steps of its scan; XLA removes a loop of one
FEW_ROWS = 32  # of a product on a CPU
PARTS = 4  # of a product of one row on a CPU


def ssd(chunk_size, *args):
    """`ssd_chunked` with the chunk length and spans that are fastest on the platform.

    On a CPU a scan of one step is slow: XLA removes it, and then computes its inputs
    again in every kernel that reads them. The result depends on neither.
    """

    def on(platform):
        Q, spans = min(CHUNK[platform], chunk_size), SPANS.get(platform, 1)
        return partial(ssd_chunked, *args, chunk_size=Q, spans=spans)

    return jax.lax.platform_dependent(**{k: on(k) for k in CHUNK})


def by_rows(fn, b, dtype):
    """fn(rows): rows is b, or more where products of few rows are slow.

    A TPU's matrix unit takes rows by eight, and XLA gives products of fewer to the
    vector unit (chapter 08). On a CPU, XLA widens a whole bfloat16 matrix to multiply
    it by one row; by two rows it calls a kernel that does not. Zeros beside the real
    rows are cheaper than either.
    """
    least = {"tpu": 8} | ({"cpu": 2} if dtype == jnp.bfloat16 else {})
    padded = {platform: partial(fn, n) for platform, n in least.items() if n > b}
    return jax.lax.platform_dependent(default=partial(fn, b), **padded)


def product(W, u, dtype):
    """W u over the last axis of u, with W stored as (outputs, inputs).

    XLA on a CPU needs advice. In 16 bits, ask for sums in float32, or the whole
    matrix is widened first. In float32, a product of a few rows reads W in the order
    in which it is stored only if the rows lie side by side in the result; the barrier
    keeps the transpose after it from being moved into the product. One row alone waits
    for memory, and XLA reads W faster as a few products than as one.
    """
    rows = u.size // u.shape[-1]

    def plain(W, u, sums=dtype):
        return jnp.einsum("...i,oi->...o", u, W, preferred_element_type=sums)

    def on_cpu(W, u):
        if u.dtype.itemsize == 2:
            return plain(W, u, jnp.float32).astype(dtype)
        if rows == 1 and len(W) % PARTS == 0:
            W = W.reshape(PARTS, -1, W.shape[1])
            y = jnp.einsum("pi,poi->po", jnp.broadcast_to(u.ravel(), W[:, 0].shape), W)
            return y.reshape(*u.shape[:-1], -1)
        if not 1 < rows <= FEW_ROWS:
            return plain(W, u)
        y = jnp.einsum("ri,oi->or", u.reshape(rows, -1), W)
        return jax.lax.optimization_barrier(y).T.reshape(*u.shape[:-1], -1)

    return jax.lax.platform_dependent(W, u, cpu=on_cpu, default=plain)
