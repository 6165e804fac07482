"""A matrix in eight bits, and its product with numbers that keep sixteen.

    W ≈ diag(scale) values    scale_o = max_i |W_oi| / 127,  error ≤ scale_o / 2
    u ≈ s (hi + lo / 254)     s       = max_i |u_i| / 127
    W u ≈ diag(scale) (values hi + values lo / 254) s

values, hi and lo are integers of one byte, so both products add up integers, without
error. An activation fills two rows, its high and its low byte: thus the weights alone
are rounded to eight bits. Chapter 11 shows what else could be, and what could not.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["Int8Matrix", "product"]

LARGEST = 127  # -128 has no counterpart above 0
FINER = 2 * LARGEST  # steps of the low byte in one of the high byte


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Matrix:
    """diag(scale) values: (outputs, inputs) in int8, and (outputs,) in float32.

    Takes the place of a matrix among the parameters. Its rows can be cut, and `astype`
    makes them numbers again; `dtype` is that of its products.
    """

    values: Any
    scale: Any

    dtype = jnp.dtype(jnp.float32)

    @classmethod
    def of(cls, W, xp=jnp):
        """The nearest one to W (outputs, inputs), an array of xp: NumPy's or JAX's."""
        W = xp.asarray(W).astype(xp.float32)
        scale = xp.abs(W).max(-1) * xp.float32(1 / LARGEST)  # XLA and NumPy agree
        steps = W / xp.where(scale == 0, 1, scale)[:, None]
        return cls(xp.round(steps).astype(xp.int8), scale)

    @property
    def shape(self) -> tuple:
        """Of the matrix."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows):
        return Int8Matrix(self.values[rows], self.scale[rows])

    def take(self, rows, **out_of_range) -> Array:
        """`matrix.at[rows].get(...)` in numbers; its fill value replaces the scale."""
        scale = self.scale.at[rows].get(**out_of_range)
        return Int8Matrix(self.values[rows], scale).astype(self.dtype)

    def astype(self, dtype) -> Array | np.ndarray:
        """diag(scale) values as an array, rounded to a narrower dtype once."""
        return (self.values.astype(self.dtype) * self.scale[..., None]).astype(dtype)


def product(W: Int8Matrix, u: Float[Array, "... i"], dtype) -> Float[Array, "... o"]:
    """W u over the last axis of u: one product of integers with two rows for one of u.

    A row of u is rounded to 1 / 64,516 of its largest entry. Reads a byte a weight.
    """
    v = u.reshape(-1, u.shape[-1]).astype(W.dtype)
    s = jnp.abs(v).max(-1, keepdims=True) / LARGEST
    steps = v / jnp.where(s == 0, 1, s)
    high = jnp.round(steps)
    low = jnp.round(FINER * (steps - high))
    rows = jnp.concatenate([high, low]).astype(jnp.int8)
    add_up = partial(jnp.einsum, "ri,oi->ro", preferred_element_type=jnp.int32)
    high, low = jnp.split(add_up(rows, W.values).astype(W.dtype), 2)
    y = (high + low / FINER) * (s * W.scale[None])
    return y.astype(dtype).reshape(*u.shape[:-1], -1)
