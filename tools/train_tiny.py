"""Train a byte-level Mamba-2 on the documentation that ships with CPython.

    loss = -(1/T) Σ_t log p(byte_{t+1} | byte_1 ... byte_t)        (nats per byte)

`python tools/train_tiny.py FOLDER` made the model behind `ssdlib.load("tiny")`; the
folder's `training.json` records how. Needs the `train` extra (optax).
"""

import argparse
import hashlib
import json
import lzma
import math
import platform
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ssdlib.checkpoint.weights import save
from ssdlib.companion.corpus import corpus
from ssdlib.evaluate import next_token_loss
from ssdlib.model import ArrayLike, forward
from ssdlib.params import Mamba2Config, Params, init_params

TINY = Mamba2Config(
    vocab_size=256,
    d_model=160,
    n_layers=8,
    n_heads=10,
    head_dim=32,
    d_state=64,
    chunk_size=32,
)
TAIL = 24_000  # held-out bytes at the end of the corpus


def loss(
    params: Params, config: Mamba2Config, tokens: Int[ArrayLike, "b T"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood of each next token, in nats."""
    return next_token_loss(
        forward(params, config, tokens[:, :-1]), tokens[:, 1:]
    ).mean()


def train(
    config: Mamba2Config,
    text: bytes,
    steps: int,
    batch_size: int = 8,
    length: int = 512,
    learning_rate: float = 4e-3,
    seed: int = 0,
    log_every: int = 50,
    log=print,
) -> tuple[Params, list[float]]:
    """AdamW on random windows of the text: (parameters, loss of every step in nats).

    Learning rate: linear warm-up over a twentieth of the steps, then cosine to a
    hundredth. Weight decay on matrices only. Progress goes to `log`.
    """
    import optax

    data = np.frombuffer(text, np.uint8)
    if len(data) <= length:
        raise ValueError(f"text: {len(data)} bytes; it must exceed length = {length}")
    params = init_params(config, jax.random.key(seed))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 20), steps, learning_rate / 100
    )
    matrices = jax.tree.map(lambda p: p.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=0.1, mask=matrices),
    )
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, config, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    rng, losses, start = np.random.default_rng(seed), [], time.perf_counter()
    for i in range(steps):
        at = rng.integers(0, len(data) - length, batch_size)
        tokens = np.stack([data[j : j + length + 1] for j in at]).astype(np.int32)
        params, state, value = step(params, state, tokens)
        losses.append(float(value))
        if (i + 1) % log_every == 0 or i + 1 == steps:
            bits = np.mean(losses[-log_every:]) / math.log(2)
            rate_now = (i + 1) * batch_size * length / (time.perf_counter() - start)
            log(f"step {i + 1}/{steps}  {bits:.3f} bits/byte  {rate_now:,.0f} bytes/s")
    return params, losses


def bits_per_byte(
    params: Params, config: Mamba2Config, text: bytes, context: bytes = b""
) -> float:
    """Mean -log2 p of the bytes of text, read after (but not counting) context."""
    tokens = np.frombuffer(context + text, np.uint8).astype(np.int32)[None]
    loss = next_token_loss(forward(params, config, tokens[:, :-1]), tokens[:, 1:])
    return float(loss[:, -len(text) :].mean()) / math.log(2)


def order2_bits_per_byte(text: bytes, context: bytes) -> float:
    """Bits per byte of text under an order-2 model counted on context.

    p(c | ab) = (n(abc) + 4 p(c | b)) / (n(ab) + 4), and p(c | b), p(c) alike, down to
    a uniform distribution: each order is smoothed by the one below.
    """
    grams = [
        Counter(context[i : i + n] for i in range(len(context) - n + 1))
        for n in range(1, 4)
    ]

    def p(gram: bytes) -> float:
        if not gram:
            return 1 / 256
        seen = grams[len(gram) - 2][gram[:-1]] if len(gram) > 1 else len(context)
        return (grams[len(gram) - 1][gram] + 4 * p(gram[1:])) / (seen + 4)

    whole = context[-2:] + text
    bits = -sum(math.log2(p(whole[i : i + 3])) for i in range(len(whole) - 2))
    return bits / len(text)


def xz_bits(text: bytes, context: bytes) -> float:
    """Bits per byte that `xz -9` needs for text once it has packed context."""

    def packed(data):
        return len(lzma.compress(data, preset=9))

    return 8 * (packed(context + text) - packed(context)) / len(text)


def main() -> None:
    """Train, evaluate beside the baselines, and save model and record."""
    parser = argparse.ArgumentParser(
        prog="python tools/train_tiny.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    folder = args.pop("folder")

    text = corpus()
    rest, tail = text[:-TAIL], text[-TAIL:]
    print(f"{len(rest):,} bytes to train on, {len(tail):,} held out", flush=True)
    start = time.perf_counter()
    params, losses = train(TINY, rest, **args, log=partial(print, flush=True))
    record = {
        "command": "python tools/train_tiny.py FOLDER "
        + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in args.items()),
        "corpus": "standard library docstrings and pydoc_data.topics, deduplicated",
        "corpus_bytes": len(text),
        "corpus_sha256": hashlib.sha256(text).hexdigest(),
        "held_out_bytes": len(tail),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].platform,
        "date": time.strftime("%Y-%m-%d"),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "seconds": round(time.perf_counter() - start),
        "last_training_bits_per_byte": round(
            float(np.mean(losses[-200:])) / math.log(2), 4
        ),
        "held_out_bits_per_byte": {
            "model": round(bits_per_byte(params, TINY, tail, rest[-4096:]), 4),
            "xz -9, given the rest": round(xz_bits(tail, rest), 4),
            "order-2 byte model": round(order2_bits_per_byte(tail, rest), 4),
        },
        **args,
    }
    save(folder, params, TINY)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["held_out_bits_per_byte"], indent=2))


if __name__ == "__main__":
    main()
