"""Perplexity in pieces is the perplexity of the whole."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdlib import Mamba2Config, forward, init_params, load
from ssdlib.__main__ import main
from ssdlib.cache import init_cache
from ssdlib.evaluate import Evaluation, _score, evaluate, next_token_loss

CONFIG = Mamba2Config.tiny()
PARAMS = init_params(CONFIG, jax.random.key(0))
PARAMS["embedding"] = 20 * PARAMS["embedding"]  # far from uniform
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 50)


LOGITS = np.asarray(forward(PARAMS, CONFIG, TOKENS[None])[0], np.float64)


def one_pass(n):
    """-Σ log p of the first n tokens, in float64, from the logits of a single pass."""
    log_p = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    return -log_p[np.arange(n - 1), TOKENS[1:n]].sum()


@settings(max_examples=12, deadline=None)
@given(piece=st.sampled_from([1, 7, 49, 64]), n=st.integers(2, 50))
def test_any_piece_size_gives_the_sum_of_a_single_pass(piece, n):
    result = evaluate(PARAMS, CONFIG, TOKENS[:n], piece)
    want = one_pass(n)
    assert result.tokens == n - 1
    assert abs(result.nats - want) <= 2e-6 * abs(want)
    assert math.isclose(result.perplexity, math.exp(want / (n - 1)), rel_tol=1e-4)


def test_forgetting_the_state_between_pieces_would_be_seen(monkeypatch):
    monkeypatch.setattr(
        "ssdlib.evaluate._score",
        lambda *args: (_score(*args)[0], init_cache(CONFIG, 1)),
    )
    want = one_pass(50)
    assert abs(evaluate(PARAMS, CONFIG, TOKENS, 10).nats - want) > 1e-3 * want


def test_memory_does_not_grow_with_the_text():
    """One compiled program, whatever the length (one token alone has its own)."""
    _score.clear_cache()
    for n in (3, 17, 50):
        evaluate(PARAMS, CONFIG, TOKENS[:n], piece=16)
    assert _score._cache_size() == 1


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("tokens", "piece", "message"),
    [
        (TOKENS[:1], 4, "tokens: 1 of them"),
        (TOKENS[None], 4, r"tokens: shape \(1, 50\); it must be \(T\)"),
        (TOKENS + 60, 4, r"tokens: \d+ is outside 0\.\.60"),
        (TOKENS, 0, "piece: 0; it must be an integer of at least 1"),
    ],
)
def test_bad_input_is_named(tokens, piece, message):
    with pytest.raises(ValueError, match=message):
        evaluate(PARAMS, CONFIG, tokens, piece)


def test_the_command_reports_loss_perplexity_and_bits_per_byte(tmp_path, capsys):
    text = "The with statement is used to wrap the execution of a block. naïve ☃\n" * 5
    (tmp_path / "text").write_bytes(text.encode())
    assert main(["evaluate", "--text", str(tmp_path / "text")]) == 0
    out = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    want = evaluate(*load("tiny"), tokens)
    assert int(out["tokens scored"]) == len(text.encode()) - 1
    assert math.isclose(float(out["nats per token"]), want.loss, rel_tol=1e-5)
    assert math.isclose(float(out["perplexity"]), want.perplexity, rel_tol=1e-4)
    bits = want.loss / math.log(2)  # a token is a byte
    assert math.isclose(float(out["bits per byte"]), bits, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "text: .* has 0 tokens; it needs 2 or more"),
        (b"\xff\xfe\xff", "text: .* is not UTF-8"),
    ],
)
def test_the_command_names_a_text_that_cannot_be_used(tmp_path, capsys, data, message):
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    assert main(["evaluate", "--text", str(tmp_path / "text")]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_a_target_that_is_no_token_is_named_or_nan():
    logits, targets = jnp.zeros((1, 2, 9)), jnp.array([[3, -100]])
    with pytest.raises(ValueError, match="targets: -100"):
        next_token_loss(logits, targets)
    loss = jax.jit(next_token_loss)(logits, targets)
    assert np.isfinite(loss[0, 0]) and np.isnan(loss[0, 1])


def test_the_perplexity_of_what_is_no_number_is_none():
    assert math.isnan(Evaluation(1, math.nan).perplexity)
    assert Evaluation(1, 710.0).perplexity == math.inf


@pytest.mark.parametrize("text", ["é", "€a"])
def test_half_a_character_is_a_part_of_the_bytes_scored(tmp_path, capsys, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert main(["evaluate", "--text", str(path), "--no-compile-cache"]) == 0
    told = capsys.readouterr().out
    n, nats = (float(re.search(f"{k} +(.*)", told)[1]) for k in ("scored", "token"))
    bits = float(re.search("byte +(.*)", told)[1])
    assert n == len(text.encode()) - 1
    assert math.isclose(bits, nats / math.log(2), rel_tol=1e-5)
