"""Perplexity of a text of any length, exact, in constant memory.

    loss = -(1/(T-1)) Σ_{t>1} log p(token_t | token_1 ... token_{t-1})   nats per token
    perplexity = exp(loss)

A Transformer with a window of W tokens must forget or recompute at each window's edge.
A state forgets nothing at an edge: pieces are read one after another, the cache is
passed on, and the sum is the one that a single pass over the whole text would give.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from ssdlib._checks import check_integers, check_range
from ssdlib.cache import init_cache
from ssdlib.config import Mamba2Config
from ssdlib.model import ArrayLike, _backbone, _head
from ssdlib.params import Params

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """What `evaluate` returns: tokens that were scored, and their -log p in all."""

    tokens: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def evaluate(
    params: Params,
    config: Mamba2Config,
    tokens: Int[ArrayLike, "T"],
    piece: int = 512,
) -> Evaluation:
    """-Σ log p(token_t | all tokens before it), for every token but the first.

    No start token is added, and no token is read twice: T - 1 tokens cost one pass.
    `piece` bounds the memory (piece * vocab_size logits) and changes nothing else.
    In a terminal, what takes more than two seconds shows its progress.

    Raises ValueError for fewer than two tokens, tokens out of range, or piece < 1.
    """
    check_integers("tokens", tokens, ("T",))
    check_range("tokens", tokens, 0, config.vocab_size - 1)
    tokens = np.asarray(tokens, np.int32)
    if len(tokens) < 2:
        raise ValueError("tokens: 1 of them; the first is not scored, give at least 2")
    if piece < 1:
        raise ValueError(f"piece: {piece}; it must be at least 1")
    cache = init_cache(config, 1, params["embedding"].dtype)
    n, nats = len(tokens) - 1, 0.0
    bar = dict(unit=" tokens", delay=2, leave=False, disable=None)
    with tqdm(total=n, **bar) as progress:
        for start in range(0, n, piece):
            size = min(piece, n - start)
            pair = np.zeros((2, piece), np.int32)
            pair[0, :size] = tokens[start : start + size]
            pair[1, :size] = tokens[start + 1 : start + 1 + size]
            loss, cache = _score(params, config, pair, np.array([size]), cache)
            nats += float(loss)  # summed in float64 across pieces
            progress.update(size)
    return Evaluation(n, nats)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _score(params, config, pair, lengths, cache):
    """(-Σ log p of the targets in row 1 after the tokens in row 0, cache)."""
    r, cache = _backbone(params, config, pair[:1], cache, lengths)
    logits = _head(params, config, r)[0]
    chosen = jnp.take_along_axis(logits, pair[1][:, None], axis=-1)[:, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(jnp.arange(len(loss)) < lengths, loss, 0).sum(), cache
