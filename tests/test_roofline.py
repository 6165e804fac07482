"""Work counted by hand against the work that the compiler counts.

The compiler counts what it runs. So these programs are those of a CPU or an L40S, where
a step in float32 has no padded rows, and the formulas get the chunks that a CPU takes.
"""

import dataclasses
import importlib.util
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest

import ssdlib
from ssdlib.compiler.chips import CHIPS, Chip
from ssdlib.compiler.hlo import compile_for
from ssdlib.measure import roofline
from ssdlib.measure.roofline import Work
from ssdlib.params import PRESETS
from ssdlib.platforms import LONGEST_CHUNK


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def model(config, b, dtype=jnp.float32):
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda: (
            ssdlib.init_params(config, key, dtype),
            ssdlib.init_cache(config, b, dtype),
        )
    )


def all_layers(config, count):
    """Counts of 1 and 2 layers give that of all: layers are alike."""
    one, two = (count(dataclasses.replace(config, n_layers=n)) for n in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def step_flops(b, config):
    params, cache = model(config, b)
    fn = jax.jit(ssdlib.decode_step, static_argnums=1)
    return fn.lower(params, config, struct(b, dtype=int), cache).cost_analysis()[
        "flops"
    ]


def prefill_flops(b, T, config):
    params, cache = model(config, b)
    fn = jax.jit(ssdlib.prefill, static_argnums=1)
    lowered = fn.lower(params, config, struct(b, T, dtype=int), cache)
    return lowered.cost_analysis()["flops"]


def layer_args(config, b, T):
    H, P, N, G = config.n_heads, config.head_dim, config.d_state, config.n_groups
    BC = struct(b, T, G, N)
    return (struct(b, T, H, P), struct(b, T, H), struct(H), BC, BC, None,
            struct(b, H, P, N))  # fmt: skip


def on_cpu(config):
    """The config with the chunk length of a prefill on a CPU."""
    return dataclasses.replace(config, chunk_size=LONGEST_CHUNK["cpu"])


def close(ours, theirs, tolerance=0.05):
    return abs(ours / theirs - 1) < tolerance


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_and_arguments_are_exact(preset):
    config = ssdlib.Mamba2Config.preset(preset)
    for changes in ({}, dict(proj_bias=True, tie_embeddings=False, conv_bias=False)):
        config = dataclasses.replace(config, n_layers=3, **changes)
        params, _ = model(config, 1)
        sizes = sum(v.size for v in jax.tree.leaves(params))
        assert sum(roofline.parameters(config).values()) == sizes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_more_row_moves_its_cache_twice_and_its_logits_once(dtype):
    config = ssdlib.Mamba2Config.preset("370m")
    size = jnp.dtype(dtype).itemsize
    one, two = (roofline.decode(config, b, size).bytes for b in (1, 2))
    _, row = model(config, 1, dtype)
    cache = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves((row.conv, row.h)))
    assert two - one == 2 * cache + 4 * config.vocab_size
    one, two = (roofline.prefill(config, b, 256, size).bytes for b in (1, 2))
    assert two - one == cache + 4 * config.vocab_size


@pytest.mark.parametrize("preset", PRESETS)
def test_decode_flops_are_within_5_percent_of_the_compilers(preset):
    config = ssdlib.Mamba2Config.preset(preset)
    for b in (1, 8):
        theirs = all_layers(config, partial(step_flops, b))
        assert close(roofline.decode(config, b).flops, theirs)
    weights = 2 * sum(roofline.parameters(config).values())
    assert close(roofline.decode(config, 1).flops, weights, 0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_flops_are_within_5_percent_of_the_compilers(preset):
    """One chunk, so that the compiler, which counts a loop's body once, is right."""
    config = on_cpu(ssdlib.Mamba2Config.preset(preset))
    T = config.chunk_size
    theirs = all_layers(config, partial(prefill_flops, 2, T))
    assert close(roofline.prefill(config, 2, T).flops, theirs)


def test_prefill_flops_of_many_chunks_are_within_5_percent():
    """Counted from the compiled text with its loops."""
    config = dataclasses.replace(ssdlib.Mamba2Config.preset("130m"), n_layers=2)
    config = on_cpu(config)
    params, cache = model(config, 1)
    tokens = struct(1, 1024, dtype=int)
    program = compile_for(ssdlib.prefill, params, config, tokens, cache)
    assert close(roofline.prefill(config, 1, 1024).flops, program.flops)


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_the_forms_are_within_5_percent_of_the_compilers(preset):
    config = ssdlib.Mamba2Config.preset(preset)

    def count(form, T, **options):
        lowered = jax.jit(partial(form, **options)).lower(*layer_args(config, 2, T))
        return lowered.cost_analysis()["flops"]

    for T in (1024, 256):
        quadratic = roofline.quadratic(config, 2, T).flops
        assert close(quadratic, count(ssdlib.ssd_quadratic, T))
    chunk = count(ssdlib.ssd_chunked, T, chunk_size=T)
    assert close(roofline.chunked(config, 2, T).flops, chunk)
    assert roofline.chunked(config, 2, 4 * T).flops == 4 * quadratic


def test_the_count_can_be_wrong():
    """Without the head, or with the state forgotten, the 5 percent are missed."""
    config = ssdlib.Mamba2Config.preset("130m")
    theirs = all_layers(config, partial(step_flops, 1))
    n = roofline.parameters(config)
    headless = roofline.decode(config, 1).flops - 2.0 * n["embedding"]
    assert not close(headless, theirs)
    ssd = config.n_layers * roofline.recurrent(config, 1, 1).flops
    assert not close(roofline.decode(config, 1).flops - ssd, theirs)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax_cuda12_plugin"
)
@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("130m", jnp.float32), ("2.7b", jnp.float32), ("130m", jnp.bfloat16)],
)
def test_decode_work_is_within_5_percent_of_a_compiled_step(preset, dtype):
    """Bytes and FLOPs of the program for an L40S, which fuses most."""
    config = ssdlib.Mamba2Config.preset(preset)

    @cache
    def program(config):
        params, cache = model(config, 1, dtype)
        args = params, config, struct(1, dtype=jnp.int32), cache
        step = partial(compile_for, ssdlib.decode_step, donate_argnums=3)
        return step(*args, target="l40s")

    ours = roofline.decode(config, 1, jnp.dtype(dtype).itemsize)
    assert close(ours.flops, all_layers(config, lambda c: program(c).flops))
    theirs = all_layers(config, lambda c: program(c).bytes)
    assert close(ours.bytes, theirs)
    assert ours.bytes < theirs  # it is a lower bound

    if dtype == jnp.float32:
        x, dt, A, B, C, _, h = layer_args(config, 2, 1)
        x_t, dt_t, B_t, C_t = (
            struct(*v.shape[:1], *v.shape[2:]) for v in (x, dt, B, C)
        )
        args = h, x_t, dt_t, A, B_t, C_t
        step = compile_for(ssdlib.ssd_step, *args, target="l40s")
        assert close(roofline.recurrent(config, 2, 1).flops, step.flops)
        assert roofline.recurrent(config, 2, 7) == 7 * roofline.recurrent(config, 2, 1)


def test_a_prefill_moves_at_least_the_counted_bytes():
    config = dataclasses.replace(ssdlib.Mamba2Config.preset("130m"), n_layers=2)
    params, cache = model(config, 1)
    tokens = struct(1, 256, dtype=int)
    program = compile_for(ssdlib.prefill, params, config, tokens, cache)
    assert roofline.prefill(config, 1, 256).bytes < program.bytes


def test_the_roofline_is_the_larger_of_two_times():
    chip = Chip("toy", flops=100.0, bandwidth=10.0, memory=1.0, source="")
    assert chip.ridge == 10
    light, heavy = Work(50.0, 10.0), Work(500.0, 10.0)
    assert (light.seconds(chip), light.ceiling(chip)) == (1.0, 0.5)
    assert (heavy.seconds(chip), heavy.ceiling(chip)) == (5.0, 1.0)
    assert light.mfu(2.0, chip) == 0.25
    assert light.hbu(2.0, chip) == 0.5
    for work in (light, heavy):  # at the bound, one of the two is fully used
        at = work.seconds(chip)
        assert max(work.mfu(at, chip), work.hbu(at, chip)) == 1
        assert work.mfu(at, chip) == work.ceiling(chip)
    assert light + heavy == Work(550.0, 20.0)
    assert 3 * light == Work(150.0, 30.0)


def test_the_hardware_table_serves_every_target():
    from ssdlib.compiler.targets import TARGETS

    assert set(CHIPS) == set(TARGETS) - {"cpu"}
    for chip in CHIPS.values():
        assert chip.source
        assert 50 < chip.ridge < 1000


def test_the_cpu_at_hand_is_measured():
    chip = roofline.measure_cpu(seconds=0.05)
    assert chip.flops > 1e8
    assert chip.bandwidth > 1e8
    assert chip.source == "measured"
