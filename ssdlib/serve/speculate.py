"""Speculative decoding: a draft proposes k tokens, one pass of the model verifies them.

    x ~ q is kept with probability min(1, p(x) / q(x)), else drawn from max(0, p - q)

Each token is then distributed as p, that of the model, whatever the draft's q is. After
a rejection a key-value cache drops rows, but a state cannot be run backwards. Here it
need not be: the cache reads a token once it is kept, never before. A pass starts from
one cache and reads the tokens kept since then, at most k + 1, and k proposals to their
right, which the logits depend on and the cache does not. So no state is ever undone,
and none is stored for each token.
Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv
2302.01318), algorithm 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ssdlib._checks import check_is, check_size, check_tokens
from ssdlib.cache import Cache
from ssdlib.generate import LONGEST, bucket, first_tokens
from ssdlib.model import ArrayLike, prefill, read, read_all
from ssdlib.params import Mamba2Config, Params, checked_params
from ssdlib.sample import (
    categorical,
    check_options,
    is_end,
    probabilities,
    unless_ended,
)

__all__ = ["Lookup", "ModelDraft", "Speculation", "speculate"]


# --- who proposes ---------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookup:
    """Proposes what followed where the last tokens of the text, up to n, stood before.

    The longest match counts, then the latest. It costs no weights, and pays where a
    text repeats itself or its prompt. It remembers nothing beside the text.
    """

    n: int = field(default=3, metadata=dict(static=True))

    def read(self, cache, tokens, lengths, piece=None):
        """No state is kept."""
        return None, cache

    def propose(self, cache, text, end, new, k, draw):
        """(k tokens, their distributions q or None where certain, the next cache)."""
        at = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        same, matched = at < end[:, None] - 1, jnp.zeros(text.shape, jnp.int32)
        for i in range(self.n):
            last = _window(text, jnp.maximum(end - 1 - i, 0), 1)
            same &= (jnp.roll(text, i, axis=1) == last) & (at >= i)
            matched = jnp.where(same, i + 1, matched)
        score = jnp.where(at < end[:, None] - 1, matched * text.shape[1] + at, -1)
        place = jnp.argmax(score, axis=1).astype(jnp.int32)[:, None]
        period = jnp.maximum(end[:, None] - 1 - place, 1)  # it may run into the end
        index = place + 1 + jnp.arange(k, dtype=jnp.int32)[None] % period
        return jnp.take_along_axis(text, index, axis=1), None, cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelDraft:
    """Proposes what a smaller model of the same vocabulary draws.

    It keeps a cache of its own, which like the verifier's reads what is kept alone.
    """

    params: Params
    config: Mamba2Config = field(metadata=dict(static=True))

    def read(self, cache, tokens, lengths, piece=None):
        """`prefill`: (logits, the next cache)."""
        return prefill(self.params, self.config, tokens, cache, lengths, piece)

    def propose(self, cache, text, end, new, k, draw):
        """(k tokens, their distributions q, the next cache)."""
        window = _window(text, end - new, k + 1)
        logits, cache = self.read(cache, window, new)
        q, token = draw(logits, 0)
        made, ahead = [(q, token)], cache
        for i in range(1, k):
            logits, ahead = read(self.params, self.config, token[:, None], ahead)
            q, token = draw(logits, i)
            made.append((q, token))
        q, tokens = (jnp.stack(v, axis=1) for v in zip(*made, strict=True))
        return tokens, q, cache


# --- who verifies ---------------------------------------------------------------------


class Speculation(NamedTuple):
    """What `speculate` returns.

    tokens, lengths, cache: as in `Generation`.
    passes:      (b,) how often the model was run for a row; lengths / passes tokens
                 came of each.
    draft_cache: what the draft has read, the same tokens as `cache`.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    cache: Any
    passes: Int[Array, "b"]
    draft_cache: Any


def speculate(
    params: Params,
    config: Mamba2Config,
    prompt: Int[ArrayLike, "b T"],
    max_new_tokens: int,
    *,
    draft: Lookup | ModelDraft | None = None,
    k: int = 4,
    lengths: Int[ArrayLike, "b"] | None = None,
    temperature: float | Array = 0.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    eos_id: int | Sequence[int] | Array | None = None,
    key: Array | None = None,
    cache: Cache | None = None,
    draft_cache: Any = None,
) -> Speculation:
    """`generate` with fewer passes over the weights: `draft` proposes k tokens a pass.

    Greedy, the tokens are those of `generate`, up to ties within rounding. Sampled,
    they have its distribution, but are other ones for the same key. Without a draft it
    looks them up in the text (`Lookup`). A pass reads up to 2 k + 1 tokens and keeps 1
    to k + 1. It pays where so many cost little more than one, as on a chip that waits
    for weights, and where most proposals are kept; else `generate` is faster. Memory
    does not grow with k, but for the logits of k + 1 tokens.

    To go on, pass the last token, `cache` and `draft_cache`, as with `generate`. After
    the prompt is read, all runs in one loop on the device. Errors as in `generate`,
    and ValueError for k below 1 or a draft of another vocabulary.
    """
    params = checked_params(params, config)
    prompt, end = check_tokens(prompt, config.vocab_size, lengths, name="prompt")
    check_size("max_new_tokens", max_new_tokens)
    check_size("k", k)
    options = check_options(config.vocab_size, temperature, top_k, top_p, eos_id, key)
    draft = Lookup() if draft is None else draft
    check_is("draft", draft, Lookup, ModelDraft)
    check_is("draft_cache", draft_cache, Cache, type(None))
    theirs = getattr(draft, "config", config)
    if theirs.vocab_size != config.vocab_size:
        raise ValueError(
            f"draft: a vocabulary of {theirs.vocab_size}; it must be "
            f"{config.vocab_size}, as config's"
        )
    (b, T), prompt = prompt.shape, np.asarray(prompt)
    end = np.full(b, T, np.int32) if end is None else np.asarray(end)
    if cache is not None:
        end = unless_ended(prompt, end, options.eos_id)
    earlier, piece = np.maximum(end - 1, 0), min(bucket(T), LONGEST)
    _, cache = prefill(params, config, prompt, cache, earlier, piece)
    _, draft_cache = draft.read(draft_cache, prompt, earlier, piece)
    size = bucket(max_new_tokens)
    text = np.pad(prompt, [(0, 0), (0, bucket(T) - T + size + 2 * k + 1)])
    caches, n = (cache, draft_cache), np.int32(max_new_tokens)
    made = _program(params, config, draft, *caches, text, end, n, size, k, options)
    return made._replace(tokens=first_tokens(made.tokens, max_new_tokens))


def _speculation(
    params, config, draft, cache, drafted, text, end, n, size, k, options
) -> Speculation:
    """Passes until every row has ended or made n tokens, and all but its last is read.

    The text is that of prompt and tokens, up to `end`. The caches have read it up to
    `at`, and proposals lie to the right of its end.
    """
    start, b, fill = end, len(text), 0 if options.eos_id is None else options.eos_id[0]
    row, ahead = jnp.arange(b, dtype=jnp.int32), jnp.arange(k + 1, dtype=jnp.int32)

    def one_pass(carry):
        text, at, end, alive, passes, cache, drafted = carry
        new = jnp.maximum(end - at - jnp.where(alive, 0, 1), 0)  # what is read now
        if options.key is not None:  # one a pass: the sum grows, over calls as well
            now = jax.random.fold_in(options.key, (cache.length + new).sum())

        def pick(p, use):
            if options.key is None:
                return jnp.argmax(p, axis=-1).astype(jnp.int32)
            keys = jax.random.split(jax.random.fold_in(now, use), len(p))
            return jax.vmap(categorical)(keys, jnp.log(p))

        def draw(logits, i):
            q = probabilities(logits, options)
            return q, pick(q, i)

        proposed, q, drafted = draft.propose(drafted, text, at + new, new, k, draw)
        text = text.at[row[:, None], end[:, None] + ahead[None, :k]].set(proposed)
        window = _window(text, at, 2 * k + 1)
        logits, cache = read_all(params, config, window, cache, new, k)
        p = probabilities(logits, options)
        if q is None:
            q = jax.nn.one_hot(proposed, p.shape[-1], dtype=p.dtype)

        chance = jnp.zeros((b, k), p.dtype)
        if options.key is not None:
            chance = jax.random.uniform(jax.random.fold_in(now, k), (b, k), p.dtype)
        kept, rest = _kept(p, q, proposed, chance)
        text = text.at[row, end + kept].set(pick(rest, k + 1))

        count, ended = jnp.minimum(kept + 1, n - (end - start)), False
        if options.eos_id is not None:
            ends = is_end(_window(text, end, k + 1), options.eos_id)
            ends &= ahead[None] < count[:, None]
            ended = ends.any(axis=1)
            count = jnp.where(ended, ends.argmax(axis=1).astype(jnp.int32) + 1, count)
        at, end = at + new, end + jnp.where(alive, count, 0)
        passes = passes + alive.astype(jnp.int32)
        alive = alive & (end - start < n) & jnp.logical_not(ended)
        return text, at, end, alive, passes, cache, drafted

    def unfinished(carry):
        _, at, end, alive, *_ = carry
        return (alive | (end - at > 1)).any()

    carry = text, jnp.maximum(start - 1, 0), end, start > 0, jnp.zeros(b, jnp.int32)
    carry = jax.lax.while_loop(unfinished, one_pass, (*carry, cache, drafted))
    text, _, end, _, passes, cache, drafted = carry
    made = jnp.arange(size, dtype=jnp.int32)[None] < (end - start)[:, None]
    tokens = jnp.where(made, _window(text, start, size), fill)
    return Speculation(tokens, end - start, cache, passes, drafted)


_program = jax.jit(_speculation, static_argnames=("config", "size", "k"))


def _kept(p, q, proposed, chance):
    """(how many proposals are kept, the distribution of the token behind them).

    The first x with chance q(x) >= p(x) is refused. The token in its place is drawn
    from max(0, p - q). Where all k are kept, the next one is drawn from p.
    """
    k = proposed.shape[1]
    p_x, q_x = (_pick(v[:, :k], proposed[..., None], 2)[..., 0] for v in (p, q))
    right = (chance * q_x < p_x).astype(jnp.int32)
    kept = jnp.cumprod(right, axis=1).sum(axis=1, dtype=jnp.int32)
    q = jnp.pad(q, [(0, 0), (0, 1), (0, 0)])
    p, q = (_pick(v, kept[:, None, None], 1)[:, 0] for v in (p, q))
    rest = jnp.maximum(p - q, 0)
    some = rest.sum(axis=-1, keepdims=True) > 0  # else p is q up to rounding
    return kept, jnp.where(some, rest, p)


def _window(text, start, width):
    """`width` tokens of each row from `start` on."""
    return _pick(text, start[:, None] + jnp.arange(width, dtype=jnp.int32)[None], 1)


_pick: Callable = partial(jnp.take_along_axis, mode="clip")
