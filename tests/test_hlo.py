"""Programs compiled for chips that are not here, and what the reader makes of them."""

import concurrent.futures
import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssdlib
from ssdlib.companion import notebook
from ssdlib.compiler import cost as hlo_cost
from ssdlib.compiler import hlo
from ssdlib.compiler import text as hlo_text
from ssdlib.compiler import view as hlo_view
from ssdlib.compiler.chips import CHIPS, GPU, TPU
from ssdlib.compiler.targets import (
    TARGETS,
    CompilerMissing,
    _environment,
    chip_name,
    compile_with,
)

BOOK = Path(__file__).parent.parent / "book"
NEEDS = {TPU: "libtpu", GPU: "jax_cuda12_plugin"}


def target(name):
    """A target as a test parameter, skipped where its compiler is not installed."""
    package = "jaxlib" if name == "cpu" else NEEDS[type(CHIPS[name].compiler)]
    missing = importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=package))


THREE = [target(name) for name in ("cpu", "l40s", "tpu-v6e")]


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def layers(x, w):
    """One product and one tanh a layer, in a scan over stacked weights."""
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum(axis=-1)), x, w)


def decode_args(n_layers=2):
    config = dataclasses.replace(ssdlib.Mamba2Config.preset("130m"), n_layers=n_layers)
    params = jax.eval_shape(lambda: ssdlib.init_params(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: ssdlib.init_cache(config, 1))
    return params, config, jax.ShapeDtypeStruct((1,), jnp.int32), cache


# --- targets -------------------------------------------------------------------------


def test_settings_of_two_threads_at_once_leave_the_environment_as_it_was():
    both = threading.Barrier(2)
    before = dict(os.environ)

    def hold(wait):
        both.wait(timeout=10)
        time.sleep(wait)  # the second comes while the first holds the setting
        with _environment(SSDLIB_TEST="1"):
            assert os.environ["SSDLIB_TEST"] == "1"
            time.sleep(0.1)
            assert os.environ["SSDLIB_TEST"] == "1"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(hold, [0, 0.05]))
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", [target(name) for name in TARGETS])
def test_every_target_compiles_and_leaves_this_process_as_it_was(name):
    before = dict(os.environ), jax.devices(), jax.default_backend()
    program = hlo.compile_for(lambda a, b: a @ b, struct(64, 96), struct(96, 128),
                              target=name)  # fmt: skip
    assert (dict(os.environ), jax.devices(), jax.default_backend()) == before
    np.testing.assert_array_equal(jnp.ones((2, 2)) @ jnp.ones((2, 2)), 2)

    assert program.target == name
    attached = name in {chip_name(d) for d in [*jax.devices(), *jax.devices("cpu")]}
    assert program.origin == ("attached" if attached else "absent")
    assert program.memory["argument"] >= 4 * (64 * 96 + 96 * 128)
    assert program.memory["output"] >= 4 * 64 * 128
    assert (program.cycles is not None) == name.startswith("tpu")


def test_an_unknown_target_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="target: 'tpu-v9'; it must be one of cpu, "):
        hlo.compile_for(jnp.sin, struct(8), target="tpu-v9")


def test_a_missing_compiler_names_its_extra_and_records_still_load():
    code = """
import importlib.util
find = importlib.util.find_spec
def without(name, *args):
    hidden = name.startswith(("libtpu", "jax_plugins"))
    return None if hidden else find(name, *args)
importlib.util.find_spec = without
import pkgutil
pkgutil.iter_modules = lambda *args: []  # jax finds its plugins by this
import jax, jax.numpy as jnp
from ssdlib.compiler import hlo
for target in ("tpu-v6e", "l40s"):
    try:
        hlo.compile_for(jnp.sin, jnp.ones(8), target=target)
    except hlo.CompilerMissing as error:
        print(error)
for path in sorted((hlo.RECORDS / "hlo").glob("*.json.gz")):
    record, _, end = path.name.removesuffix(".json.gz").partition("@")
    program = hlo.load_record(record, end)
    assert program.ops and program.origin == "recorded", path
    assert program.target == end
    assert "recorded on 20" in str(program.show())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line, name, extra in zip(
        done.stdout.splitlines(), ("tpu-v6e", "l40s"), ("tpu", "cuda"), strict=True
    ):
        assert f"target: '{name}' needs a compiler that is not here" in line
        assert f'pip install ".[{extra}]" in a checkout' in line


def test_static_arguments_and_donated_ones_are_told_apart():
    program = hlo.compile_for(ssdlib.decode_step, *decode_args(), donate_argnums=3)
    state = 4 * 2 * 24 * 64 * 128
    assert program.memory["alias"] >= state
    kept = hlo.compile_for(ssdlib.decode_step, *decode_args())
    assert kept.memory["alias"] == 0


# --- counts --------------------------------------------------------------------------

LOOP_FREE = {
    "product": (lambda a, b: a @ b, (64, 96), (96, 128)),
    "matrix times vector": (lambda a, b: a @ b, (1, 960), (960, 1280)),
    "batched product": (
        lambda a, b: jnp.einsum("bij,bkj->bki", a, b),
        (4, 64, 96),
        (4, 128, 96),
    ),
    "convolution with strides and holes": (
        lambda a, b: jax.lax.conv_general_dilated(
            a, b, (2, 1), "SAME", rhs_dilation=(1, 2)
        ),
        (2, 8, 33, 20),
        (16, 8, 3, 4),
    ),
    "softmax": (jax.nn.softmax, (64, 96)),
    "dual form": (
        ssdlib.ssd_quadratic,
        *((1, 64, 4, 16), (1, 64, 4), (4,), (1, 64, 1, 32), (1, 64, 1, 32)),
    ),
}


@pytest.mark.parametrize("name", ["cpu", target("tpu-v6e")])
@pytest.mark.parametrize("fn", LOOP_FREE)
def test_flops_equal_the_compilers_own_where_nothing_loops(fn, name):
    fn, *shapes = LOOP_FREE[fn]
    args = tuple(struct(*shape) for shape in shapes)
    compiled, _, _ = compile_with(name, fn, args)
    theirs = compiled.cost_analysis()
    ours = hlo.compile_for(fn, *args, target=name)
    assert abs(ours.flops / theirs["flops"] - 1) < 1e-3
    if name == "cpu":  # libtpu counts its windows, not arrays
        assert abs(ours.bytes / theirs["bytes accessed"] - 1) < 1e-2


@pytest.mark.parametrize("name", THREE)
def test_a_loop_counts_as_often_as_it_runs(name):
    def product(n):
        program = hlo.compile_for(layers, struct(64, 96), struct(n, 96, 96),
                                  target=name)  # fmt: skip
        assert program.unknown_loops == 0
        return [op for op in program.ops if op.kind == "product"]

    for n in (5, 11):
        (op,) = product(n)
        assert (op.times, op.flops) == (n, n * 2 * 64 * 96 * 96)

    def once(module, computation, loop):  # the mistake of cost_analysis
        return 1

    with mock.patch.object(hlo_cost, "trip_count", once):
        (op,) = product(11)
        assert op.flops != 11 * 2 * 64 * 96 * 96


@pytest.mark.parametrize("name", [target("tpu-v6e")])
def test_cycles_of_a_loop_grow_with_its_trips(name):
    few, many = (
        hlo.compile_for(layers, struct(64, 96), struct(n, 96, 96), target=name)
        for n in (8, 80)
    )
    body = [sum(op.cycles or 0 for op in p.ops if op.times > 1) for p in (few, many)]
    assert body[0] > 0
    assert body[1] == 10 * body[0]
    assert many.cycles >= body[1]


def test_a_program_with_two_fusions_has_two():
    """x / Σx²: one pass that reduces, one that divides."""

    def scale(x):
        return x / jnp.sum(x * x, axis=0, keepdims=True)

    program = hlo.compile_for(scale, struct(16, 24))
    assert program.fusions == program.launches == 2
    assert [op.kind for op in program.ops] == ["reduce", "elementwise"]
    assert program.bytes == 4 * (16 * 24 + 24) + 4 * (2 * 16 * 24 + 24)
    one = hlo.compile_for(lambda x: x * x + 1, struct(1000))
    assert one.fusions == 1


def test_a_gather_reads_rows_and_an_update_in_place_writes_one():
    def rows(table, index):
        return table.at[index].get(mode="clip") * 2

    index = jax.ShapeDtypeStruct((3,), jnp.int32)
    program = hlo.compile_for(rows, struct(5000, 96), index)
    assert program.bytes < 5 * 4 * 3 * 96

    def write(table, row):
        return jax.lax.dynamic_update_slice(table, row, (3, 0))

    args = struct(5000, 96), struct(1, 96)
    donated = hlo.compile_for(write, *args, donate_argnums=0)
    assert donated.bytes < 5 * 4 * 96
    assert hlo.compile_for(write, *args).bytes > 2 * 4 * 5000 * 96  # copies first


def test_custom_calls_are_counted_by_name():
    program = hlo.compile_for(jnp.linalg.cholesky, struct(16, 16))
    assert any("potrf" in name for name in program.custom_calls)


@pytest.mark.parametrize("name", THREE)
def test_the_model_needs_no_custom_call(name):
    params, config, token, cache = decode_args()
    with jax.default_matmul_precision("default"):  # one pass compiles fastest
        step = hlo.compile_for(
            ssdlib.decode_step, params, config, token, cache, target=name
        )
        params, config, *_ = decode_args(n_layers=1)
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        read = hlo.compile_for(ssdlib.prefill, params, config, tokens, target=name)
    assert step.custom_calls == read.custom_calls == {}
    assert step.unknown_loops == read.unknown_loops == 0


def test_kernels_know_their_line_of_jax():
    def fn(x, w):
        return jnp.tanh(x) @ w

    program = hlo.compile_for(fn, struct(64, 96), struct(96, 128))
    (product,) = (op for op in program.ops if op.kind == "product")
    first = inspect.getsourcelines(fn)[1]
    assert product.source == f"test_hlo.py:{first + 1}"
    assert product.code == "return jnp.tanh(x) @ w"
    assert product.primitive == "dot_general"


# --- the text ------------------------------------------------------------------------

TEXT = """\
HloModule toy

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], /*index=1*/f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %y = f32[8]{0:T(128)S(1)} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"40"}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %y)
}

%until (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

%outer (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %x.2 = f32[8]{0} get-tuple-element(%p.2), index=1
  %two = s32[] constant(2)
  %start.2 = (s32[], f32[8]{0}) tuple(%two, %x.2)
  ROOT %w.2 = (s32[], f32[8]{0}) while(%start.2), condition=%until, body=%inner
}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
  %a = f32[8]{0} parameter(0), metadata={op_name="a (b) -> c"}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %a)
  ROOT %w = (s32[], f32[8]{0}) while(%start), condition=%until, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_nested_loops_multiply():
    """Given as 3 passes; read off the condition as 9 - 2 = 7 passes inside."""
    module = hlo_text.parse(TEXT)
    runs = {i.name: times for i, _, times in hlo_cost.executed(module)}
    assert runs == {"next": 21, "y": 21}
    y = module.computations["inner"].instructions["y"]
    assert y.cycles == 40
    assert y.shapes[0].space == 1
    assert str(y.shapes[0]) == "f32[8]"


def test_a_loop_without_a_known_end_is_reported():
    module = hlo_text.parse(TEXT.replace("direction=LT", "direction=NE"))
    assert {times for *_, times in hlo_cost.executed(module)} == {None}

    def until_small(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    assert hlo.compile_for(until_small, struct(8)).unknown_loops > 0


@pytest.mark.parametrize("step", ["%n.3", "%j"])
def test_a_counter_that_does_not_move_by_one_has_an_unknown_end(step):
    """By a constant of 2, or by another value that the loop carries."""
    more = "  %n.3 = s32[] constant(2)\n  %j = s32[] get-tuple-element(%p), index=2\n"
    text = TEXT.replace("  %next =", f"{more}  %next =")
    text = text.replace("add(%i, %one)", f"add(%i, {step})")
    runs = hlo_cost.executed(hlo_text.parse(text))
    assert {i.name: times for i, _, times in runs} == {"next": None, "y": None}


def test_a_while_loop_with_a_traced_step_is_reported():
    def count(step, x):
        def body(carry):
            i, step, x = carry
            return i + step, step, jnp.sin(x)

        return jax.lax.while_loop(lambda c: c[0] < 100, body, (0, step, x))[2]

    step = jax.ShapeDtypeStruct((), jnp.int32)
    assert hlo.compile_for(count, step, struct(8)).unknown_loops > 0


def test_the_costlier_branch_counts():
    def fn(go, x):
        return jax.lax.cond(go, lambda x: x @ x @ x, lambda x: x + 1, x)

    go = jax.ShapeDtypeStruct((), jnp.bool_)
    program = hlo.compile_for(fn, go, struct(64, 64))
    products = sum(op.flops for op in program.ops if op.kind == "product")
    assert products == 2 * 2 * 64**3


# --- records and views ---------------------------------------------------------------


def test_a_record_gives_back_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(hlo, "RECORDS", tmp_path)
    program = hlo.compile_for(layers, struct(64, 96), struct(5, 96, 96))
    program.save("toy")
    again = hlo.load_record("toy", "cpu")
    assert again.ops == program.ops
    assert (again.flops, again.bytes) == (program.flops, program.bytes)
    assert again.origin == "recorded"
    assert again.versions == program.versions
    assert program.date in again.caption
    text = again.hlo
    assert text
    assert hlo_text.strip(text) == text
    assert "metadata" not in text and os.path.dirname(__file__) not in text
    name = next(op.name for op in program.ops if op.opcode == "fusion")
    assert again.excerpt(name) == program.excerpt(name)
    assert hlo_text.parse(text).entry == hlo_text.parse(program.hlo).entry
    before = (tmp_path / "hlo/toy@cpu.json.gz").read_bytes()
    program.save("toy")
    assert (tmp_path / "hlo/toy@cpu.json.gz").read_bytes() == before


@pytest.mark.parametrize("name", THREE)
def test_a_fresh_compilation_has_the_structure_of_the_record(name):
    """`mask` of chapter 8, taken from the chapter itself."""
    cells = json.loads((BOOK / "08_hlo.ipynb").read_text())["cells"]
    cell = next(c for c in cells if "def mask(" in "".join(c["source"]))
    chapter = {"jnp": jnp, "jax": jax}
    exec("".join(cell["source"]), chapter)
    args = struct(1024, 128), struct(1024, 128), struct(1024, 64)
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        fresh = hlo.compile_for(chapter["mask"], *args, target=name)

    record = hlo.load_record("mask", name)
    assert record.memory.keys() == fresh.memory.keys()
    assert record.versions.keys() == fresh.versions.keys()
    for size in ("argument", "output"):
        assert record.memory[size] == fresh.memory[size]
    assert abs(record.flops / fresh.flops - 1) < 0.01
    if record.versions == fresh.versions:
        for a, b in zip(record.ops, fresh.ops, strict=True):
            assert (a.kind, a.shape, a.times) == (b.kind, b.shape, b.times)
            assert (a.flops, a.primitive) == (b.flops, b.primitive)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_records_of_chapter_12_keep_the_text_that_it_reads(steps):
    """Where jax is too old to compile the same, the page looks for readers in it."""
    p = hlo.load_record(f"fast_steps_{steps}", "cpu")
    (padded,) = (op.name for op in p.ops if op.shape == "f32[1,515,1536]")
    parts = hlo_text.parse(p.hlo).computations.values()
    assert any([*part.users(padded)] for part in parts)


def test_chapters_fall_back_to_the_record_and_can_write_it(tmp_path, monkeypatch):
    compiled = partial(notebook.compiled, "toy", jnp.sin, struct(8), target="cpu")
    monkeypatch.setattr(hlo, "RECORDS", tmp_path)
    live = compiled()
    assert live.origin == "attached"
    assert not hlo.has_record("toy", "cpu")
    with monkeypatch.context() as record:
        record.setenv("SSDLIB_RECORD", "1")
        compiled(live=False)
    assert compiled(live=False).origin == "recorded"

    def missing(*args, **options):
        raise CompilerMissing("no compiler")

    monkeypatch.setattr(hlo, "compile_for", missing)
    assert compiled().ops == live.ops
    with pytest.raises(CompilerMissing):
        notebook.compiled("other", jnp.sin, struct(8), target="cpu")


def test_a_missing_record_is_an_os_error():
    with pytest.raises(OSError, match="nowhere"):
        hlo.load_record("nowhere", "cpu")


def test_tables_add_up_and_display_in_both_worlds():
    program = hlo.compile_for(layers, struct(64, 96), struct(5, 96, 96))
    table = program.show(rows=100)
    assert sum(int(row[0]) for row in table.rows) == program.launches
    assert "100.0%" not in str(table) or len(table.rows) == 1
    shares = [float(row[3].rstrip("%")) for row in table.rows]
    assert abs(sum(shares) - 100) < 0.1 * len(shares)
    assert shares == sorted(shares, reverse=True)
    one = program.show(rows=1)
    assert f"{len(table.rows) - 1} more rows" in str(one)
    assert "tanh" in str(table) and "<table" in table._repr_html_()
    assert len(program.show(rows=100, by="kernel").rows) == len(program.ops)
    with pytest.raises(ValueError, match="by: 'name'"):
        program.show(by="name")


def test_programs_stand_side_by_side():
    small, large = (
        hlo.compile_for(layers, struct(64, 96), struct(n, 96, 96)) for n in (5, 6)
    )
    table = hlo.diff(small, large, names=["five", "six"])
    product = next(row for row in table.rows if row[0] == "product")
    assert (product[1], product[4]) == ("5", "6")
    assert table.header[1::3] == ["five: runs", "six: runs"]


@pytest.mark.parametrize(
    ("n", "text"),
    [(None, "-"), (0, "0"), (999, "999"), (1234, "1.23 k"), (5.6e9, "5.6 G")],
)
def test_counts_are_short(n, text):
    assert hlo_view.count(n) == text


def test_a_kernel_that_is_not_there_is_named():
    program = hlo.compile_for(jnp.sin, struct(8))
    with pytest.raises(ValueError, match="name: 'nothing'"):
        program.excerpt("nothing")


def test_compiler_missing_is_an_import_error():
    assert issubclass(CompilerMissing, ImportError)


def test_a_loop_up_to_a_number_that_is_not_whole_has_an_unknown_end():
    def double(x):
        return jax.lax.while_loop(lambda x: x < 1000.5, lambda x: 2 * x + 1, x)

    assert hlo.compile_for(double, struct()).unknown_loops > 0


def test_bytes_of_collectives_that_only_start():
    text = """HloModule m

ENTRY %m (a: f32[1024], b: f32[64]) -> f32[4096] {
  %a = f32[1024]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %g = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%a), dimensions={0}
  %r = (f32[64]{0}, f32[1024]{0}) all-reduce-start(%b, %a), to_apply=%add
  %c = (f32[1024]{0}, f32[1024]{0}, u32[]) copy-start(%a)
  ROOT %d = f32[4096]{0} all-gather-done(%g)
}
"""
    module = hlo_text.parse(text)
    at = module.computations[module.entry]
    moved = {k: hlo_cost.bytes_moved(module, at.instructions[k], at)[0] for k in "grc"}
    assert moved == {"g": 4096 + 16384, "r": 2 * (256 + 4096), "c": 8192}


@pytest.mark.parametrize("name", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_a_product_of_a_library_is_a_product(name):
    assert hlo_cost.GEMM.search(f'custom_call_target="{name}"')
