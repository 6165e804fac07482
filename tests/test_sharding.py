"""Many devices compute what one does, and send what the formula says."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssdlib
from ssdlib import Mamba2Config
from ssdlib.companion import notebook
from ssdlib.compiler import cost, hlo
from ssdlib.compiler import text as hlo_text
from ssdlib.compiler.targets import tpu_slice
from ssdlib.scale import parallel, sharding

RUNS = Path(__file__).parent / "sharding_runs.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu"
)
CASES = "1x8 heads", "2x4 heads", "8x1", "1x8 segments", "2x4 segments", "2x2x2"
# As Mamba-Codestral-7B: 8 groups, 64 layers.
SEVEN = Mamba2Config(
    vocab_size=32768,
    d_model=4096,
    n_layers=64,
    n_heads=128,
    n_groups=8,
    tie_embeddings=False,
)
SMALL = Mamba2Config(
    vocab_size=256, d_model=128, n_layers=1, n_heads=16, n_groups=8, chunk_size=32
)


def start(*args):
    """A process of its own: how many devices there are is fixed when JAX starts."""
    env = os.environ | {"PYTHONPATH": str(Path(ssdlib.__file__).parent.parent)}
    command = [sys.executable, str(RUNS), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def result(process):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def eight():
    return result(start("eight"))


@pytest.fixture(scope="module")
def two():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [result(p) for p in [start("two", port, rank) for rank in (0, 1)]]


# --- the same result -----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_one_in_prefill_padding_and_decode(eight, case):
    assert len(eight[case]) == 8
    for what, error in eight[case].items():
        assert error <= 1e-6, what


@pytest.mark.parametrize("regime", ["weak decay", "published", "mixed decay"])
def test_segments_combined_across_devices_equal_the_definition(eight, regime):
    errors = eight["ssd"][regime]
    assert errors["y"] <= 1e-12
    assert errors["h"] <= 1e-12


@pytest.mark.parametrize("regime", ["weak decay", "published", "mixed decay"])
def test_the_check_fails_when_one_state_gets_lost(eight, regime):
    assert eight["ssd"][regime]["broken"] > 1e-3


@pytest.mark.parametrize("mesh", ["1x8", "2x4", "8x1"])
def test_forward_and_generate_run_on_a_mesh_as_they_are(eight, mesh):
    """Parameters and a cache that has read something are spread; the code is the same.

    Every device holds an eighth of the state, before the loop and after it.
    """
    run = eight["spread"][mesh]
    assert run["logits"] <= 1e-6
    assert run["h"] <= 1e-6
    assert run["tokens"] and run["different"] > 1
    assert run["held"] == 1 / 8


def test_matrices_of_eight_bits_are_split_with_their_scales(eight):
    errors, matrices = eight["int8"]
    assert matrices == 4  # in, out, embedding, head
    assert set(errors) == {"shard_by_head", "load", "load int8", "shard_as_is"}
    assert max(errors.values()) <= 5e-4, errors


@pytest.mark.parametrize("what", ["heads", "segments"])
def test_two_processes_load_their_slices_and_equal_one(two, what):
    for run in two:
        assert (run["processes"], run["devices"]) == (2, 2)
        assert run[f"{what}, error"] <= 1e-6  # decays stay float32: about 3e-8


def test_a_process_reads_exactly_the_values_that_it_holds(two):
    for run in two:
        assert run["segments, read"] == run["segments, held"] == run["values"]
        assert run["heads, read"] == run["heads, held"]
        assert run["heads, held"] < 0.6 * run["values"]


# --- what is sent --------------------------------------------------------------------


def test_the_formula_counts_what_the_compiled_program_sends(eight):
    counted, formula = eight["sent"]
    assert counted == formula


def sent(config, mesh, b, T, dtype=jnp.float32):
    """Bytes by kind in the compiled text; they are those of the formula."""
    text = parallel.compile_over(config, mesh, b, T, dtype).as_text()
    counts = {kind: total for kind, (_, total) in cost.collectives(text).items()}
    assert counts == parallel.bytes_sent(config, mesh, b, T, jnp.dtype(dtype).itemsize)
    return counts


@needs_libtpu
def test_a_record_keeps_what_is_sent(tmp_path, monkeypatch):
    """Of a text too long for a record the collectives stay, and count the same."""
    monkeypatch.setattr(hlo, "RECORDS", tmp_path)
    monkeypatch.setenv("SSDLIB_RECORD", "1")
    config = replace(SMALL, n_layers=2)
    args = "pair", "v6e:2x4", (2, 1, 4), config, 4, 1
    live = notebook.compiled_over(*args)
    assert len(hlo_text.strip(live.hlo)) > 80_000
    monkeypatch.delenv("SSDLIB_RECORD")
    kept = notebook.compiled_over(*args, live=False)
    assert len(kept.hlo) < 30_000
    assert cost.collectives(kept.hlo) == cost.collectives(live.hlo) != {}
    assert kept.memory == live.memory


@needs_libtpu
def test_on_v6e_segments_send_states_however_long_they_are():
    mesh = sharding.make_mesh(seq=8, devices=tpu_slice("v6e:2x4"))
    short, long = (sent(SMALL, mesh, 1, T) for T in (8 * 32, 8 * 96))
    assert short == long
    state = 4 * SMALL.n_heads * SMALL.head_dim * SMALL.d_state
    assert short["collective-permute"] < 5 * state  # three rounds, one shift, a little


@needs_libtpu
def test_on_v6e_heads_send_one_residual_a_layer():
    mesh = sharding.make_mesh(data=2, model=4, devices=tpu_slice("v6e:2x4"))
    for L in (1, 2):
        counts = sent(replace(SMALL, n_layers=L), mesh, 4, 1, jnp.bfloat16)
        assert counts == {"all-reduce": (L + 1) * 4 * 2 * SMALL.d_model}


@needs_libtpu
def test_256_chips_run_one_program_with_segments_and_heads():
    mesh = sharding.make_mesh(seq=16, model=16, devices=tpu_slice("v6e:16x16"))
    assert mesh.size == 256
    counts = sent(SMALL, mesh, 1, 16 * 32)
    assert set(counts) == {"all-reduce", "collective-permute"}
    sent(SMALL, mesh, 1, 1)


@needs_libtpu
def test_a_model_of_7b_with_8_groups_fits_a_v6e_slice():
    """Two layers are compiled; a layer's weights and cache are added for the rest."""
    mesh = sharding.make_mesh(model=8, devices=tpu_slice("v6e:2x4"))
    b = 8
    bytes_ = []
    for L in (1, 2):
        config = replace(SEVEN, n_layers=L)
        stats = parallel.compile_over(
            config, mesh, b, 1, jnp.bfloat16
        ).memory_analysis()
        new = stats.output_size_in_bytes - stats.alias_size_in_bytes
        bytes_.append(stats.argument_size_in_bytes + stats.temp_size_in_bytes + new)
    total = bytes_[0] + (SEVEN.n_layers - 1) * (bytes_[1] - bytes_[0])
    shapes = jax.eval_shape(
        lambda: ssdlib.init_params(SEVEN, jax.random.key(0), jnp.bfloat16)
    )
    weights = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(shapes))
    assert 7e9 < sum(v.size for v in jax.tree.leaves(shapes)) < 8e9
    assert weights / 8 < total < 1.5 * weights / 8
    assert total < 0.1 * ssdlib.compiler.chips.CHIPS["tpu-v6e"].memory


# --- layout and bad input ------------------------------------------------------------


@pytest.mark.parametrize(("G", "n"), [(1, 8), (2, 8), (8, 8), (8, 2), (2, 1)])
def test_every_row_of_W_in_has_its_device(G, n):
    """z, x, dt of a head on one device, B and C with them, in the model's order."""
    config = Mamba2Config.tiny(n_heads=8, n_groups=G)
    mesh = jax.sharding.AbstractMesh((1, 1, n), ("data", "seq", "model"))
    d, GN, N = config.d_inner, G * config.d_state, config.d_state
    for i in range(n):
        (z0, z1), x, *groups, dt = sharding._rows(config, mesh, "in", i)
        heads = range(z0 // config.head_dim, z1 // config.head_dim)
        assert len(heads) == 8 // n
        assert x == (d + z0, d + z1)
        start_dt = 2 * d + 2 * GN
        assert dt == (start_dt + heads.start, start_dt + heads.stop)
        want = sorted({head * G // 8 for head in heads})
        for (first, last), start_ in zip(groups, (2 * d, 2 * d + GN), strict=True):
            assert list(range((first - start_) // N, (last - start_) // N)) == want


@pytest.mark.usefixtures("as_user")
def test_a_mesh_that_does_not_fit_is_named():
    def mesh(data, model):
        return jax.sharding.AbstractMesh((data, 1, model), ("data", "seq", "model"))

    for heads, groups, n in ((8, 2, 3), (12, 4, 6), (4, 1, 8)):
        config = Mamba2Config.tiny(n_heads=heads, n_groups=groups)
        with pytest.raises(ValueError, match=rf"mesh: model = {n}; it must divide"):
            sharding.local_config(config, mesh(1, n))
    config, token = Mamba2Config.tiny(), np.zeros(3, np.int32)
    calls = (
        lambda: parallel.prefill(None, config, mesh(2, 1), token[:, None]),
        lambda: parallel.decode_step(None, config, mesh(2, 1), token, None),
        lambda: sharding.init_cache(config, mesh(2, 1), 3),
        lambda: sharding.shard_as_is(ssdlib.init_cache(config, 3), mesh(2, 1)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"mesh: data = 2; .* batch size 3"):
            call()


@pytest.mark.usefixtures("as_user")
def test_what_is_no_mesh_and_what_is_no_tree_is_named():
    config = Mamba2Config.tiny()
    params, cache = ssdlib.init_params(config, jax.random.key(0)), "cache"
    rows = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
    for wrong, was in (("mesh", "'mesh'"), (None, "None"), (rows, r"axes \('rows',\)")):
        message = f"mesh: {was}; it must have the axes data, seq, model"
        for call in (
            lambda wrong=wrong: sharding.shard_as_is(params, wrong),
            lambda wrong=wrong: sharding.shard_by_head(params, config, wrong),
            lambda wrong=wrong: sharding.init_cache(config, wrong, 1),
            lambda wrong=wrong: sharding.load("tiny", wrong),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="tree: 'cache'; it must be what init_params"):
        sharding.shard_as_is(cache, sharding.make_mesh())
    many = len(jax.devices()) + 1
    with pytest.raises(ValueError, match=rf"devices: {many - 1}; .* 1 x 1 x {many}"):
        sharding.make_mesh(model=many)
    with pytest.raises(ValueError, match="data: -1; it must be an integer"):
        sharding.make_mesh(data=-1)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("sizes", [{"n_heads": 8}, {"n_heads": 12, "d_state": 16}])
def test_a_split_that_jax_0_7_gets_wrong_is_refused_there(monkeypatch, sizes):
    """Its logits are 1e-3 to 1 off; the newer ones are right (the runs on a mesh)."""
    config = Mamba2Config.tiny(**sizes)
    params = ssdlib.init_params(config, jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((1, 1, 8), ("data", "seq", "model"))
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    for tree in (params, ssdlib.init_cache(config, 1)):
        with pytest.raises(ValueError, match=r"model = 8; jax 0.7 .* divides the"):
            sharding.shard_as_is(tree, mesh)


@pytest.mark.usefixtures("as_user")
def test_parameters_and_caches_of_another_layout_are_named():
    """Rows of xBC in the model's order would fit, and compute something else."""
    config, token = Mamba2Config.tiny(), np.zeros(3, np.int32)
    params = ssdlib.init_params(config, jax.random.key(0))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"params: .* from shard_by_head"):
        parallel.prefill(params, config, mesh, token[:, None])
    sharded = sharding.shard_by_head(params, config, mesh)
    cache = ssdlib.init_cache(config, 2)
    with pytest.raises(ValueError, match=r"cache: .* this mesh and batch need"):
        parallel.decode_step(sharded, config, mesh, token, cache)


@pytest.mark.usefixtures("as_user")
def test_a_checkpoint_without_slices_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    params, config = ssdlib.load("tiny")
    ssdlib.save(tmp_path, params, config)
    file = tmp_path / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin: no slices; convert it"):
        sharding.load(tmp_path, sharding.make_mesh())
