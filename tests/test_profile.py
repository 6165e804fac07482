"""Times of kernels: what a trace says, joined with what the compiled text says."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssdlib
from ssdlib.compiler import hlo, ops, profile, text

NAMED = """
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %add.1 = s32[] add(%n, %one)
  %tanh-fast.2 = f32[8]{0} tanh(%v)
  ROOT %pair = (s32[], f32[8]{0}) tuple(%add.1, %tanh-fast.2)
}

%less (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(2)
  ROOT %lt = pred[] compare(%n, %end), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %copy-start.3 = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%x)
  %copy-done.3 = f32[8]{0:S(1)} copy-done(%copy-start.3)
  %start = (s32[], f32[8]{0}) tuple(%zero, %copy-done.3)
  %while.4 = (s32[], f32[8]{0}) while(%start), condition=%less, body=%body
  ROOT %y = f32[8]{0} get-tuple-element(%while.4), index=1
}
"""


def program():
    """NAMED, as if it had been compiled."""
    made = hlo.compile_for(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))
    table, _ = ops.table(text.parse(NAMED))
    return dataclasses.replace(made, ops=table, hlo=NAMED)


def trace(plane, **lines):
    """A trace of one plane; its lines hold (name, start, stop, statistics), in ns."""
    names = [name for events in lines.values() for name, *_ in events]
    stats = ["hlo_op", "_p", "_c"]
    out = [f'planes {{ name: "{plane}"']
    for i, name in enumerate(names):
        out.append(f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}')
    for i, name in enumerate(stats):
        out.append(f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}')
    event = iter(range(len(names)))
    for line, events in lines.items():
        out.append(f'lines {{ name: "{line.replace("_", " ")}"')
        for _, start, stop, said in events:
            out.append(f"events {{ metadata_id: {next(event)} offset_ps: {start}000 "
                       f"duration_ps: {stop - start}000")  # fmt: skip
            for key, value in said.items():
                kind = "str_value" if isinstance(value, str) else "uint64_value"
                value = f'"{value}"' if isinstance(value, str) else value
                out.append(
                    f"stats {{ metadata_id: {stats.index(key)} {kind}: {value} }}"
                )
            out.append("}")
        out.append("}")
    return "\n".join([*out, "}"])


def times(*planes):
    """(ns and runs of each kernel, ns of other events)."""
    data = jax.profiler.ProfileData.text_proto_to_serialized_xspace("\n".join(planes))
    seconds, runs, other = profile.read_trace(data, program())
    seconds, other = (
        {name: round(1e9 * s) for name, s in d.items()} for d in (seconds, other)
    )
    return seconds, runs, other


def op(name, start, stop, link=None):
    return name, start, stop, {"hlo_op": name} | ({"_p": link} if link else {})


# --- traces --------------------------------------------------------------------------


def test_an_instant_in_a_loop_is_counted_once_and_for_the_kernel():
    events = [
        *(op("while.4", 100, 200), op("add.1", 100, 120), op("tanh-fast.2", 130, 160)),
        *(op("add.1", 160, 170), op("tanh-fast.2", 170, 190), op("add.1", 200, 200)),
    ]
    seconds, runs, other = times(trace("/host:CPU", tf_XLA=events, python=[]))
    assert seconds == {"add.1": 30, "tanh-fast.2": 50}
    assert runs == {"add.1": 3, "tanh-fast.2": 2}
    assert other == {"while.4": 20}


def test_a_kernel_on_many_threads_lasts_until_the_last_one_says_so():
    first = [op("tanh-fast.2", 100, 120, link=7)]
    other = [("end: tanh-fast.2", 150, 151, {"_c": 7}), op("add.1", 152, 160, link=8)]
    work = [("a function of Python", 100, 400, {})]
    seconds, _, rest = times(trace("/host:CPU", tf_A=first, tf_B=other, python=work))
    assert seconds == {"tanh-fast.2": 50, "add.1": 8}
    assert rest == {}


def test_kernels_of_a_gpu_are_known_by_instruction_or_by_their_own_name():
    """One in a CUDA graph may lack the former; a library's has a name of its own."""
    stream = [
        ("tanh_kernel", 10, 30, {"hlo_op": "tanh-fast.2"}),
        ("tanh_fast_2", 30, 40, {"hlo_op": "command_buffer"}),
        ("add_1", 40, 45, {}),
        ("void cutlass::gemm", 50, 60, {}),
    ]
    host = trace("/host:CPU", tf_XLA=[op("tanh-fast.2", 0, 1000)])
    gpu = {"Stream #7(Compute)": stream, "XLA_Modules": [("jit_f", 10, 60, {})]}
    seconds, runs, other = times(host, trace("/device:GPU:0", **gpu))
    assert seconds == {"tanh-fast.2": 30, "add.1": 5}
    assert runs == {"tanh-fast.2": 2, "add.1": 1}
    assert other == {"void cutlass::gemm": 10}


def test_kernels_of_a_tpu_have_a_line_of_their_own_and_waits_belong_to_transfers():
    ops = [
        ("%copy-start.3 = (f32[8]{0}, u32[]) copy-start(%x)", 10, 12, {}),
        ("%copy-done.3 = f32[8]{0} copy-done(%copy-start.3)", 12, 20, {}),
        ("%while.4 = (s32[], f32[8]{0}) while(%start)", 20, 50, {}),
        ("%tanh-fast.2 = f32[8]{0} tanh(%v)", 25, 45, {}),
    ]
    lines = {
        "XLA_Modules": [("jit_f(123)", 10, 50, {})],
        "XLA_Ops": ops,
        "Async_XLA_Ops": [("copy-start.3", 10, 20, {})],
    }
    seconds, runs, other = times(trace("/device:TPU:0", **lines))
    assert seconds == {"copy-start.3": 10, "tanh-fast.2": 20}
    assert runs == {"copy-start.3": 2, "tanh-fast.2": 1}
    assert other == {"while.4": 10}


# --- programs that run ---------------------------------------------------------------


def two_loops(x, w, v):
    """Four products of (64, 64), and two of 8 times their work."""
    x = jax.lax.fori_loop(0, 4, lambda _, x: jnp.tanh(x @ w), x)
    y = jnp.tile(x, (2, 2))
    return jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y @ v), y)


@pytest.fixture(scope="module")
def loops():
    arrays = jnp.ones((64, 64)), jnp.ones((64, 64)), jnp.ones((128, 128))
    return profile.measure(two_loops, *arrays, repeats=2)


def test_every_kernel_of_the_table_is_seen_as_often_as_the_text_says(loops):
    assert {op.name: op.times for op in loops.program.ops} == loops.runs
    assert loops.runs.keys() == loops.seconds.keys()
    products = [op for op in loops.program.ops if op.kind == "product"]
    assert sorted(op.times for op in products) == [2, 4]
    assert sorted(op.flops for op in products) == [4 * 2 * 64**3, 2 * 2 * 128**3]


def test_no_time_is_counted_twice(loops):
    parts = sum(loops.seconds.values()) + sum(loops.other.values())
    assert 0 < loops.explained < parts / loops.call < 1.001
    assert all(re.match("while", name) for name in loops.other)


@pytest.mark.parametrize("by", ["line", "kernel"])
def test_rates_times_time_are_the_work_of_the_text(loops, by):
    table = loops.table(rows=100, by=by)
    cells = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    ms, rate = (np.array(cells[k], float) for k in ("ms", "GFLOP/s"))
    shares = [float(share.rstrip("%")) for share in cells["share"]]
    assert sum(ms * rate) == pytest.approx(loops.program.flops / 1e6, rel=0.1)
    assert sum(shares) == pytest.approx(100 * loops.explained, abs=0.1 * len(shares))
    assert sum(map(int, cells["runs"])) == loops.program.launches
    assert sorted(ms, reverse=True) == list(ms)
    assert f"kernels {loops.explained:.1%}" in table.caption
    assert f"{1e3 * loops.alone:.2f} without" in table.caption


def test_a_step_with_a_donated_cache_runs_as_often_as_asked():
    config = ssdlib.Mamba2Config.tiny()
    params = ssdlib.init_params(config, jax.random.key(0))
    cache = ssdlib.init_cache(config, 1)
    args = params, config, np.zeros(1, np.int32), cache
    found = profile.measure(ssdlib.decode_step, *args, repeats=1, donate_argnums=3)
    assert found.program.memory["alias"] >= cache.nbytes
    assert found.runs == {op.name: op.times for op in found.program.ops}
    assert not any(v.is_deleted() for v in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jax.ShapeDtypeStruct((8,), jnp.float32), {}, "args: number 0 has shapes only"),
        (np.ones(8), {"repeats": 0}, "repeats: 0; it must be"),
        (np.ones(8), {"donate_argnums": 1}, "donate_argnums: 1; it must be of the 1"),
    ],
)
def test_what_cannot_be_measured_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        profile.measure(jnp.sin, x, **options)


def test_an_unknown_view_is_named(loops):
    with pytest.raises(ValueError, match="by: 'name'; it must be"):
        loops.table(by="name")
