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
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ssdlib._checks import check_integers, check_shapes, check_size
from ssdlib.cache import init_cache
from ssdlib.generate import bucket
from ssdlib.model import ArrayLike, is_real, pieces, read_all
from ssdlib.params import Mamba2Config, Params, checked_params
from ssdlib.recurrence import accumulator

__all__ = ["Evaluation", "evaluate", "next_token_loss"]


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
        return math.inf if self.loss >= 709 else math.exp(self.loss)


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
    params = checked_params(params, config)
    tokens = check_integers("tokens", tokens, ("T",), 0, config.vocab_size - 1)
    tokens = np.asarray(tokens)
    if len(tokens) < 2:
        raise ValueError("tokens: 1 of them; the first is not scored, give at least 2")
    check_size("piece", piece)
    cache = init_cache(config, 1, params["embedding"].dtype)
    n, nats = len(tokens) - 1, 0.0
    piece = min(piece, bucket(n))
    parts = zip(
        pieces(tokens[None, :-1], None, piece),
        pieces(tokens[None, 1:], None, piece),
        strict=True,
    )
    bar = dict(unit=" tokens", delay=2, leave=False, disable=None)
    with tqdm(total=n, **bar) as progress:
        for (part, real), (targets, _) in parts:
            loss, cache = _score(params, config, part, targets, real, cache)
            nats += float(loss)  # summed in float64 across pieces
            progress.update(int(real[0]))
    return Evaluation(n, nats)


def next_token_loss(
    logits: Float[Array, "b T V"], targets: Int[ArrayLike, "b T"]
) -> Float[Array, "b T"]:
    """-log p(target_t) = log Σ_v exp(logit_v) - logit_{target_t}, in nats.

    `targets` are the tokens that followed: tokens[:, 1:] where logits are those after
    tokens[:, :-1]. Arithmetic is float32 (float64 if logits are).
    Raises ValueError if a shape, dtype or target does not fit. Inside a compiled
    program values are hidden: the loss of a target outside of 0..V-1 is NaN there.
    """
    check_shapes(logits=(logits, "b T V"))
    b, T, V = logits.shape
    targets = check_integers("targets", targets, (b, T), 0, V - 1)
    logits = logits.astype(accumulator(logits))
    targets = jnp.where(jnp.asarray(targets) < 0, V, targets)  # -1 is not the last one
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _score(params, config, tokens, targets, real, cache):
    """(Σ -log p of the targets after each real token, cache)."""
    logits, cache = read_all(params, config, tokens, cache, real)
    loss = next_token_loss(logits, targets)
    return jnp.where(is_real(real, loss.shape[1]), loss, 0).sum(), cache
