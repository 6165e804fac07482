"""Run by test_sharding.py in processes of their own; prints errors as JSON.

sharding_runs.py eight                  on eight simulated devices
sharding_runs.py two PORT RANK          one of two processes, a device each
sharding_runs.py cards FOLDER           eight, that go on from a card and leave theirs
"""

import json
import os
import sys
import tempfile
from functools import partial
from unittest import mock

eight = sys.argv[1] != "two"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 if eight else 1}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from inputs import enable_x64, ssd_inputs
from jax.sharding import PartitionSpec
from oracle import error, ssd

import ssdlib
from ssdlib import Mamba2Config, platforms
from ssdlib.checkpoint import tensor_files
from ssdlib.compiler import cost
from ssdlib.scale import parallel, sharding

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

CASES = {  # (data, seq, model), changes of the tiny model with eight heads
    "1x8 heads": ((1, 1, 8), dict(n_groups=8, proj_bias=True, n_layers=1)),
    "2x4 heads": ((2, 1, 4), dict(n_groups=2, tie_embeddings=False, n_layers=1)),
    "8x1": ((8, 1, 1), dict(n_groups=2, n_layers=1)),
    "1x8 segments": ((1, 8, 1), dict(n_groups=2, n_layers=1)),
    "2x4 segments": ((2, 4, 1), dict(n_groups=1, time_step_limit=(0.01, 0.02))),
    "2x2x2": ((2, 2, 2), dict(n_groups=1, proj_bias=True, conv_bias=False)),
}
T = 37  # no multiple of a segment or a chunk


def disturbed(params):
    """Random values for what `init_params` leaves at one or zero."""
    rng = np.random.default_rng(1)

    def noisy(v):
        return v + np.asarray(0.1 * rng.standard_normal(v.shape), v.dtype)

    return jax.tree.map(noisy, params)


def model(shape, change):
    """Errors of prefill, of a padded prefill from there, and of two steps."""
    config = Mamba2Config.tiny(n_heads=8, **change)
    params = disturbed(ssdlib.init_params(config, jax.random.key(0)))
    mesh = sharding.make_mesh(*shape)
    here = partial(ssdlib.prefill, params, config)
    sharded = sharding.shard_by_head(params, config, mesh)
    there = partial(parallel.prefill, sharded, config, mesh)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (8, T))
    lengths = np.array([1, 2, 4, 5, 9, 20, 36, T])  # some end in the first segment
    errors = {}

    def compare(name, got, want):
        (logits, cache), (logits_star, cache_star) = got, want
        errors[name] = float(error(logits, logits_star))
        pairs = zip(cache.h, cache_star.h, strict=True)
        errors[f"{name}, states"] = float(max(error(*pair) for pair in pairs))
        return cache, cache_star

    full = np.full(8, T)
    got, want = compare("prefill", there(tokens), here(tokens, lengths=full))
    got, want = compare(
        "continued",
        there(tokens[::-1], got, lengths),
        here(tokens[::-1], want, lengths),
    )
    for t in range(2):
        got, want = compare(
            f"step {t}",
            parallel.decode_step(sharded, config, mesh, tokens[:, t], got),
            ssdlib.decode_step(params, config, tokens[:, t], want),
        )
    return errors


def spread(shape):
    """(error of forward's logits, greedy tokens equal, devices, split) for GSPMD."""
    even = jax.__version_info__ < (0, 8)  # that is all that jax 0.7 gets right
    config = Mamba2Config.tiny(n_heads=8, d_state=16 if even else 10)
    params = disturbed(ssdlib.init_params(config, jax.random.key(0)))
    mesh = sharding.make_mesh(*shape)
    there = sharding.shard_as_is(params, mesh)
    rng = np.random.default_rng(2)
    tokens, read = rng.integers(0, config.vocab_size, (2, 8, T))
    _, cache = ssdlib.prefill(params, config, read)
    split = sharding.shard_as_is(cache, mesh)
    rows = jax.device_put(tokens, jax.NamedSharding(mesh, PartitionSpec("data")))
    logits = ssdlib.forward(there, config, rows)
    logits_star = ssdlib.forward(params, config, tokens)
    got = ssdlib.generate(there, config, tokens, 24, cache=split)
    want = ssdlib.generate(params, config, tokens, 24, cache=cache)
    h, h_star = got.cache.h[0], want.cache.h[0]
    return dict(
        logits=float(error(logits, logits_star)),
        h=float(error(h, h_star)),
        tokens=bool((np.asarray(got.tokens) == np.asarray(want.tokens)).all()),
        different=len(set(map(tuple, np.asarray(want.tokens)))),
        held=h.addressable_data(0).size / h.size,
    )


def eight_bits(folder):
    """Errors of matrices in int8 on a mesh, by the way in which they came there.

    Each device finds the scale of its own part of an activation, so logits differ by
    roundings of the low byte.
    """
    change = dict(n_groups=2, tie_embeddings=False, proj_bias=True, vocab_size=62)
    config = Mamba2Config.tiny(n_heads=8, n_layers=1, **change)
    params = ssdlib.init_params(config, jax.random.key(0))
    whole = ssdlib.quantize(params)
    ssdlib.save(f"{folder}/float32", params, config)
    ssdlib.save(f"{folder}/int8", whole, config)
    mesh = sharding.make_mesh(2, 1, 4)
    tokens = np.random.default_rng(0).integers(0, 62, (8, T))
    want = ssdlib.prefill(whole, config, tokens)[0]
    spread = {
        "shard_by_head": sharding.shard_by_head(whole, config, mesh),
        "load": sharding.load(f"{folder}/float32", mesh, "int8")[0],
        "load int8": sharding.load(f"{folder}/int8", mesh, "int8")[0],
    }
    errors = {
        name: float(error(parallel.prefill(there, config, mesh, tokens)[0], want))
        for name, there in spread.items()
    }
    as_is = sharding.shard_as_is(whole, mesh), config
    errors["shard_as_is"] = float(error(ssdlib.prefill(*as_is, tokens)[0], want))
    held = [v.dtype.name for v in jax.tree.leaves(spread["load"])]
    return errors, held.count("int8")


def sent(shape, change):
    """(counted in the compiled text, formula) for prefill."""
    config = Mamba2Config.tiny(n_heads=8, vocab_size=64, **change)
    mesh = sharding.make_mesh(*shape)
    text = parallel.compile_over(config, mesh, 8, T).as_text()
    counts = {kind: total for kind, (_, total) in cost.collectives(text).items()}
    return counts, parallel.bytes_sent(config, mesh, 8, T)


def segments(regimes):
    """Errors of eight segments in float64 against the definition, whole and broken."""
    mesh = sharding.make_mesh(seq=8)
    token, whole = PartitionSpec(None, "seq"), PartitionSpec()
    specs = (token, token, whole, token, token, whole, whole)
    run = jax.shard_map(
        lambda *a: platforms.ssd_segment(*a, chunk_size=3),
        mesh=mesh,
        in_specs=specs,
        out_specs=(token, whole),
    )
    right, broken = jax.jit(run), jax.jit(lambda *a: run(*a))
    keep, errors = jax.lax.ppermute, {}

    def lose(v, axis, pairs):  # the pair from one device to the left gets lost
        return keep(v, axis, pairs[1:])

    with enable_x64(True):
        for regime in regimes:
            arrays = ssd_inputs(40, regime=regime, dtype=np.float64)
            y_star, h_star = ssd(*arrays)
            y, h = right(*arrays)
            with mock.patch.object(jax.lax, "ppermute", lose):
                y_broken, _ = broken(*arrays)
            pairs = dict(y=(y, y_star), h=(h, h_star), broken=(y_broken, y_star))
            errors[regime] = {name: error(*pair) for name, pair in pairs.items()}
    return errors


def two(port, rank):
    """Each of two processes loads its slices, reads a text and writes three bytes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    # In float64, where a wrong program can't hide behind the rounding of eight layers.
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    full, config = ssdlib.load("tiny", np.float64)
    text = np.frombuffer(b"def forward(self, x):\n    return ", np.uint8)[None]
    text = np.repeat(text.astype(np.int32), 2, axis=0)
    result = {"processes": jax.process_count(), "devices": jax.device_count()}
    read = tensor_files._read_safetensors
    for name, shape in {"heads": (1, 1, 2), "segments": (1, 2, 1)}.items():
        mesh, values = sharding.make_mesh(*shape), []

        def spy(*args, values=values):
            part = read(*args)
            values.append(part.size)
            return part

        with mock.patch.object(tensor_files, "_read_safetensors", spy):
            params, _ = sharding.load("tiny", mesh, np.float64)
        held = sum(v.addressable_data(0).size for v in jax.tree.leaves(params))
        result[f"{name}, read"] = sum(values)
        result[f"{name}, held"] = held
        got = parallel.prefill(params, config, mesh, text)
        want = ssdlib.prefill(full, config, text)
        errors = [_shard_error(got[0], want[0])]
        for _ in range(3):
            token = np.asarray(want[0]).argmax(-1)
            got = parallel.decode_step(params, config, mesh, token, got[1])
            want = ssdlib.decode_step(full, config, token, want[1])
            errors.append(_shard_error(got[0], want[0]))
        errors += map(_shard_error, got[1].h, want[1].h)
        result[f"{name}, error"] = float(max(errors))
    result["values"] = sum(v.size for v in jax.tree.leaves(full))
    return result


def _shard_error(got, want):
    """The error of what this process holds of a global array."""
    want = np.asarray(want)
    return max(error(s.data, want[s.index]) for s in got.addressable_shards)


def cards(folder):
    """Read on from the card of one device in three layouts, and save each."""
    config = Mamba2Config.tiny(n_heads=8)
    params = ssdlib.init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (8, 13))[:, ::-1]
    cache = ssdlib.load_cache(f"{folder}/one", config)
    mesh = sharding.make_mesh(2, 1, 4)
    spread = sharding.shard_as_is(params, mesh), config
    cache_there = sharding.shard_as_is(cache, mesh)
    logits, after = ssdlib.prefill(*spread, tokens, cache_there)
    ssdlib.save_cache(f"{folder}/by rows", jax.device_get(after), config)
    result = {"by rows": np.asarray(logits).tolist()}
    for name, shape in {"by heads": (2, 1, 2), "shared groups": (1, 2, 4)}.items():
        mesh = sharding.make_mesh(*shape)
        there = sharding.shard_by_head(params, config, mesh), config, mesh
        moved = parallel.scatter_cache(cache, config, mesh)
        logits, after = parallel.prefill(*there, tokens, moved)
        if name == "by heads":  # the shape is that of one device, the order is not
            try:
                ssdlib.save_cache(f"{folder}/wrong", after, config)
            except ValueError as error:
                result["refused"] = str(error)
        back = parallel.gather_cache(after, config, mesh)
        ssdlib.save_cache(f"{folder}/{name}", back, config)
        result[name] = np.asarray(logits).tolist()
    return result


if sys.argv[1] == "cards":
    result = cards(sys.argv[2])
elif eight:
    result = {name: model(*case) for name, case in CASES.items()}
    result["ssd"] = segments(("weak decay", "published", "mixed decay"))
    result["sent"] = sent(*CASES["2x2x2"])
    with tempfile.TemporaryDirectory() as folder:
        result["int8"] = eight_bits(folder)
    meshes = {"1x8": (1, 1, 8), "2x4": (2, 1, 4), "8x1": (8, 1, 1)}
    result["spread"] = {name: spread(shape) for name, shape in meshes.items()}
else:
    result = two(sys.argv[2], int(sys.argv[3]))
print(json.dumps(result))
