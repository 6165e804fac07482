"""Generation: one compiled program, equal to the loop a reader would write."""

import dataclasses
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import enable_x64
from jax import export
from scipy.stats import chisquare

from ssdlib import (
    Mamba2Config,
    compile_for,
    decode_step,
    forward,
    generate,
    init_cache,
    init_params,
    prefill,
    stream,
)
from ssdlib.generate import LONGEST, bucket
from ssdlib.sample import BLOCK, _keep, categorical, sample

CONFIG = Mamba2Config.tiny()
PARAMS = init_params(CONFIG, jax.random.key(3))
PARAMS["embedding"] = 20 * PARAMS["embedding"]  # logits far enough apart to compare
PROMPT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 11))
KEY = jax.random.key(7)
SAMPLERS = {
    "greedy": {},
    "temperature": dict(temperature=0.8, key=KEY),
    "top-k": dict(temperature=0.8, top_k=5, key=KEY),
    "top-p": dict(temperature=0.8, top_p=0.7, key=KEY),
    "top-k and top-p": dict(temperature=1.5, top_k=9, top_p=0.9, key=KEY),
}
each_sampler = pytest.mark.parametrize("how", SAMPLERS.values(), ids=SAMPLERS.keys())
EXTREMES = {name: SAMPLERS[name] for name in ("greedy", "top-k and top-p")}
no_limit_and_all = pytest.mark.parametrize("how", EXTREMES.values(), ids=EXTREMES)
# Most tests ask for at most 16 tokens after at most 16: their programs are the same.


def host_loop(prompt, n, cache=None):
    """Greedy decoding in Python, one call a token; the last is made and not read."""
    logits, cache = prefill(PARAMS, CONFIG, prompt, cache)
    tokens = [np.asarray(logits).argmax(-1)]
    for _ in range(n - 1):
        logits, cache = decode_step(PARAMS, CONFIG, tokens[-1], cache)
        tokens.append(np.asarray(logits).argmax(-1))
    return np.stack(tokens, axis=1), cache


def same_cache(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert oracle.error(x, y) <= tolerance


# --- what it computes -----------------------------------------------------------------


def test_the_compiled_loop_gives_the_tokens_of_a_host_loop():
    out = generate(PARAMS, CONFIG, PROMPT, 64)
    tokens, cache = host_loop(PROMPT, 64)
    assert len(np.unique(tokens)) > 5  # a constant answer would prove nothing
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.lengths, [64, 64, 64])
    same_cache(out.cache, cache)


STREAMS = [(how, 7) for how in SAMPLERS] + [
    (how, block) for how in EXTREMES for block in (1, 5, 16)
]


@pytest.mark.parametrize(("name", "block"), STREAMS)
def test_stream_gives_the_tokens_of_generate(name, block):
    how = SAMPLERS[name]
    whole = generate(PARAMS, CONFIG, PROMPT, 15, **how).tokens
    blocks = list(stream(PARAMS, CONFIG, PROMPT, 15, block=block, **how))
    assert all(b.shape[1] <= block for b in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)


@each_sampler
def test_the_same_key_gives_the_same_tokens(how):
    one = generate(PARAMS, CONFIG, PROMPT, 12, **how).tokens
    two = generate(PARAMS, CONFIG, PROMPT, 12, **how).tokens
    np.testing.assert_array_equal(one, two)
    if how:
        other = generate(
            PARAMS, CONFIG, PROMPT, 12, **(how | {"key": jax.random.key(8)})
        )
        assert (np.asarray(other.tokens) != one).any()


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 11), min_size=3, max_size=3))
def test_a_padded_row_generates_what_it_would_alone(lengths):
    out = generate(PARAMS, CONFIG, PROMPT, 16, lengths=np.asarray(lengths))
    for i, n in enumerate(lengths):
        alone = generate(PARAMS, CONFIG, PROMPT[i : i + 1, :n], 16)
        np.testing.assert_array_equal(out.tokens[i], alone.tokens[0])
        same_cache(jax.tree.map(lambda v, i=i: v[i : i + 1], out.cache), alone.cache)


def test_a_conversation_goes_on_without_reading_the_past_again():
    first = generate(PARAMS, CONFIG, PROMPT, 9)
    kept = jax.tree.map(np.asarray, first.cache)
    turn = np.concatenate([first.tokens[:, -1:], PROMPT[:, :4]], axis=1)
    reply = generate(PARAMS, CONFIG, turn, 9, cache=first.cache)
    whole = np.concatenate([PROMPT, first.tokens, PROMPT[:, :4]], axis=1)
    np.testing.assert_array_equal(
        reply.tokens, generate(PARAMS, CONFIG, whole, 9).tokens
    )
    same_cache(first.cache, kept, 0)  # the cache that was passed is intact


LENGTHS = np.asarray([3, 11, 1])


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("ends", [False, True], ids=["", "eos"])
@pytest.mark.parametrize("name", ["greedy", "top-k and top-p"])
def test_going_on_gives_the_tokens_of_one_call(name, ends, ragged):
    how, k = SAMPLERS[name] | (dict(lengths=LENGTHS) if ragged else {}), 5
    free = generate(PARAMS, CONFIG, PROMPT, 16, **how)
    if ends:  # a row ends in the first part
        how = how | {"eos_id": int(free.tokens[1, 3])}
    whole = generate(PARAMS, CONFIG, PROMPT, 16, **how)
    first = generate(PARAMS, CONFIG, PROMPT, k, **how)
    later = {name: v for name, v in how.items() if name != "lengths"}
    later |= {"cache": first.cache}
    rest = generate(PARAMS, CONFIG, first.tokens[:, -1:], 16 - k, **later)
    tokens = np.concatenate([first.tokens, rest.tokens], axis=1)
    np.testing.assert_array_equal(tokens, whole.tokens)
    np.testing.assert_array_equal(first.lengths + rest.lengths, whole.lengths)
    same_cache(rest.cache, whole.cache)
    blocks = stream(PARAMS, CONFIG, first.tokens[:, -1:], 16 - k, **later)
    blocks = np.concatenate(list(blocks), axis=1)
    np.testing.assert_array_equal(blocks, rest.tokens[:, : blocks.shape[1]])


@no_limit_and_all
def test_a_text_is_the_same_however_its_prompt_was_read(how):
    whole = generate(PARAMS, CONFIG, PROMPT, 8, **how).tokens
    _, cache = prefill(PARAMS, CONFIG, PROMPT[:, :6])
    rest = generate(PARAMS, CONFIG, PROMPT[:, 6:], 8, cache=cache, **how).tokens
    np.testing.assert_array_equal(rest, whole)


@pytest.mark.parametrize("how", [{}, SAMPLERS["temperature"]], ids=["greedy", "drawn"])
@pytest.mark.parametrize("eos_id", [None, 5])
def test_a_row_without_tokens_stays_as_it_is(how, eos_id):
    how, lengths = how | {"eos_id": eos_id}, np.asarray([11, 0, 4])
    out = generate(PARAMS, CONFIG, PROMPT, 16, lengths=lengths, **how)
    assert int(out.lengths[1]) == 0
    assert (np.asarray(out.tokens[1]) == (eos_id or 0)).all()
    for v in jax.tree.leaves(out.cache):
        assert not v[1].any()
    other = generate(
        PARAMS, CONFIG, PROMPT, 16, lengths=lengths + (lengths == 0) * 7, **how
    )
    np.testing.assert_array_equal(out.tokens[::2], other.tokens[::2])
    blocks = stream(PARAMS, CONFIG, PROMPT, 16, lengths=lengths, block=6, **how)
    blocks = np.concatenate(list(blocks), axis=1)
    np.testing.assert_array_equal(blocks, out.tokens[:, : blocks.shape[1]])


@pytest.mark.parametrize("how", [{}, SAMPLERS["temperature"]], ids=["greedy", "drawn"])
def test_a_long_prompt_is_read_in_pieces(how, monkeypatch):
    lengths = np.asarray([40, 7, 0, 16, 17, 1])
    prompt = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (6, 40))
    whole = generate(PARAMS, CONFIG, prompt, 9, lengths=lengths, **how)
    monkeypatch.setattr(sys.modules["ssdlib.generate"], "LONGEST", 16)
    cut = generate(PARAMS, CONFIG, prompt, 9, lengths=lengths, **how)
    np.testing.assert_array_equal(cut.tokens, whole.tokens)
    np.testing.assert_array_equal(cut.lengths, whole.lengths)
    same_cache(cut.cache, whole.cache)
    full = generate(PARAMS, CONFIG, prompt, 9, **how)
    np.testing.assert_array_equal(full.tokens[0], whole.tokens[0])


def test_a_row_ends_at_eos_and_the_rest_is_filled():
    free = np.asarray(generate(PARAMS, CONFIG, PROMPT, 16).tokens)
    eos = int(free[1, 6])
    out = generate(PARAMS, CONFIG, PROMPT, 16, eos_id=eos)
    for row, n, unbound in zip(out.tokens, out.lengths, free, strict=True):
        stop = list(unbound).index(eos) + 1 if eos in unbound else 16
        assert n == stop
        np.testing.assert_array_equal(row[:n], unbound[:n])
        assert (np.asarray(row)[n:] == eos).all()


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("kind", [list, tuple, np.array, jnp.array])
def test_a_row_ends_at_the_first_of_several_ids(kind):
    free = np.asarray(generate(PARAMS, CONFIG, PROMPT, 16).tokens)
    ends = [60, int(free[1, 6]), int(free[0, 9])]
    out = generate(PARAMS, CONFIG, PROMPT, 16, eos_id=kind(ends))
    stops = [
        next((t + 1 for t, i in enumerate(row) if i in ends), 16)
        for row in free.tolist()
    ]
    np.testing.assert_array_equal(out.lengths, stops)
    for row, n, unbound in zip(np.asarray(out.tokens), stops, free, strict=True):
        np.testing.assert_array_equal(row[:n], unbound[:n])
        assert (row[n:] == ends[0]).all()
    blocks = stream(PARAMS, CONFIG, PROMPT, 16, eos_id=kind(ends), block=5)
    np.testing.assert_array_equal(np.concatenate(list(blocks), 1), out.tokens)
    again = generate(
        PARAMS, CONFIG, out.tokens[:, -1:], 4, eos_id=ends, cache=out.cache
    )
    ended = np.asarray([n < 16 for n in stops])
    np.testing.assert_array_equal(np.asarray(again.lengths)[ended], 0)


def test_the_cache_of_an_ended_row_has_read_all_but_its_end():
    free = np.asarray(generate(PARAMS, CONFIG, PROMPT, 16).tokens)
    eos = int(free[1, 6])
    out = generate(PARAMS, CONFIG, PROMPT, 16, eos_id=eos)
    for i, n in enumerate(np.asarray(out.lengths)):
        read = np.concatenate([PROMPT[i], out.tokens[i, : n - 1]])[None]
        _, cache = prefill(PARAMS, CONFIG, read)
        same_cache(jax.tree.map(lambda v, i=i: v[i : i + 1], out.cache), cache)


def test_the_loop_stops_once_every_row_has_ended():
    eos = int(generate(PARAMS, CONFIG, PROMPT[:1], 1).tokens[0, 0])
    out = generate(PARAMS, CONFIG, PROMPT[:1], 500, eos_id=eos)
    assert int(out.lengths[0]) == 1
    assert (np.asarray(out.tokens) == eos).all()
    blocks = list(stream(PARAMS, CONFIG, PROMPT[:1], 500, eos_id=eos, block=4))
    assert len(blocks) == 1


# --- sampling -------------------------------------------------------------------------


@jax.jit
def draws(logits, keys, how):
    return jax.vmap(lambda key: sample(logits, key[None], **how)[0])(keys)


def frequencies(n=20_000, **how):
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.07, 0.03]]))
    return np.bincount(draws(logits, jax.random.split(KEY, n), how), minlength=5) / n


@pytest.mark.parametrize(
    ("how", "p"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        (dict(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (dict(top_k=1), [1, 0, 0, 0, 0]),
        (dict(top_k=5), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0, 0]),
        (dict(top_p=1.0), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (dict(top_p=0.01), [1, 0, 0, 0, 0]),
        (dict(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0, 0]),
    ],
)
def test_samplers_draw_from_the_distribution_they_promise(how, p):
    how = {name: jnp.asarray(v) for name, v in how.items()}
    got, p = frequencies(temperature=jnp.float32(1), **how), np.asarray(p)
    sigma = np.sqrt(p * (1 - p) / 20_000)
    assert (np.abs(got - p) <= 6 * sigma + 1e-12).all()


def test_a_draw_by_blocks_is_one_of_all_logits():
    """Over blocks of which one is empty, one is not full, and none weighs the same."""
    V, n = 3 * BLOCK + 50, 100_000
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(V) - np.linspace(0, 2, V)
    logits[rng.random(V) < 0.2] = logits[BLOCK : 2 * BLOCK] = -np.inf
    logits -= logits.max()
    p = np.exp(logits) / np.exp(logits).sum()
    keys = jax.random.split(KEY, n)
    one = partial(categorical, logits=jnp.asarray(logits, jnp.float32))
    seen = np.bincount(jax.jit(jax.vmap(one))(keys), minlength=V)
    assert seen[p == 0].sum() == 0
    real = p > 0
    assert chisquare(seen[real], n * p[real]).pvalue > 1e-4


def test_top_p_keeps_no_token_beyond_those_that_reach_it_exactly():
    logits = jnp.log(jnp.asarray([[0.3, 0.1, 0.1, 0.5]]))
    how = dict(temperature=jnp.float32(1), top_p=jnp.float32(0.8))
    assert set(np.unique(draws(logits, jax.random.split(KEY, 2000), how))) == {0, 3}


@pytest.mark.parametrize("k", [1, 2, 7, 61])
def test_of_equal_logits_top_k_keeps_the_first(k):
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 1, (4, 61)).astype(np.float32)
    kept = jax.jit(_keep)(logits, jnp.ones_like(logits), jnp.int32(k))
    kept = np.isfinite(kept)
    for row, got in zip(logits, kept, strict=True):
        want = np.sort(np.argsort(-row, kind="stable")[:k])
        np.testing.assert_array_equal(np.flatnonzero(got), want)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    rng = np.random.default_rng(0)
    for p in (0.1, 0.5, 0.9, 0.999):
        logits = 3 * rng.standard_normal((2, 500)).astype(np.float32)
        logits -= logits.max(-1, keepdims=True)
        weights = jax.nn.softmax(logits)
        enough = jnp.full(2, p, jnp.float32)
        kept = np.isfinite(jax.jit(_keep)(logits, weights, enough))
        for row, got in zip(np.asarray(weights, np.float64), kept, strict=True):
            order = np.argsort(-row)
            n = int((np.cumsum(row[order]) < p).sum()) + 1
            np.testing.assert_array_equal(np.flatnonzero(got), np.sort(order[:n]))


def flat_model(p):
    """A model whose next token is drawn from p, whatever it has read."""
    config = Mamba2Config.tiny(vocab_size=len(p), tie_embeddings=False)
    params = init_params(config, jax.random.key(0))
    params["norm"] = jnp.zeros_like(params["norm"]).at[0].set(1)
    # Every block adds nothing, so the residual is the embedding: all rows alike.
    layers = [v | {"out": jnp.zeros_like(v["out"])} for v in params["layers"]]
    params["layers"] = tuple(layers)
    params["embedding"] = jnp.ones_like(params["embedding"])
    head = jnp.zeros_like(params["head"]).at[:, 0].set(jnp.log(jnp.asarray(p)))
    return params | {"head": head}, config


LIMITS = {
    "temperature": ({}, [0.4, 0.3, 0.2, 0.1]),
    "top-k": (dict(top_k=3), [4 / 9, 3 / 9, 2 / 9, 0]),
    "top-p": (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
}


@pytest.mark.parametrize(
    ("call", "limit"), [("stream", "top-k"), *(("generate", name) for name in LIMITS)]
)
def test_consecutive_draws_are_independent_and_have_the_promised_frequencies(
    call, limit
):
    """Chi-squared over pairs of neighbors: it sees one key used twice at once."""
    params, config = flat_model([0.4, 0.3, 0.2, 0.1])
    prompt, n = np.zeros((4, 1), np.int32), 1000  # one token: no chunk to compile
    how, p = LIMITS[limit]
    how = how | dict(temperature=1.0, key=KEY)
    if call == "generate":
        tokens = np.asarray(generate(params, config, prompt, n, **how).tokens)
    else:
        tokens = np.concatenate([*stream(params, config, prompt, n, **how)], axis=1)
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (tokens[:, 0:-1:2].ravel(), tokens[:, 1::2].ravel()), 1)
    want = pairs.sum() * np.outer(p, p)
    assert (pairs[want == 0] == 0).all()
    chi2 = ((pairs - want)[want > 0] ** 2 / want[want > 0]).sum()
    freedom = np.count_nonzero(want) - 1
    assert chi2 <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "traces"),
    [
        (dict(top_k=6), 0),
        (dict(top_k=np.int64(7)), 0),
        (dict(top_p=0.5), 0),
        (dict(temperature=1.3), 0),
        (dict(key=jax.random.key(8)), 0),
        (dict(max_new_tokens=5), 0),
        (dict(max_new_tokens=np.int64(4)), 0),
        (dict(prompt=PROMPT.astype(np.uint8)), 0),
        (dict(prompt=jnp.asarray(PROMPT, jnp.int32)), 0),
        (dict(prompt=PROMPT[:, :7]), 0),
        (dict(lengths=np.asarray([4, 5, 6], np.int16)), 0),
        (dict(params=PARAMS | {"layers": list(PARAMS["layers"])}), 0),
        (dict(eos_id=np.int64(3)), 0),
        (dict(eos_id=[7]), 0),
        (dict(max_new_tokens=200), 1),  # another program: the count can see one
    ],
)
def test_a_second_call_compiles_and_traces_nothing(change, traces, compilations):
    arguments = dict(params=PARAMS, prompt=PROMPT, max_new_tokens=4)
    arguments |= dict(temperature=0.8, top_k=5, top_p=0.7, key=KEY)
    if "lengths" in change or "eos_id" in change:
        arguments |= dict(lengths=np.asarray([1, 2, 3]), eos_id=2)
    generate(config=CONFIG, **arguments)
    with compilations() as log:
        generate(config=CONFIG, **arguments | change)
    assert bool(log) == bool(traces), log


@pytest.mark.usefixtures("as_user")
def test_reading_and_stepping_again_compile_and_trace_nothing(compilations):
    lengths, lists = np.asarray([4, 5, 6]), PARAMS | {"layers": list(PARAMS["layers"])}
    _, cache = prefill(PARAMS, CONFIG, PROMPT, None, lengths)
    forward(PARAMS, CONFIG, PROMPT, lengths)
    decode_step(PARAMS, CONFIG, PROMPT[:, 0], cache)
    prefill(PARAMS, CONFIG, PROMPT, piece=4)
    with compilations() as log:
        for params, dtype in ((lists, np.int64), (PARAMS, np.uint8)):
            tokens, some = PROMPT.astype(dtype), lengths.astype(np.int16)
            forward(params, CONFIG, tokens, some)
            decode_step(params, CONFIG, tokens[:, 0], cache)
            prefill(params, CONFIG, tokens, None, some)
            prefill(params, CONFIG, tokens[:, :9], piece=4)
    assert not log


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_that_vanishes_in_float32_is_greedy(temperature):
    how = dict(temperature=temperature, key=KEY, top_k=5, top_p=0.9)
    sampled = generate(PARAMS, CONFIG, PROMPT, 8, **how).tokens
    np.testing.assert_array_equal(sampled, generate(PARAMS, CONFIG, PROMPT, 8).tokens)


def test_a_temperature_near_zero_is_greedy():
    logits = jnp.asarray([[1.0, 3.0, 2.0], [-5.0, -9.0, -7.0]])
    tokens = sample(logits, jax.random.split(KEY, 2), jnp.float32(1e-30))
    np.testing.assert_array_equal(tokens, [1, 0])


def test_temperature_sharpens():
    got = frequencies(temperature=jnp.float32(0.5))
    p = np.asarray([0.5, 0.25, 0.15, 0.07, 0.03]) ** 2
    p /= p.sum()
    assert (np.abs(got - p) <= 6 * np.sqrt(p * (1 - p) / 20_000)).all()


# --- the program ----------------------------------------------------------------------


def compiled(config, T=64, size=48, b=2, how=None):
    """The compiled program of `generate`, for a prompt of T tokens."""
    params = init_params(config, jax.random.key(0))
    cache, prompt = init_cache(config, b), np.zeros((b, T), np.int32)

    def program(params, prompt, cache, how):
        return generate(params, config, prompt, size, cache=cache, **how)

    program = jax.jit(program, donate_argnums=2)
    return program.lower(params, prompt, cache, how or {}).compile(), cache


def computations(text):
    """Name -> body of every computation in HLO text."""
    return dict(
        re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    )


def reachable(name, parts):
    """Text of a computation and of all that it calls."""
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in seen and name in parts:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", parts[name])
    return "\n".join(parts[n] for n in sorted(seen))


def decode_loops(text, size):
    """The `while` instructions that carry the (b, size) token buffer."""
    pattern = rf"= \(.*s32\[2,{size}\].*\) while\(.*body=%?([\w.\-]+)"
    return re.findall(pattern, text)


@pytest.mark.parametrize(
    ("name", "eos_id"),
    [(name, None) for name in SAMPLERS] + [(name, 3) for name in EXTREMES],
)
def test_generate_is_one_program_with_one_decode_loop(name, eos_id):
    Q, size = 37, 48  # sizes that no other dimension has
    how = SAMPLERS[name] | ({} if eos_id is None else {"eos_id": eos_id})
    program, cache = compiled(Mamba2Config.tiny(chunk_size=Q), T=96, size=size, how=how)
    text = program.as_text()
    parts = computations(text)
    loops = decode_loops(text, size)
    assert len(loops) == 1
    body = reachable(loops[0], parts)
    # the chunked prefill is in the program, and not in the loop
    assert re.search(rf"\[[\d,]*\b{Q}\b[\d,]*\]", text)
    assert not re.search(rf"\[[\d,]*\b{Q}\b[\d,]*\]", body)
    # nothing leaves the device
    opcodes = set(re.findall(r" ([a-z][a-z\-]*)\(", text))
    assert {"while", "fusion"} <= opcodes
    away = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
    assert not opcodes & (away | {"copy-start", "async-start"})
    assert set(re.findall(r'custom_call_target="([^"]+)"', text)) <= {"TopK"}
    # the cache is updated in place
    assert program.memory_analysis().alias_size_in_bytes == cache.nbytes


def test_a_longer_past_changes_neither_the_step_nor_its_memory():
    """Read 128 and 65,536 tokens, then compile the step on what they left behind."""
    config = Mamba2Config.tiny(n_layers=1, chunk_size=64)
    params = init_params(config, jax.random.key(0))
    step = jax.jit(
        lambda token, cache: decode_step(params, config, token, cache),
        donate_argnums=1,
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 65_536))
    memory = []
    for T in (128, 65_536):
        _, cache = prefill(params, config, tokens[:, :T], piece=4096)
        program = step.lower(tokens[:, 0], cache).compile()
        figures = program.memory_analysis()
        names = ("argument", "output", "temp", "alias", "generated_code")
        memory.append([getattr(figures, f"{n}_size_in_bytes") for n in names])
        assert figures.alias_size_in_bytes == cache.nbytes
    assert memory[0] == memory[1]


def test_prompt_lengths_share_a_bounded_number_of_programs(compilations):
    config = Mamba2Config.tiny(d_model=20)
    params = init_params(config, jax.random.key(0))
    for T in sorted({bucket(T) for T in range(1, 33)}):
        generate(params, config, np.zeros((1, T), np.int32), 16)
    with compilations() as log:
        for T in range(1, 33, 3):
            for n in (2, 5, 16):
                generate(params, config, np.zeros((1, T), np.int32), n)
    assert not log


def test_a_second_turn_and_all_blocks_of_a_stream_share_one_program(compilations):
    config = dataclasses.replace(CONFIG, norm_eps=3e-5)  # no other test compiled it
    with compilations() as log:
        first = generate(PARAMS, config, PROMPT, 16)
        generate(PARAMS, config, PROMPT, 16, cache=first.cache)
        list(stream(PARAMS, config, PROMPT, 40, block=16))
    made = [name for event, name in log if "backend_compile" in event]
    assert sum("_generation" in str(name) for name in made) == 2  # a prompt, a block


def test_all_blocks_of_a_stream_with_an_end_share_one_program(compilations):
    config = dataclasses.replace(CONFIG, norm_eps=4e-5)  # no other test compiled it
    with compilations() as log:
        list(stream(PARAMS, config, PROMPT, 40, block=16, eos_id=60))
    made = [name for event, name in log if "backend_compile" in event]
    assert sum("_generation" in str(name) for name in made) == 1


def test_prompts_beyond_the_longest_share_their_programs(monkeypatch, compilations):
    monkeypatch.setattr(sys.modules["ssdlib.generate"], "LONGEST", 16)
    generate(PARAMS, CONFIG, np.zeros((1, 40), np.int32), 4)
    with compilations() as log:
        for T in (17, 18, 31, 33, 65):
            generate(PARAMS, CONFIG, np.zeros((1, T), np.int32), 4)
    assert not log


def test_a_stream_stops_with_the_block_in_which_its_last_row_ends():
    free = np.asarray(generate(PARAMS, CONFIG, PROMPT[:1], 20).tokens)[0]
    at = next(t for t in range(7, 10) if free[t] not in free[:t])
    blocks = stream(PARAMS, CONFIG, PROMPT[:1], 50, block=5, eos_id=int(free[at]))
    assert len(list(blocks)) == 2


def test_buckets_hold_their_size_with_at_most_half_to_spare():
    sizes = [bucket(n) for n in range(1, LONGEST + 1)]
    assert all(n <= s for n, s in enumerate(sizes, 1))
    assert all(s <= 1.5 * n for n, s in enumerate(sizes, 1) if n > 16)
    assert len(set(sizes)) == 16


# --- inside another program -----------------------------------------------------------


@no_limit_and_all
def test_generate_can_be_compiled_with_all_arguments_traced(how):
    lengths = np.asarray([11, 3, 1])
    names = sorted(how)
    program = jax.jit(
        lambda params, prompt, lengths, values: generate(
            params,
            CONFIG,
            prompt,
            12,
            lengths=lengths,
            **dict(zip(names, values, strict=True)),
        )
    )
    got = program(PARAMS, PROMPT, lengths, [how[name] for name in names])
    want = generate(PARAMS, CONFIG, PROMPT, 12, lengths=lengths, **how)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    same_cache(got.cache, want.cache)


@no_limit_and_all
def test_generate_can_be_mapped_over_prompts(how):
    prompts = np.stack([PROMPT, PROMPT[::-1]])
    mapped = jax.vmap(lambda p: generate(PARAMS, CONFIG, p, 12, **how).tokens)(prompts)
    for prompt, tokens in zip(prompts, mapped, strict=True):
        alone = generate(PARAMS, CONFIG, prompt, 12, **how).tokens
        np.testing.assert_array_equal(tokens, alone)


def test_generate_can_be_mapped_over_keys_and_parameters():
    keys = jax.random.split(KEY, 3)
    how = dict(temperature=0.8, top_k=5)
    draw = jax.vmap(lambda k: generate(PARAMS, CONFIG, PROMPT, 6, key=k, **how).tokens)
    for key, tokens in zip(keys, draw(keys), strict=True):
        alone = generate(PARAMS, CONFIG, PROMPT, 6, key=key, **how).tokens
        np.testing.assert_array_equal(tokens, alone)
    both = jax.tree.map(lambda v: jnp.stack([v, v]), PARAMS)
    tokens = jax.vmap(lambda p: generate(p, CONFIG, PROMPT, 6).tokens)(both)
    alone = generate(PARAMS, CONFIG, PROMPT, 6).tokens
    np.testing.assert_array_equal(tokens[1], alone)


def test_generate_can_be_exported():
    program = jax.jit(lambda params, p: generate(params, CONFIG, p, 12).tokens)
    exported = export.export(program, platforms=["cpu", "tpu", "cuda"])(
        PARAMS, jnp.asarray(PROMPT, jnp.int32)
    )
    got = exported.call(PARAMS, jnp.asarray(PROMPT, jnp.int32))
    np.testing.assert_array_equal(got, generate(PARAMS, CONFIG, PROMPT, 12).tokens)


def test_generate_can_be_compiled_for_a_chip():
    prompt = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    program = compile_for(generate, PARAMS, CONFIG, prompt, 16)
    assert program.flops > 0
    assert not program.custom_calls


# --- bad input ------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt=PROMPT[:, :0]), r"prompt: shape \(3, 0\) holds nothing"),
        (dict(prompt=PROMPT[0]), r"prompt: shape \(11,\); it must be \(b, T\)"),
        (dict(prompt=PROMPT * 1.0), "prompt: dtype float.*; it must hold integers"),
        (dict(prompt=PROMPT + 61), r"prompt: \d+ is outside 0\.\.60"),
        (dict(prompt=PROMPT - 61), r"prompt: -\d+ is outside 0\.\.60"),
        (dict(max_new_tokens=0), "max_new_tokens: 0; it must be an integer of at leas"),
        (dict(max_new_tokens=-5), "max_new_tokens: -5"),
        (dict(max_new_tokens=2.5), r"max_new_tokens: 2\.5"),
        (dict(lengths=np.asarray([1, 2, -3])), r"lengths: -3 is outside 0\.\.11"),
        (dict(lengths=np.asarray([1, 2, 12])), r"lengths: 12 is outside 0\.\.11"),
        (dict(lengths=np.asarray([1, 2])), r"lengths: shape \(2,\); it must be \(3\)"),
        (dict(temperature=-1.0), r"temperature: -1\.0; it must be 0 or more"),
        (dict(temperature=float("nan")), "temperature: nan"),
        (dict(temperature=1.0), "key: None; sampling"),
        (dict(temperature=1.0, key=KEY, top_k=62), r"top_k: 62 is outside 1\.\.61"),
        (dict(temperature=1.0, key=KEY, top_k=0), r"top_k: 0 is outside 1\.\.61"),
        (dict(temperature=1.0, key=KEY, top_p=0.0), r"top_p: 0\.0; it must be above 0"),
        (dict(temperature=1.0, key=KEY, top_p=1.1), r"top_p: 1\.1"),
        (dict(eos_id=[3, 61]), r"eos_id: 61 is outside 0\.\.60"),
        (dict(eos_id=[]), "eos_id: "),
        (dict(eos_id=[[3]]), r"eos_id: shape \(1, 1\); it must be \(n\)"),
        (dict(eos_id=61), r"eos_id: 61 is outside 0\.\.60"),
        (dict(eos_id=-1), "eos_id: -1 is outside"),
        (dict(cache=init_cache(CONFIG, 2)), "cache: .* this model and batch need"),
    ],
)
def test_bad_arguments_are_named(function, change, message):
    arguments = dict(prompt=PROMPT, max_new_tokens=4) | change
    with pytest.raises(ValueError, match=message):
        function(PARAMS, CONFIG, **arguments)


@pytest.mark.usefixtures("as_user")
def test_a_bad_block_is_named_at_the_call():
    with pytest.raises(ValueError, match="block: 0; it must be an integer of at"):
        stream(PARAMS, CONFIG, PROMPT, 4, block=0)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("how", [{}, SAMPLERS["top-k and top-p"]], ids=["", "drawn"])
def test_lengths_of_any_integers_work_in_double_precision(how, dtype):
    lengths = np.asarray([3, 11, 0], dtype)
    want = generate(PARAMS, CONFIG, PROMPT, 5, lengths=lengths, eos_id=2, **how)
    with enable_x64(True):
        got = generate(PARAMS, CONFIG, PROMPT, 5, lengths=lengths, eos_id=2, **how)
        prefill(PARAMS, CONFIG, PROMPT, None, lengths, piece=4)
        forward(PARAMS, CONFIG, PROMPT, lengths)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.usefixtures("as_user")
def test_a_raw_key_of_the_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"key: uint32 of shape \(3,\)"):
        generate(PARAMS, CONFIG, PROMPT, 4, temperature=1.0, key=np.zeros(3, np.uint32))
    raw = generate(
        PARAMS, CONFIG, PROMPT, 4, temperature=1.0, key=jax.random.PRNGKey(7)
    )
    new = generate(PARAMS, CONFIG, PROMPT, 4, temperature=1.0, key=KEY)
    np.testing.assert_array_equal(raw.tokens, new.tokens)


def test_a_stream_keeps_the_settings_of_the_thread_that_asks_for_it():
    """Two programs are compiled side by side; a setting of JAX belongs to a thread."""
    with enable_x64(True):
        params = init_params(CONFIG, jax.random.key(3), jnp.float64)
        blocks = list(stream(params, CONFIG, PROMPT, 20, block=8))
        whole = generate(params, CONFIG, PROMPT, 20).tokens
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)


def test_lengths_may_be_traced_where_a_long_prompt_is_not(monkeypatch):
    monkeypatch.setattr(sys.modules["ssdlib.generate"], "LONGEST", 8)

    def made(lengths):
        return generate(PARAMS, CONFIG, PROMPT, 3, lengths=lengths).tokens

    lengths = np.array([11, 5, 9])
    np.testing.assert_array_equal(jax.jit(made)(lengths), made(lengths))


def test_a_wrong_number_of_tokens_is_named_before_the_prompt_is_read(monkeypatch):
    module = sys.modules["ssdlib.generate"]
    monkeypatch.setattr(module, "LONGEST", 8)
    monkeypatch.setattr(module, "prefill", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="max_new_tokens: 0"):
        generate(PARAMS, CONFIG, PROMPT, 0)
