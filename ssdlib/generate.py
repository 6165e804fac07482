"""Generation as one compiled program: prefill, then a loop that stays on the device.

    while any row is alive and i < n:
        token  ~ softmax(logits / temperature)
        logits, cache = decode_step(token, cache)

The cache has a fixed size, so every pass of the loop is the same program on the same
buffers: nothing grows, nothing is recompiled, and nothing visits the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib._checks import (
    check_integers,
    check_is,
    check_key,
    check_range,
    check_size,
    check_tokens,
    is_number,
    told,
)
from ssdlib.cache import Cache, check_cache, init_cache
from ssdlib.config import Mamba2Config
from ssdlib.model import ArrayLike, prefill_any
from ssdlib.params import Params, check_params

__all__ = ["Generation", "bucket", "generate", "sample", "stream"]


class Generation(NamedTuple):
    """What `generate` returns.

    tokens:  (b, max_new_tokens); after its end a row is filled with eos_id.
    lengths: (b,) tokens each row produced, its eos_id counted.
    cache:   has read the prompt and those tokens: pass it on to go on from here.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    cache: Cache


def generate(
    params: Params,
    config: Mamba2Config,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    lengths: Int[ArrayLike, "b"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: Array | None = None,
    cache: Cache | None = None,
) -> Generation:
    """Continue every row of the prompt by up to max_new_tokens tokens.

    temperature 0 takes the most probable token, as does one that is 0 in float32 or
    nearly so; above it samples with `key`, from
    the top_k most probable tokens if given, and of those from the smallest set that
    holds probability top_p if given. `lengths` marks right-padded rows. With `eos_id`
    a row ends at that token, and the loop stops once all rows ended. A `cache` from an
    earlier call goes on from there, without reading the past again; it stays valid.

    Compiled once for each batch size, bucket of T, bucket of max_new_tokens and choice
    of limits. Buckets are 16, 24, 32, 48, 64, 96 ..., two an octave: 25
    of them cover all prompts up to 65,536 tokens. Token i is drawn with
    `jax.random.fold_in(key, i)`.

    Raises ValueError for shapes, dtypes or values out of range, naming the argument.
    Where weights or cache hold NaN, all logits are NaN, and the tokens are 0.
    """
    limits = temperature, top_k, top_p, eos_id, key
    options = _check(params, config, prompt, max_new_tokens, lengths, *limits)
    state, cache = _start(
        params, config, prompt, lengths, cache, max_new_tokens, max_new_tokens, options
    )
    return Generation(state.tokens[:, :max_new_tokens], state.lengths, cache)


def stream(
    params: Params,
    config: Mamba2Config,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    lengths: Int[ArrayLike, "b"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: Array | None = None,
    cache: Cache | None = None,
    block: int = 16,
) -> Iterator[np.ndarray]:
    """`generate` for one who watches: yields (b, at most `block`) tokens at a time.

    The same tokens as `generate`, with one host round trip a block: the next block is
    already running on the device while the caller handles this one. Ends early once
    every row has met `eos_id`. Arguments are checked at the call.
    """
    limits = temperature, top_k, top_p, eos_id, key
    options = _check(params, config, prompt, max_new_tokens, lengths, *limits)
    check_size("block", block)
    n = min(block, max_new_tokens)
    carry = _start(params, config, prompt, lengths, cache, n, block, options)

    def blocks(state, cache, done=0):
        while True:
            n = min(block, max_new_tokens - done)
            tokens, alive = state.tokens[:, :n], state.alive
            done += n
            if done < max_new_tokens:  # queue the next block, then wait for this one
                n = min(block, max_new_tokens - done)
                state, cache = _decode_jit(
                    params, config, state, cache, n, bucket(block), options
                )
            yield np.asarray(tokens)
            if done == max_new_tokens or not np.asarray(alive).any():
                return

    return blocks(*carry)


# --- the compiled program -------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Options:
    """How to pick tokens. Fields that are None shape the program; others are traced."""

    temperature: Any = None
    top_p: Any = None
    eos_id: Any = None
    key: Any = None
    top_k: Any = None


class State(NamedTuple):
    """What one block hands to the next, beside the cache."""

    tokens: Array  # (b, size) the block just made
    lengths: Array  # (b,) tokens produced so far
    alive: Array  # (b,) rows that have not ended
    logits: Array  # (b, V) for the next token
    total: Array  # () tokens since the prompt


def _start(params, config, prompt, lengths, cache, n, size, options):
    """Pad the prompt to its bucket and run the whole program."""
    prompt = np.asarray(prompt)
    b, T = prompt.shape
    lengths = np.full(b, T) if lengths is None else lengths
    prompt = np.pad(prompt, [(0, 0), (0, bucket(T) - T)])
    if cache is None:
        cache = init_cache(config, b, params["embedding"].dtype)
    else:
        check_cache(config, cache, b)
        cache = jax.tree.map(jnp.copy, cache)  # the program consumes its cache
    return _generate_jit(
        params, config, prompt, lengths, cache, n, bucket(size), options
    )


@partial(jax.jit, static_argnames=("config", "size"), donate_argnames="cache")
def _generate_jit(params, config, prompt, lengths, cache, n, size, options):
    """Prefill, then decode n tokens into a buffer of `size`."""
    b = len(prompt)
    logits, cache = prefill_any(params, config, prompt, cache, lengths)
    none, zero = jnp.zeros(b, jnp.int32), jnp.zeros((), jnp.int32)
    state = State(none[:, None], none, jnp.ones(b, bool), logits, zero)
    return _decode(params, config, state, cache, n, size, options)


@partial(jax.jit, static_argnames=("config", "size"), donate_argnames="cache")
def _decode_jit(params, config, state, cache, n, size, options):
    """The next block: no prompt, otherwise the same loop."""
    return _decode(params, config, state, cache, n, size, options)


def _decode(params, config, state, cache, n, size, options):
    """The loop: at most n more tokens, in a fresh buffer of `size`."""
    b, eos_id = len(state.lengths), options.eos_id
    fill = 0 if eos_id is None else eos_id
    state = state._replace(tokens=jnp.full((b, size), fill, jnp.int32))

    def unfinished(carry):
        i, s, _ = carry
        return (i < n) & s.alive.any()

    def step(carry):
        i, s, cache = carry
        key = options.key
        key = None if key is None else jax.random.fold_in(key, s.total)
        token = sample(s.logits, key, options.temperature, options.top_k, options.top_p)
        token = jnp.where(s.alive, token, fill)
        read = None if eos_id is None else s.alive.astype(jnp.int32)
        logits, cache = prefill_any(params, config, token[:, None], cache, read)
        s = State(
            tokens=jax.lax.dynamic_update_index_in_dim(s.tokens, token, i, 1),
            lengths=s.lengths + s.alive.astype(jnp.int32),
            alive=s.alive if eos_id is None else s.alive & (token != eos_id),
            logits=logits,
            total=s.total + 1,
        )
        return i + 1, s, cache

    carry = jnp.zeros((), jnp.int32), state, cache
    _, state, cache = jax.lax.while_loop(unfinished, step, carry)
    return state, cache


def sample(
    logits: Float[Array, "b V"],
    key: Array | None = None,
    temperature: Float[Array, ""] | None = None,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, "b"]:
    """One token per row: argmax without a temperature, else a draw, on the device.

    top_k keeps the k most probable tokens; top_p then keeps the smallest set of them
    whose probability reaches top_p (Holtzman et al. 2020, arXiv 1904.09751, section
    3.1). Of equally probable tokens the first come first. Nothing is sorted: see
    `_keep`.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # no overflow
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    if top_k is not None:
        logits = _keep(logits, jnp.ones_like(logits), top_k)
    if top_p is not None:
        p = jax.nn.softmax(logits)
        logits = _keep(logits, p, jnp.where(top_p < 1, top_p, jnp.inf))
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _keep(logits, weights, enough):
    """-inf for all but the largest logits, as few as hold `enough` of the weights.

    The threshold is the largest one at which those above it hold too little, and it is
    found bit by bit: 32 passes over a row, where a sort of it takes ten times as long.
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


def bucket(size: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96 ... that holds size."""
    octave = 16
    while octave < size:
        if octave + octave // 2 >= size:
            return octave + octave // 2
        octave *= 2
    return octave


def _check(params, config, prompt, n, lengths, temperature, top_k, top_p, eos_id, key):
    """Raise ValueError for arguments that make no sense; return the `Options`."""
    check_is("config", config, Mamba2Config)
    check_params(params, config)
    check_tokens(prompt, config.vocab_size, lengths, name="prompt")
    check_size("max_new_tokens", n)
    if not is_number(temperature) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {told(temperature)}; it must be 0 or more")
    if top_k is not None:
        check_integers("top_k", top_k, ())
        check_range("top_k", top_k, 1, config.vocab_size)
        top_k = jnp.int32(top_k)
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p: {told(top_p)}; it must be above 0 and at most 1")
    if eos_id is not None:
        check_integers("eos_id", eos_id, ())
        check_range("eos_id", eos_id, 0, config.vocab_size - 1)
        eos_id = jnp.int32(eos_id)
    if np.float32(temperature) < np.finfo(np.float32).tiny:  # the limit of small ones
        return Options(eos_id=eos_id)
    if key is None:
        raise ValueError("key: None; sampling (temperature > 0) needs a jax.random.key")
    check_key(key)
    top_p = None if top_p is None else jnp.float32(top_p)
    return Options(jnp.float32(temperature), top_p, eos_id, key, top_k)
