"""Generation as one compiled program: prefill, then a loop that stays on the device.

    token ~ softmax(logits / temperature)
    while any row goes on and fewer than n tokens were made:
        logits, cache = decode_step(token, cache)
        token ~ softmax(logits / temperature)

The cache has a fixed size, so every pass of the loop is the same program on the same
buffers: nothing grows, nothing is recompiled, and nothing visits the host.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ssdlib._checks import check_size, check_tokens, is_traced
from ssdlib.cache import Cache, check_cache, init_cache
from ssdlib.model import ArrayLike, prefill, read
from ssdlib.params import Mamba2Config, Params, checked_params
from ssdlib.sample import check_options, is_end, sample, unless_ended

__all__ = ["Generation", "bucket", "generate", "stream"]

LONGEST = 2048  # tokens of a prompt that one program reads; more are read in pieces


class Generation(NamedTuple):
    """What `generate` returns.

    tokens:  (b, max_new_tokens); after its end a row is filled with eos_id, the first
             of several.
    lengths: (b,) tokens each row produced, the one that ended it counted.
    cache:   has read all but the last token of each row.

    To go on from here, pass `tokens[:, -1:]` as the prompt, with this cache.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    cache: Any


def generate(
    params: Params,
    config: Mamba2Config,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    lengths: Int[ArrayLike, "b"] | None = None,
    temperature: float | Array = 0.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    eos_id: int | Sequence[int] | Array | None = None,
    key: Array | None = None,
    cache: Cache | None = None,
) -> Generation:
    """Continue every row of the prompt by up to max_new_tokens tokens.

    Temperature 0, and what is nearly 0 in float32, takes the most probable token. Above
    it, a token is drawn with `key` from the top_k most probable ones if given, and of
    those from the smallest set that holds probability top_p if given. `lengths` marks
    right-padded rows; a row of length 0 has nothing to go on from and stays as it is.
    With `eos_id` a row ends at that token, or the first of several (n,), and the loop
    stops once all rows ended.

    A `cache` from an earlier call goes on from there, without reading the past again;
    it stays valid. Give it the last token, which it has not read:
    `generate(params, config, g.tokens[:, -1:], n, cache=g.cache)`. A row that goes on
    with an eos_id alone has ended. Token t of row i, counted from the start of its
    text, is drawn with `fold_in(fold_in(key, i), t)`, so that the same key gives the
    same text, however it is cut in calls.

    Compiled once for each batch size, bucket of T, bucket of max_new_tokens and choice
    of limits. Buckets are 1, 16, 24, 32, 48, 64 ..., two an octave; a prompt of more
    than 2,048 tokens is read in pieces of so many. Can be traced, with values then
    unchecked.

    Raises ValueError for shapes, dtypes or values out of range, naming the argument.
    Where weights or cache hold NaN, all logits are NaN, and the tokens are 0.
    """
    check_size("max_new_tokens", max_new_tokens)
    limits = temperature, top_k, top_p, eos_id, key
    params, start, options = _start(params, config, prompt, lengths, cache, limits)
    return run(read, params, config, start, max_new_tokens, options)


def stream(
    params: Params,
    config: Mamba2Config,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    lengths: Int[ArrayLike, "b"] | None = None,
    temperature: float | Array = 0.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    eos_id: int | Sequence[int] | Array | None = None,
    key: Array | None = None,
    cache: Cache | None = None,
    block: int = 16,
) -> Iterator[np.ndarray]:
    """`generate`, block by block: yields (b, at most `block`) tokens at a time.

    The same tokens as `generate`, with one host round trip a block: the next block is
    already running on the device while the caller handles this one. Ends early once
    every row has met an `eos_id`. Arguments are checked at the call, and the prompt is
    read. Two programs, of the prompt and of a block, are compiled side by side.
    """
    check_size("max_new_tokens", max_new_tokens)
    check_size("block", block)
    limits, n = (temperature, top_k, top_p, eos_id, key), min(block, max_new_tokens)

    def block_program(params, start, options):
        args = read, params, config, *start, np.int32(n), bucket(block), options
        return _program.lower(*args)

    args = params, config, prompt, lengths, cache, limits
    params, start, options = _start(*args, most=1, then=block_program)
    return run_blocks(read, params, config, start, max_new_tokens, options, block)


def _start(params, config, prompt, lengths, cache, limits, most=None, then=None):
    """Check the arguments; return (parameters, start of the generation, options).

    A prompt of at most `most` tokens is padded to its bucket and left to the program. A
    longer one is read here, up to each row's last token, while a second thread compiles
    `then(parameters, start, options)`. That is lowered in this thread, since JAX keeps
    settings such as x64 for each.
    """
    params = checked_params(params, config)
    prompt, lengths = check_tokens(prompt, config.vocab_size, lengths, name="prompt")
    options = check_options(config.vocab_size, *limits)
    (b, T), goes_on = prompt.shape, cache is not None
    if goes_on:
        check_cache(config, cache, b)
        cache = jax.tree.map(jnp.copy, cache)  # the program consumes its cache
    else:
        cache = init_cache(config, b, params["embedding"].dtype)
    start = Start.of(prompt, lengths, cache, goes_on, options.eos_id)
    if T <= (most or LONGEST) or any(map(is_traced, (prompt, lengths, options.eos_id))):
        return params, start.padded_to(bucket(T)), options
    prompt = np.asarray(prompt)
    real = np.asarray(start.real) if start.masked else np.full(b, T, np.int32)
    earlier, one = np.maximum(real - 1, 0), np.minimum(real, 1)
    last = np.take_along_axis(prompt, earlier[:, None], 1)
    start = start._replace(prompt=last, real=one if start.masked else None)
    with ThreadPoolExecutor(1) as pool:
        if then:
            pool.submit(then(params, start, options).compile)
        piece = min(LONGEST, bucket(T))
        _, cache = prefill(params, config, prompt, cache, earlier, piece=piece)
    return params, start._replace(cache=cache), options


# --- the loop of any model ------------------------------------------------------------


class Start(NamedTuple):
    """Where a generation starts; the program consumes the cache.

    prompt:  (b, size)
    real:    (b,) how many tokens of it are real, None if all.
    cache:   has read all before the prompt.
    masked:  whether a row may be idle, now or later: one without a real token.
    """

    prompt: Array
    real: Array | None
    cache: Any
    masked: bool

    @classmethod
    def of(cls, prompt, lengths, cache, goes_on, eos_id):
        """Rows have `lengths` real tokens, or all; one that goes on may have ended."""
        masked, real = lengths is not None or eos_id is not None, lengths
        if masked and real is None:
            real = np.full(*prompt.shape, np.int32)  # (b,), each T
        real = unless_ended(prompt, real, eos_id) if goes_on else real
        return cls(prompt, real, cache, masked)

    def padded_to(self, size):
        """With padding to the right of the prompt."""
        (b, T), pad = self.prompt.shape, jnp.pad if is_traced(self.prompt) else np.pad
        if size == 1:
            return self
        real = np.full(b, T, np.int32) if self.real is None else self.real
        prompt = pad(self.prompt, [(0, 0), (0, size - T)])
        return self._replace(prompt=prompt, real=real)


def run(read: Callable, params, config, start: Start, n, options) -> Generation:
    """`generate` for any model: read(params, config, tokens, cache, lengths)."""
    traced = any(map(is_traced, jax.tree.leaves((params, start, options))))
    program = _inner_program if traced else _program
    made = program(read, params, config, *start, np.int32(n), bucket(n), options)
    return made._replace(tokens=first_tokens(made.tokens, n))


def first_tokens(tokens, n):
    """The first n tokens of each row; by the host, as a device compiles each n anew."""
    if is_traced(tokens) or not tokens.is_fully_addressable:
        return tokens[:, :n]
    if n == tokens.shape[1]:
        return tokens
    return jax.device_put(np.asarray(tokens)[:, :n], tokens.sharding)


def run_blocks(read: Callable, params, config, start: Start, n, options, block: int):
    """`stream` for any model, and what it returns."""
    size, eos_id = bucket(block), options.eos_id

    def go(start, n):
        return _program(read, params, config, *start, np.int32(n), size, options)

    def blocks(made, left):
        while True:
            tokens, now, left = made.tokens, min(block, left), max(0, left - block)
            if left:  # queue the next block, then wait for this one
                last, real = _last(tokens, made.lengths, eos_id, block, start.masked)
                made = go(Start(last, real, made.cache, start.masked), min(block, left))
            tokens = np.asarray(tokens)[:, :now]
            yield tokens
            ended = eos_id is not None and np.isin(tokens[:, -1], eos_id).all()
            if ended or not left:
                return

    return blocks(go(start, min(block, n)), n)


@partial(jax.jit, static_argnames=("block", "masked"))
def _last(tokens, lengths, eos_id, block, masked):
    """(the last token of each row (b, 1), 1 for rows that go on where one may not)."""
    last, real = tokens[:, block - 1 : block], (lengths == block).astype(jnp.int32)
    return last, unless_ended(last, real, eos_id) if masked else None


def _generation(
    read, params, config, prompt, real, cache, masked, n, size, options
) -> Generation:
    """Read the prompt, then make n tokens in a buffer of `size`, all on the device."""
    b, eos_id = len(prompt), options.eos_id
    fill = 0 if eos_id is None else eos_id[0]
    alive = real > 0 if masked else jnp.ones(b, bool)
    if options.key is not None:
        keys = jax.vmap(partial(jax.random.fold_in, options.key))(
            jnp.arange(b, dtype=jnp.int32)
        )

    def pick(logits, cache):
        now = None
        if options.key is not None:
            position = jnp.broadcast_to(cache.length, b)
            now = jax.vmap(jax.random.fold_in)(keys, position)
        return sample(logits, now, options.temperature, options.top_k, options.top_p)

    def put(token, i, alive, tokens, lengths):
        token = jnp.where(alive, token, fill)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, i, 1)
        lengths = lengths + alive.astype(jnp.int32)
        alive = alive if eos_id is None else alive & ~is_end(token, eos_id)
        return token, i + 1, alive, tokens, lengths

    def unfinished(carry):
        (_, i, alive, *_), _ = carry
        return (i < n) & alive.any()

    def step(carry):
        (token, *made), cache = carry
        read_now = made[1].astype(jnp.int32) if masked else None
        logits, cache = read(params, config, token[:, None], cache, read_now)
        return put(pick(logits, cache), *made), cache

    empty = jnp.full((b, size), fill, jnp.int32), jnp.zeros(b, jnp.int32)
    made = prompt[:, 0], jnp.int32(0), alive, *empty
    if prompt.shape[1] > 1:  # one token is read as all later ones are
        logits, cache = read(params, config, prompt, cache, real)
        made = put(pick(logits, cache), *made[1:])
    (*_, tokens, lengths), cache = jax.lax.while_loop(unfinished, step, (made, cache))
    return Generation(tokens, lengths, cache)


STATIC = "read", "config", "masked", "size"
_program = jax.jit(_generation, static_argnames=STATIC, donate_argnames="cache")
_inner_program = jax.jit(_generation, static_argnames=STATIC)  # inside another program


def bucket(size: int) -> int:
    """The smallest of 1, 16, 24, 32, 48, 64, 96 ... that holds size."""
    if size == 1:
        return 1
    octave = max(16, 1 << int(size - 1).bit_length())
    return octave * 3 // 4 if 16 < size <= octave * 3 // 4 else octave
