"""Speculation: the tokens of `generate`, or their distribution, in fewer passes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy.stats import chi2

from ssdlib import Mamba2Config, forward, generate, init_params, prefill, speculate
from ssdlib.generate import LONGEST
from ssdlib.serve import speculate as module
from ssdlib.serve.speculate import Lookup, ModelDraft

CONFIG = Mamba2Config.tiny()
PARAMS = init_params(CONFIG, jax.random.key(3))
PARAMS["embedding"] = 20 * PARAMS["embedding"]  # logits far enough apart to compare
PROMPT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 11))
LENGTHS = np.asarray([3, 0, 11])
SMALL = Mamba2Config.tiny(n_layers=1)


def noisy(params, size, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda v: v + jnp.asarray(size * rng.standard_normal(v.shape), v.dtype), params
    )


DRAFTS = {
    "lookup": None,
    "lookup of one token": Lookup(1),
    "a stranger": ModelDraft(init_params(SMALL, jax.random.key(5)), SMALL),
    "a relative": ModelDraft(noisy(PARAMS, 0.03), CONFIG),
    "the model itself": ModelDraft(PARAMS, CONFIG),
}


def same_cache(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert oracle.error(x, y) <= tolerance


# --- greedy ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k"), [(name, 4) for name in DRAFTS] + [("lookup", 1), ("a relative", 1)]
)
def test_greedy_tokens_are_those_of_generate_whoever_drafts(name, k):
    draft = DRAFTS[name]
    want = generate(PARAMS, CONFIG, PROMPT, 30)
    got = speculate(PARAMS, CONFIG, PROMPT, 30, draft=draft, k=k)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    same_cache(got.cache, want.cache)
    least = -(-30 // (k + 1))
    assert all(least <= n <= 30 for n in got.passes)
    if draft is DRAFTS["the model itself"]:  # all k proposals kept, and one more
        np.testing.assert_array_equal(got.passes, [least] * 3)
        same_cache(got.draft_cache, want.cache)


@pytest.mark.parametrize("name", ["lookup", "a relative"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 7])
def test_ragged_rows_that_end_anywhere_in_a_block_are_those_of_generate(name, at):
    free = generate(PARAMS, CONFIG, PROMPT, 30, lengths=LENGTHS)
    how = dict(lengths=LENGTHS, eos_id=int(free.tokens[0, at]))
    want = generate(PARAMS, CONFIG, PROMPT, 30, **how)
    got = speculate(PARAMS, CONFIG, PROMPT, 30, draft=DRAFTS[name], k=3, **how)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    same_cache(got.cache, want.cache)
    assert got.passes[1] == 0 and got.passes[0] < 30


@pytest.mark.parametrize("name", ["lookup", "a relative"])
@pytest.mark.parametrize("ends", [False, True], ids=["", "eos"])
def test_going_on_gives_the_tokens_of_one_call(name, ends):
    whole = generate(PARAMS, CONFIG, PROMPT, 30)
    how = dict(draft=DRAFTS[name], k=3)
    if ends:
        how |= dict(eos_id=int(whole.tokens[2, 4]))
        whole = generate(PARAMS, CONFIG, PROMPT, 30, eos_id=how["eos_id"])
    first = speculate(PARAMS, CONFIG, PROMPT, 14, **how)
    caches = dict(cache=first.cache, draft_cache=first.draft_cache)
    rest = speculate(PARAMS, CONFIG, first.tokens[:, -1:], 16, **how, **caches)
    tokens = np.concatenate([first.tokens, rest.tokens], axis=1)
    np.testing.assert_array_equal(tokens, whole.tokens)
    np.testing.assert_array_equal(first.lengths + rest.lengths, whole.lengths)
    same_cache(rest.cache, whole.cache)


def test_a_prompt_longer_than_one_piece():
    prompt = np.random.default_rng(1).integers(0, 61, (1, LONGEST + 300))
    want = generate(PARAMS, CONFIG, prompt, 12)
    got = speculate(PARAMS, CONFIG, prompt, 12, draft=DRAFTS["a relative"])
    np.testing.assert_array_equal(got.tokens, want.tokens)
    same_cache(got.cache, want.cache, 1e-4)


def test_the_lookup_copies_what_followed_the_longest_match():
    text = np.asarray([[5, 1, 2, 3, 9, 8, 7, 6, 2, 3, 4, 4, 1, 2, 3, 0, 0, 0, 0, 0]])
    end = jnp.asarray([15], jnp.int32)  # ... 1 2 3 stood at 1, 2 3 later at 8
    text = jnp.asarray(text, jnp.int32)
    tokens, q, _ = Lookup(3).propose(None, text, end, None, 4, None)
    np.testing.assert_array_equal(tokens, [[9, 8, 7, 6]])
    assert q is None
    tokens, *_ = Lookup(2).propose(None, text, end, None, 4, None)
    np.testing.assert_array_equal(tokens, [[4, 4, 1, 2]])  # the latest of two
    again = jnp.asarray([[7, 3, 4, 3, 4, 0, 0, 0, 0, 0, 0, 0]], jnp.int32)
    tokens, *_ = Lookup(3).propose(None, again, end - 10, None, 5, None)
    np.testing.assert_array_equal(tokens, [[3, 4, 3, 4, 3]])  # a period goes on


# --- sampled --------------------------------------------------------------------------

V, ROWS = 5, 20_000
FEW = Mamba2Config.tiny(vocab_size=V, n_layers=1)
MODEL = noisy(init_params(FEW, jax.random.key(1)), 0.4)
OTHER = ModelDraft(noisy(init_params(FEW, jax.random.key(2)), 0.4, seed=3), FEW)


def chance(draft, temperature, **options):
    """That exact draws differ so much from what the forward pass says they are."""
    prompt = np.broadcast_to(np.asarray([1, 3, 3, 1]), (ROWS, 4))
    how = dict(temperature=temperature, key=jax.random.key(0), **options)
    out = speculate(MODEL, FEW, prompt, 3, draft=draft, k=2, **how)
    kept = ROWS * 3 / np.asarray(out.passes).sum()
    assert 1.1 < kept < 2.9  # some proposals are kept and some are not
    counts = np.bincount(np.asarray(out.tokens) @ [V * V, V, 1], minlength=V**3)
    texts = np.stack(np.meshgrid(*[np.arange(V)] * 3, indexing="ij"), -1).reshape(-1, 3)
    whole = np.concatenate([np.broadcast_to(prompt[:1], (V**3, 4)), texts], axis=1)
    logits = np.asarray(forward(MODEL, FEW, whole), np.float64)[:, 3:6] / temperature
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if "top_k" in options:
        p = np.where(p >= np.sort(p, axis=-1)[..., -options["top_k"], None], p, 0)
        p /= p.sum(-1, keepdims=True)
    p = np.take_along_axis(p, texts[..., None], axis=-1)[..., 0].prod(axis=1)
    assert abs(p.sum() - 1) < 1e-6 and (counts[p == 0] == 0).all()
    often = p * ROWS >= 5
    rare = counts[~often].sum(), p[~often].sum() * ROWS
    seen = np.append(counts[often], rare[0] if rare[1] else [])
    want = np.append(p[often] * ROWS, rare[1] if rare[1] else [])
    statistic = ((seen - want) ** 2 / want).sum()
    return chi2.sf(statistic, len(seen) - 1)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("draft", [Lookup(2), OTHER], ids=["lookup", "model"])
def test_three_sampled_tokens_have_the_distribution_of_the_model(draft, temperature):
    assert chance(draft, temperature) > 1e-3


def test_top_k_cuts_both_distributions():
    assert chance(OTHER, 1.0, top_k=3) > 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Liar(ModelDraft):
    """Says that it drew from all tokens alike."""

    # jaxlib 0.10 holds trees of two dataclasses for equal if their fields are, and jit
    # would sometimes take the honest draft's program.
    lies: bool = dataclasses.field(default=True, metadata=dict(static=True))

    def propose(self, *args):
        tokens, q, cache = super().propose(*args)
        return tokens, jnp.full_like(q, 1 / V), cache


def test_the_chi_squared_test_sees_a_draft_that_lies_about_its_distribution():
    assert chance(Liar(OTHER.params, FEW), 0.6) < 1e-6


def test_the_same_key_gives_the_same_tokens_and_another_others():
    how = dict(temperature=0.9, draft=DRAFTS["a relative"])
    one, two, other = (
        speculate(PARAMS, CONFIG, PROMPT, 12, key=jax.random.key(s), **how).tokens
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (np.asarray(one) != other).any()
    cold = speculate(PARAMS, CONFIG, PROMPT, 12, key=jax.random.key(1), temperature=0.0)
    want = generate(PARAMS, CONFIG, PROMPT, 12)
    np.testing.assert_array_equal(cold.tokens, want.tokens)


# --- the program ----------------------------------------------------------------------


def compiled(draft, k, config, b=1, T=16):
    params = init_params(config, jax.random.key(0))
    prompt = np.ones((b, T), np.int32)
    _, cache = prefill(params, config, prompt)
    _, drafted = draft.read(None, prompt, None)
    text = np.zeros((b, T + 64 + 2 * k + 1), np.int32)
    end, options = np.full(b, T, np.int32), module.check_options(config.vocab_size)
    args = params, config, draft, cache, drafted, text, end, np.int32(64), 64, k
    return cache, module._program.lower(*args, options).compile()


@pytest.mark.parametrize("name", ["lookup of one token", "a relative"])
def test_one_loop_on_the_device_and_no_visit_to_the_host(name):
    config, draft = dataclasses.replace(CONFIG, chunk_size=32), DRAFTS[name]
    if isinstance(draft, ModelDraft):  # a pass of more than a chunk scans its chunks
        draft = ModelDraft(draft.params, config)
    _, program = compiled(draft, 4, config)
    hlo = program.as_text()
    assert len(re.findall(r" while\(", hlo)) == 1
    assert not re.findall(r" (?:infeed|outfeed|send|recv)(?:-done)?\(", hlo)
    assert "callback" not in hlo


def test_memory_does_not_grow_with_k():
    """By states, that is: a token's share is that of its activations."""
    config = Mamba2Config.tiny(n_heads=8, head_dim=64, d_state=128, chunk_size=64)
    need, ks = [], (2, 8)
    for k in ks:
        cache, program = compiled(Lookup(), k, config)
        need.append(program.memory_analysis().temp_size_in_bytes)
    assert (need[-1] - need[0]) / (ks[-1] - ks[0]) < cache.nbytes / 8


def test_a_second_call_compiles_nothing(compilations):
    speculate(PARAMS, CONFIG, PROMPT, 20)
    with compilations() as log:
        speculate(PARAMS, CONFIG, PROMPT[:, ::-1][:, :10], 18)
    assert not [name for _, name in log if name and "_speculation" in name]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), "k: 0; it must be an integer of at least 1"),
        (dict(draft="tiny"), "draft: 'tiny'; it must be a Lookup or ModelDraft"),
        (dict(draft=OTHER), "draft: a vocabulary of 5; it must be 61, as config's"),
        (dict(temperature=1.0), "key: None; sampling"),
        (dict(lengths=np.asarray([1, 2, 12])), r"lengths: 12 is outside 0\.\.11"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        speculate(PARAMS, CONFIG, PROMPT, 4, **change)
