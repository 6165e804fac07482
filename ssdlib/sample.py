"""How the next token is picked from its logits.

    token ~ softmax(logits / temperature),  cut to the top_k, then to the top_p

On the device, and without a sort. Source of top_p: Holtzman et al. 2020 (arXiv
1904.09751), section 3.1.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib._checks import (
    check_integers,
    check_key,
    described,
    is_number,
    is_traced,
)

__all__ = ["Options", "check_options", "probabilities", "sample"]

BLOCK = 256  # logits; near the root of V, so that both draws are short
TINY = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Options:
    """How to pick tokens. Fields that are None shape the program; others are traced.

    eos_id is (n,), the ids of which each ends a row.
    """

    temperature: Any = None
    top_p: Any = None
    eos_id: Any = None
    key: Any = None
    top_k: Any = None


def check_options(
    vocab_size, temperature=0.0, top_k=None, top_p=None, eos_id=None, key=None
) -> Options:
    """The `Options` of these arguments. Raises ValueError for one out of range."""
    traced = is_traced(temperature)
    if not is_number(temperature) or not (traced or 0 <= temperature < float("inf")):
        raise ValueError(f"temperature: {described(temperature)}; it must be 0 or more")
    if top_k is not None:
        top_k = jnp.asarray(check_integers("top_k", top_k, (), 1, vocab_size))
    if top_p is not None:
        if not is_number(top_p) or not (is_traced(top_p) or 0 < top_p <= 1):
            raise ValueError(
                f"top_p: {described(top_p)}; it must be above 0 and at most 1"
            )
        top_p = jnp.asarray(top_p, jnp.float32)
    if eos_id is not None:
        several = isinstance(eos_id, (list, tuple)) or np.ndim(eos_id) > 0
        shape = ("n",) if several else ()
        eos_id = check_integers("eos_id", eos_id, shape, 0, vocab_size - 1)
        eos_id = jnp.asarray(eos_id.reshape(-1))
    if not traced and np.float32(temperature) < TINY:  # the limit of small ones
        return Options(eos_id=eos_id)
    if key is None:
        raise ValueError("key: None; sampling (temperature > 0) needs a jax.random.key")
    check_key(key)
    return Options(jnp.asarray(temperature, jnp.float32), top_p, eos_id, key, top_k)


def sample(
    logits: Float[Array, "b V"],
    keys: Array | None = None,
    temperature: Float[Array, ""] | None = None,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, "b"]:
    """One token per row: argmax without a temperature, else a draw with the row's key.

    top_k keeps the k most probable tokens; top_p then keeps the smallest set of them
    whose probability reaches top_p. Of equally probable tokens the first come first.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _adjusted(logits, temperature, top_k, top_p)
    return jax.vmap(categorical)(keys, logits)


def categorical(key: Array, logits: Float[Array, "V"]) -> Int[Array, ""]:
    """An index ~ softmax(logits), of which the largest is about 0.

    Its block of logits is drawn first, and then the index in the block. A draw is the
    largest of logits + Gumbel noise, and noise takes longer than the sum of a block: in
    this way V / BLOCK + BLOCK numbers of it are enough, where `jax.random.categorical`
    makes V. Source of the noise: Maddison et al. 2014 (arXiv 1411.0030), section 2.
    """
    fill = (0, -len(logits) % BLOCK)
    blocks = jnp.pad(logits, fill, constant_values=-jnp.inf).reshape(-1, BLOCK)
    noise = jax.random.gumbel(key, (len(blocks) + BLOCK,), logits.dtype)
    of_block, in_block = noise[: len(blocks)], noise[len(blocks) :]
    i = jnp.argmax(jnp.log(jnp.exp(blocks).sum(axis=1)) + of_block)
    return (i * BLOCK + jnp.argmax(blocks[i] + in_block)).astype(jnp.int32)


def probabilities(logits: Float[Array, "... V"], options: Options) -> Array:
    """How probable `sample` makes each token; 1 for the best without a temperature."""
    V, flat = logits.shape[-1], logits.reshape(-1, logits.shape[-1])
    if options.temperature is None:
        p = jax.nn.one_hot(jnp.argmax(flat, axis=-1), V, dtype=jnp.float32)
    else:
        limits = options.temperature, options.top_k, options.top_p
        p = jax.nn.softmax(_adjusted(flat, *limits))
    return p.reshape(logits.shape)


def _adjusted(logits, temperature, top_k, top_p):
    """Logits of what is drawn: over the temperature, -inf for what is left out."""
    logits = logits.astype(jnp.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that nothing overflows
    logits = logits / jnp.maximum(temperature, TINY)
    if top_k is not None:
        logits = _keep(logits, jnp.ones_like(logits), top_k)
    if top_p is not None:
        p = jax.nn.softmax(logits)
        logits = _keep(logits, p, jnp.where(top_p < 1, top_p, jnp.inf))
    return logits


def _keep(logits, weights, enough):
    """-inf for all but the largest logits, as few as hold `enough` of the weights.

    The threshold is the largest one at which those above it hold too little, and it is
    found bit by bit: 31 passes over a row, where a sort of it takes ten times as long.
    Logits here are at most 0, and positive floats are ordered as their bits are: the
    smaller these integers, the more probable the token.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(logits), jnp.int32)
    enough = jnp.broadcast_to(jnp.asarray(enough, weights.dtype), logits.shape[:1])

    def held(kept):
        return jnp.where(kept, weights, 0).sum(-1)

    def halve(i, least):  # the largest bits below which there is too little
        next_ = least + jnp.left_shift(jnp.int32(1), 30 - i)
        return jnp.where(held(bits < next_[:, None]) < enough, next_, least)

    edge = jax.lax.fori_loop(0, 31, halve, jnp.zeros(len(logits), jnp.int32))
    above, equal = bits < edge[:, None], bits == edge[:, None]
    before = jnp.cumsum(jnp.where(equal, weights, 0), axis=-1)
    before = before - jnp.where(equal, weights, 0)  # of tokens of one weight
    needed = before + held(above)[:, None] < enough[:, None]
    return jnp.where(above | (equal & needed), logits, -jnp.inf)


def unless_ended(prompt, real, eos_id):
    """No real tokens for a row that goes on with eos_id alone, as it has ended."""
    if eos_id is None:
        return real
    arrays = isinstance(prompt, jax.Array) or isinstance(real, jax.Array)
    on_host = not arrays and not is_traced(eos_id)
    xp, ends = (np, np.isin) if on_host else (jnp, is_end)
    return xp.where((real == 1) & ends(prompt[:, 0], eos_id), 0, real)


def is_end(token, eos_id):
    """Whether a token is one of those that end its row, for any number of tokens."""
    return jnp.isin(token, eos_id, method="compare_all")
