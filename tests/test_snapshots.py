"""Caches on disk, forks, slots and ways back: each equal to a run of its own."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import enable_x64
from safetensors.numpy import load_file

import ssdlib
from ssdlib import (
    Mamba2Config,
    fork,
    generate,
    init_cache,
    init_params,
    load_cache,
    prefill,
    rewind,
    save_cache,
)
from ssdlib.__main__ import main
from ssdlib.serve import cards

CONFIG = Mamba2Config.tiny()
PARAMS = init_params(CONFIG, jax.random.key(3))
PARAMS["embedding"] = 20 * PARAMS["embedding"]  # logits far enough apart to compare
PROMPT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 11))
SAMPLED = dict(temperature=0.8, key=jax.random.key(7))
HERE = Path(__file__).parent


def same_cache(a, b, tolerance=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and oracle.error(x, y) <= tolerance


def row(cache, i):
    return jax.tree.map(lambda v: v[i : i + 1], cache)


@pytest.fixture
def card(tmp_path):
    """(its path, the cache in it, the tokens that it has not read yet)."""
    made = generate(PARAMS, CONFIG, PROMPT, 9)
    save_cache(tmp_path / "a.card", made.cache, CONFIG, PARAMS)
    return tmp_path / "a.card", made.cache, made.tokens[:, -1:]


# --- on disk --------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_saved_cache_goes_on_as_if_it_had_never_left(card, how, compilations):
    path, cache, last = card
    loaded = load_cache(path, CONFIG, PARAMS)
    same_cache(loaded, cache)
    want = generate(PARAMS, CONFIG, last, 16, cache=cache, **how).tokens
    with compilations() as log:  # nor is it another pytree to the program
        got = generate(PARAMS, CONFIG, last, 16, cache=loaded, **how).tokens
    np.testing.assert_array_equal(got, want)
    assert not [name for _, name in log if name and "_generation" in name]


def test_llama_cpp_25913_a_restored_prefix_is_not_read_again(tmp_path, monkeypatch):
    """There a restored state reported success, and then the prompt was read again."""
    config = dataclasses.replace(CONFIG, norm_eps=2e-5)  # no other test traced it
    _, cache = prefill(PARAMS, config, PROMPT)
    save_cache(tmp_path / "a", cache, config)
    question = PROMPT[:, :3][:, ::-1]
    whole = np.concatenate([PROMPT, question], axis=1)
    asked = []

    def spy(*args, **kwargs):
        asked.append(args[2].shape)
        return run(*args, **kwargs)

    run = ssdlib.model._backbone
    monkeypatch.setattr(ssdlib.model, "_backbone", spy)
    got = generate(
        PARAMS, config, question, 8, cache=load_cache(tmp_path / "a", config)
    )
    assert {T for _, T in asked} == {16, 1}  # the question's bucket, and single steps
    want = generate(PARAMS, config, whole, 8)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.cache.length, want.cache.length)


@pytest.mark.parametrize("shared", [1, 7, 8, 9, 11])
def test_vllm_25752_a_prefix_of_any_length_is_shared_by_any_number_of_requests(shared):
    """There states are cached at block borders; here a chunk border is no border."""
    _, cache = prefill(PARAMS, CONFIG, PROMPT[:1, :shared])
    for i in range(3):
        question = PROMPT[i : i + 1, : 2 + i]
        got = generate(PARAMS, CONFIG, question, 12, cache=cache)
        whole = np.concatenate([PROMPT[:1, :shared], question], axis=1)
        want = generate(PARAMS, CONFIG, whole, 12)
        np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_cache_goes_on_in_another_process_and_from_there_back(card):
    path, cache, last = card
    code = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_snapshots import *
jax.config.update("jax_default_matmul_precision", "highest")
cache, last = load_cache(sys.argv[2], CONFIG, PARAMS), np.asarray(eval(sys.argv[3]))
made = generate(PARAMS, CONFIG, last, 8, cache=cache)
save_cache(sys.argv[2], made.cache, CONFIG, PARAMS)
print(np.asarray(made.tokens).tolist())
"""
    last_text = str(np.asarray(last).tolist())
    command = [sys.executable, "-c", code, str(HERE), str(path), last_text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first = np.asarray(json.loads(done.stdout))
    back = load_cache(path, CONFIG, PARAMS)
    rest = generate(PARAMS, CONFIG, first[:, -1:], 8, cache=back)
    want = generate(PARAMS, CONFIG, last, 16, cache=cache)
    got = np.concatenate([first, rest.tokens], axis=1)
    np.testing.assert_array_equal(got, want.tokens)


def test_eight_devices_read_a_card_of_one_and_one_reads_theirs(tmp_path):
    """By rows, and by heads, where the channels of conv lie in another order."""
    config = Mamba2Config.tiny(n_heads=8)
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 61, (8, 13))
    _, cache = prefill(params, config, tokens)
    save_cache(tmp_path / "one", cache, config)
    command = [sys.executable, str(HERE / "sharding_runs.py"), "cards", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "channels of conv are split over devices" in result["refused"]
    want_logits, want = prefill(params, config, tokens[:, ::-1], cache)
    for name in ("by rows", "by heads", "shared groups"):
        back = load_cache(tmp_path / name, config)
        same_cache(back, want, 1e-5)
        assert oracle.error(np.asarray(result[name]), want_logits) < 1e-5


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_a_card_crosses_dtypes(tmp_path, name):
    """Widened it is exact; narrowed, it is what the narrow model would have kept."""
    with enable_x64(name == "float64"):
        dtype = jnp.dtype(name)
        _, cache = prefill(PARAMS, CONFIG, PROMPT, init_cache(CONFIG, 3, dtype))
        save_cache(tmp_path / "a", cache, CONFIG)
        same_cache(load_cache(tmp_path / "a", CONFIG), cache)
        wide = load_cache(tmp_path / "a", CONFIG, dtype=jnp.float32)
        assert wide.conv.dtype == wide.h[0].dtype == jnp.float32
        assert oracle.error(wide.conv, cache.conv) <= (name == "float64") * 1e-7
        narrow = load_cache(tmp_path / "a", CONFIG, dtype=jnp.bfloat16)
        assert narrow.conv.dtype == jnp.bfloat16 and narrow.h[0].dtype == jnp.float32
        same = cache.conv.astype(jnp.bfloat16)
        np.testing.assert_array_equal(narrow.conv, same)
    if name == "float64":
        with pytest.raises(ValueError, match="dtype: float64; set jax_enable_x64"):
            load_cache(tmp_path / "a", CONFIG)


def test_tokens_after_a_bfloat16_card_are_those_without_the_detour(tmp_path):
    params, config = ssdlib.load("tiny", jnp.bfloat16)
    text = np.frombuffer(b"Return the number of ", np.uint8)[None].astype(np.int32)
    first = generate(params, config, text, 5)
    save_cache(tmp_path / "a", first.cache, config, params)
    wide, _ = ssdlib.load("tiny")
    for weights in (params, wide):  # its hash is the same in both
        loaded = load_cache(tmp_path / "a", config, weights)
        want = generate(weights, config, first.tokens[:, -1:], 16, cache=first.cache)
        got = generate(weights, config, first.tokens[:, -1:], 16, cache=loaded)
        np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_card_does_not_depend_on_the_chunk_length(card):
    other = dataclasses.replace(CONFIG, chunk_size=32)
    same_cache(load_cache(card[0], other, PARAMS), card[1])


def test_a_card_of_another_model_is_refused_by_name(card, tmp_path):
    path, cache, _ = card
    fewer = Mamba2Config.tiny(n_layers=1)
    with pytest.raises(ValueError, match=r"a\.card: .* whose n_layers is 2; .* be 1"):
        load_cache(path, fewer)
    other = Mamba2Config.tiny(norm_eps=1e-6)  # the same shapes, and another function
    with pytest.raises(ValueError, match=r"whose norm_eps is 1e-05; it must be 1e-06"):
        load_cache(path, other)
    tuned = jax.tree.map(jnp.copy, PARAMS)
    tuned["layers"][1]["out"] = tuned["layers"][1]["out"].at[3, 4].add(0.01)
    with pytest.raises(ValueError, match=r"a\.card: a cache of other weights"):
        load_cache(path, CONFIG, tuned)
    save_cache(tmp_path / "unnamed", cache, CONFIG)
    with pytest.raises(ValueError, match=r"unnamed: .* weights that it does not name"):
        load_cache(tmp_path / "unnamed", CONFIG, PARAMS)
    with pytest.raises(ValueError, match=r"cache: \(conv, layers, h\) is"):
        save_cache(tmp_path / "no", cache, fewer)
    assert not (tmp_path / "no").exists()


def test_a_card_of_a_model_with_a_size_that_is_unknown_here_is_refused(
    card, tmp_path, monkeypatch
):
    sizes = cards._sizes
    monkeypatch.setattr(cards, "_sizes", lambda c: sizes(c) | {"window": "512"})
    save_cache(tmp_path / "later", card[1], CONFIG)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"whose window is 512; it must be absent"):
        load_cache(tmp_path / "later", CONFIG)


def test_what_is_no_card_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: no file nowhere"):
        load_cache(tmp_path / "nowhere", CONFIG)
    (tmp_path / "text").write_text("hello, this is no card")
    with pytest.raises(ValueError, match=r"text: not readable"):
        load_cache(tmp_path / "text", CONFIG)
    ssdlib.save(tmp_path, PARAMS, CONFIG)
    with pytest.raises(
        ValueError, match=r"its format is pt; it must be ssdlib.cache/1"
    ):
        load_cache(tmp_path / "model.safetensors", CONFIG)


def test_300_damaged_files_are_refused_or_equal(card, tmp_path):
    path, cache, _ = card
    good, rng, equal = path.read_bytes(), np.random.default_rng(0), 0
    header = 8 + int.from_bytes(good[:8], "little")
    for i in range(300):
        bad = bytearray(good)
        at = int(rng.integers(header if i % 3 == 0 else 0, len(good)))
        at = int(rng.integers(0, header)) if i % 3 == 1 else at
        match i % 5:
            case 0 | 1:
                bad[at] ^= 1 << int(rng.integers(8))
            case 2:
                bad[at] = int(rng.integers(256))
            case 3:
                del bad[at:]
            case 4:
                bad[at:at] = rng.bytes(1 + i % 9)
        (tmp_path / "bad").write_bytes(bad)
        try:
            got = load_cache(tmp_path / "bad", CONFIG, PARAMS)
        except ValueError as error:
            assert str(error).startswith("bad: ")
        else:
            same_cache(got, cache)
            equal += 1
    assert equal < 30  # of a byte set to what it was, or a space in the header


def test_a_killed_or_failed_save_leaves_the_old_file_whole(card, monkeypatch):
    path, cache, _ = card
    before = path.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("ssdlib.serve.cards.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_cache(path, fork(cache, 2), CONFIG)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.card"]


def test_the_file_has_the_same_size_after_any_text(tmp_path):
    sizes = set()
    for T in (1, 100):
        _, cache = prefill(PARAMS, CONFIG, np.ones((1, T), np.int32))
        save_cache(tmp_path / f"{T}", cache, CONFIG, PARAMS)
        sizes.add((tmp_path / f"{T}").stat().st_size)
        assert load_file(tmp_path / f"{T}")["length"] == [T]
    assert len(sizes) == 1 and sizes.pop() < cache.nbytes + 1500


def test_the_command_line_reads_a_document_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document, question = "The with statement ", "is used to "
    bytes_model = Mamba2Config.tiny(vocab_size=256, n_layers=1)
    ssdlib.save("model", init_params(bytes_model, jax.random.key(0)), bytes_model)
    options = ["--max-new-tokens", "40", "--seed", "3", "--model", "model"]
    assert main(["generate", document + question, *options]) == 0
    want = capsys.readouterr().out
    assert main(["generate", document, *options, "--save-state", "a.card"]) == 0
    text = capsys.readouterr().out
    assert main(["generate", document, *options]) == 0
    assert capsys.readouterr().out == text  # saving changes no text
    assert main(["generate", question, *options, "--load-state", "a.card"]) == 0
    assert document + capsys.readouterr().out == want
    shutil.copy("a.card", "b.card")
    more = ["--load-state", "b.card", "--save-state", "b.card"]
    assert main(["generate", question[:4], *options, *more]) == 0
    capsys.readouterr()
    assert main(["generate", question[4:], *options, "--load-state", "b.card"]) == 0
    assert document + question[:4] + capsys.readouterr().out == want
    assert main(["generate", "x", "--model", "model", "--load-state", "none"]) == 2
    assert capsys.readouterr().err == "error: path: no file none\n"


# --- branch, rewind, replace a slot ---------------------------------------------------


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("ends", [False, True], ids=["", "eos"])
def test_each_branch_of_a_fork_is_a_run_of_its_own(how, ends):
    lengths = np.asarray([3, 11, 7])
    start = generate(PARAMS, CONFIG, PROMPT, 4, lengths=lengths)
    cache = fork(start.cache, 4)
    turns = np.random.default_rng(1).integers(0, 61, (12, 5))
    real = np.arange(12) % 5 + 1
    free = generate(PARAMS, CONFIG, turns, 10, cache=cache, lengths=real, **how)
    how = how | (dict(eos_id=int(free.tokens[7, 3])) if ends else {})
    made = generate(PARAMS, CONFIG, turns, 10, cache=cache, lengths=real, **how)
    assert len({tuple(t) for t in np.asarray(made.tokens).tolist()}) > 8
    for i in range(12):
        past = row(start.cache, i // 4)
        if "key" in how:  # a row's key is that of its place in the batch
            same = jax.tree.map(lambda v: jnp.repeat(v, 12, axis=0), past)
            turn = np.repeat(turns[i : i + 1, : real[i]], 12, axis=0)
            alone = generate(PARAMS, CONFIG, turn, 10, cache=same, **how)
            np.testing.assert_array_equal(made.tokens[i], alone.tokens[i])
        else:
            turn = turns[i : i + 1, : real[i]]
            alone = generate(PARAMS, CONFIG, turn, 10, cache=past, **how)
            np.testing.assert_array_equal(made.tokens[i], alone.tokens[0])
    same_cache(row(fork(start.cache, 4), 5), row(start.cache, 1))  # row 5 is of text 1


def test_rewind_reads_at_most_k_tokens_to_any_place(monkeypatch):
    k, tokens = 4, np.random.default_rng(2).integers(0, 61, (2, 19))
    caches, cache = [], None
    for t in range(0, 19, k):
        _, cache = prefill(PARAMS, CONFIG, tokens[:, t : t + k], cache)
        caches.append(cache)
    reads = []

    def spy(*args, **kwargs):
        reads.append(args[2].shape[1])
        return prefill(*args, **kwargs)

    monkeypatch.setattr("ssdlib.serve.cards.prefill", spy)
    for position in range(20):
        reads.clear()
        got = rewind(PARAMS, CONFIG, tokens, caches, position)
        np.testing.assert_array_equal(got.length, [position] * 2)
        if position:
            lengths = np.full(2, position)  # padded: one program for all positions
            want = prefill(PARAMS, CONFIG, tokens, lengths=lengths)[1]
            same_cache(got, want, 1e-5)
        assert sum(reads) == (position % k if position < 19 else 0)
    ragged = prefill(PARAMS, CONFIG, tokens, lengths=np.asarray([3, 19]))[1]
    with pytest.raises(ValueError, match="caches: rows that have read 3 to 19 tokens"):
        rewind(PARAMS, CONFIG, tokens, [ragged], 19)
    with pytest.raises(ValueError, match=r"position: 20 is outside 0\.\.19"):
        rewind(PARAMS, CONFIG, tokens, caches, 20)


def test_a_new_prompt_in_the_slot_of_a_finished_row_disturbs_nobody():
    lengths = np.asarray([3, 11, 7])
    first = generate(PARAMS, CONFIG, PROMPT, 6, lengths=lengths)
    fresh = np.random.default_rng(5).integers(0, 61, (1, 9))
    empty = init_cache(CONFIG, 1)
    slot = jax.tree.map(lambda v, new: v.at[1].set(new[0]), first.cache, empty)
    turns = np.zeros((3, 9), np.int32)
    turns[:, 0], turns[1] = first.tokens[:, -1], fresh[0]
    made = generate(
        PARAMS, CONFIG, turns, 10, cache=slot, lengths=np.asarray([1, 9, 1])
    )
    whole = generate(PARAMS, CONFIG, PROMPT, 16, lengths=lengths)
    alone = generate(PARAMS, CONFIG, fresh, 10)
    np.testing.assert_array_equal(made.tokens[::2], whole.tokens[::2, 6:])
    np.testing.assert_array_equal(made.tokens[1], alone.tokens[0])
    same_cache(row(made.cache, 1), alone.cache, 1e-5)
