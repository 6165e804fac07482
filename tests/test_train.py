"""Training, its corpus, its baselines, and the record of the model that ships."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from train_tiny import (
    bits_per_byte,
    loss,
    order2_bits_per_byte,
    train,
    xz_bits,
)

import ssdlib
from ssdlib import Mamba2Config, init_params, load
from ssdlib.companion.corpus import corpus

SMALL = Mamba2Config.tiny(vocab_size=256, d_model=32, chunk_size=16)
TINY = Path(ssdlib.__file__).parent / "tiny"


def test_a_short_run_learns_and_is_reproducible():
    text = b"the quick brown fox jumps over the lazy dog. " * 40
    lines = []
    how = dict(batch_size=4, length=32, log_every=10, log=lines.append)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its step count
        params, losses = train(SMALL, text, 30, **how)
        again, _ = train(SMALL, text, 30, **how)
    assert losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert losses[-1] < losses[0] - 1.5
    assert len(lines) == 2 * 3
    assert "bits/byte" in lines[0]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_is_the_mean_surprise():
    params = init_params(SMALL, jax.random.key(0))
    text = bytes(range(65, 91))
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)[None]
    bits = bits_per_byte(params, SMALL, text[1:], text[:1])
    assert float(loss(params, SMALL, tokens)) / math.log(2) == pytest.approx(bits)


def test_text_too_short_to_train_on_is_named():
    with pytest.raises(ValueError, match="text: 3 bytes; it must exceed length = 512"):
        train(SMALL, b"abc", 1)


def test_baselines_on_texts_with_known_answers():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 60_000, dtype=np.uint8).tobytes()
    assert order2_bits_per_byte(noise[-5000:], noise[:-5000]) >= 8
    assert xz_bits(noise[-5000:], noise[:-5000]) >= 8
    abc = b"abc" * 5000
    assert order2_bits_per_byte(abc[-3000:], abc[:-3000]) < 0.01
    assert xz_bits(abc[-3000:], abc[:-3000]) < 0.1


def test_the_corpus_is_text_and_the_same_each_time():
    text = corpus()
    assert len(text) > 1_000_000
    assert text == corpus()
    assert b"The with statement is used to wrap the execution of a block" in b" ".join(
        text.replace(b'"', b"").split()
    )
    paragraphs = [p for p in text.replace(b"\0", b"\n\n").split(b"\n\n") if p.split()]
    assert len({b" ".join(p.split()) for p in paragraphs}) >= 0.999 * len(paragraphs)


def test_the_shipped_model_beats_its_baseline_as_recorded():
    """On the held-out tail itself where this Python has the corpus of the record."""
    record = json.loads((TINY / "training.json").read_text())
    bits = record["held_out_bits_per_byte"]
    assert bits["model"] < 2.2
    assert bits["model"] < bits["order-2 byte model"]
    assert (TINY / "model.safetensors").stat().st_size < 6_000_000
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert all(f"{value:.2f}" in readme for value in bits.values())
    params, config = load("tiny")
    assert record["parameters"] == sum(p.size for p in jax.tree.leaves(params))
    text = corpus()
    n = record["held_out_bytes"]
    rest, tail = text[:-n], text[-n:]
    measured = bits_per_byte(params, config, tail[:8192], rest[-2048:])
    assert measured < 2.2
    assert measured < order2_bits_per_byte(tail[:8192], rest)
