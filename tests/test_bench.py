"""Timing that is honest, and records that say where a number comes from."""

import contextlib
import copy
import io
import json
import re
import time
from pathlib import Path
from statistics import median

import jax
import jsonschema
import numpy as np
import pytest

import ssdlib
from ssdlib.__main__ import main
from ssdlib.compiler import targets
from ssdlib.compiler.chips import Chip
from ssdlib.compiler.hlo import RECORDS
from ssdlib.measure import bench, record, roofline
from ssdlib.params import PRESETS
from ssdlib.platforms import LONGEST_CHUNK

SCHEMA = json.loads((RECORDS / "runs/schema.json").read_text())
VALID = jsonschema.Draft202012Validator(SCHEMA)
PEAK = Chip("this CPU", 5e10, 2e10, 0.0, "measured")
SIZES = 256, 1  # of the model measured here: d_model and n_layers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(record, output, path) of the command, on a small model and short lengths."""
    folder = tmp_path_factory.mktemp("runs")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setitem(PRESETS, "130m", SIZES)
        patch.setattr(roofline, "measure_cpu", lambda nbytes: PEAK)
        command = "--lengths 16,32 --repeats 3 --batch 2 --out"
        assert main(["bench", *command.split(), str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), out.getvalue(), path


def test_a_record_is_valid_and_repeats_its_command(run):
    made, out, path = run
    VALID.validate(made)
    assert re.fullmatch(r"cpu-130m-float32-\d{8}-\d{6}\.json", path.name)
    assert out.endswith(f"written: {path}\n")
    assert made["command"] == (
        "python -m ssdlib bench --preset 130m --what prefill,decode,uncached "
        "--lengths 16,32 --batch 2 --dtype float32 --repeats 3"
    )
    assert made["precision"] == "highest"  # conftest asks for it
    assert [(r["what"], r["length"]) for r in made["rows"]] == [
        (what, T) for T in (16, 32) for what in ("prefill", "decode", "uncached")
    ]


def test_a_record_tells_no_path_and_no_host(run):
    made, _, path = run
    text = json.dumps(made)
    for secret in (str(path.parent), str(Path.home()), str(Path.cwd())):
        assert secret not in text


def test_rates_follow_from_the_samples(run):
    """By hand: tokens, FLOPs of the model's weights, bytes of weights and cache."""
    made, _, _ = run
    batch, V, d = 2, 50288, SIZES[0]
    about = dict(rel=1e-3)
    for row in made["rows"]:
        T, samples, t = row["length"], row["samples"], row["seconds"]["median"]
        assert len(samples) == made["repeats"] == 3
        spread = {"median": median(samples), "lowest": min(samples)}
        assert row["seconds"] == spread | {"highest": max(samples)}
        tokens = T if row["what"] == "prefill" else 1
        assert row["ms_per_token"] == pytest.approx(1e3 * t / tokens, **about)
        assert row["tokens_per_second"] == pytest.approx(batch * tokens / t, **about)
        work = {
            "prefill": roofline.prefill,
            "uncached": roofline.prefill,
            "decode": lambda c, b, T: roofline.decode(c, b),
        }[row["what"]](resized(chunk_size=LONGEST_CHUNK["cpu"]), batch, T)
        head = 2 * batch * (T - 1) * V * d * (row["what"] == "uncached")
        flops = work.flops + head
        assert row["tflops"] == pytest.approx(flops / t / 1e12, **about)
        assert row["mfu"] == pytest.approx(flops / t / PEAK.flops, **about)
        if row["what"] != "uncached":
            assert row["hbu"] == pytest.approx(work.bytes / t / 2e10, **about)
        else:
            logits = 4 * batch * T * V
            weights = made["memory"]["weights"]
            least = (logits + weights) / t / 2e10
            assert row["hbu"] == pytest.approx(least, rel=0.02)


def resized(**changes):
    """The small model's sizes."""
    d, layers = SIZES
    return ssdlib.Mamba2Config(50288, d, layers, n_heads=2 * d // 64, **changes)


def test_speedups_are_ratios_within_rounds(run):
    made, out, _ = run
    samples = {(r["what"], r["length"]): np.array(r["samples"]) for r in made["rows"]}
    assert [s["length"] for s in made["speedups"]] == [16, 32]
    for s in made["speedups"]:
        T, ratio = s["length"], s["ratio"]
        ratios = samples["uncached", T] / samples["decode", T]
        want = np.median(ratios), ratios.min(), ratios.max()
        got = ratio["median"], ratio["lowest"], ratio["highest"]
        np.testing.assert_allclose(got, want, rtol=1e-3)
        assert f"Cached decode at {T} tokens: {ratio['median']:.3g} times" in out


def test_memory_is_that_of_the_arrays(run):
    made, _, _ = run
    params = ssdlib.init_params(resized(), jax.random.key(0))
    memory = made["memory"]
    assert memory["weights"] == sum(v.nbytes for v in jax.tree.leaves(params))
    assert memory["cache"] == ssdlib.init_cache(resized(), 2).nbytes
    uncached = [r["temp"] for r in made["rows"] if r["what"] == "uncached"]
    assert min(uncached) > 0


def test_the_table_has_a_line_for_each_row_and_names_its_sources(run):
    made, out, _ = run
    for row in made["rows"]:
        ms = re.escape(f"{row['ms_per_token']:.4g}")
        assert re.search(rf"{row['what']} +{row['length']} +{ms} ", out)
    assert "batch 2, median of 3, measured on cpu" in out
    assert "0.05 TFLOPS and 20 GB/s (measured)" in out


def broken(made):
    """Records that must not pass: each with one thing wrong."""
    compiled = {**copy.deepcopy(made), "origin": "absent"}
    yield "a figure of a compiler", compiled
    for key in ("commit", "device", "versions", "dtype", "precision", "command"):
        yield f"no {key}", {k: v for k, v in made.items() if k != key}
    for change in (
        dict(samples=[]),
        dict(samples=[0.1, 0.1, -0.1]),
        dict(what="train"),
        dict(mfu="high"),
        dict(estimated_cycles=1),
    ):
        one = copy.deepcopy(made)
        one["rows"][0] |= change
        yield str(change), one


def test_a_broken_record_is_refused(run):
    for why, one in broken(run[0]):
        assert not VALID.is_valid(one), why


def test_every_record_in_the_book_is_valid_and_follows_from_its_samples():
    for path in RECORDS.glob("runs/*.json"):
        if path.name == "schema.json":
            continue
        made = json.loads(path.read_text())
        VALID.validate(made)
        for row in made["rows"]:
            assert row["seconds"]["median"] == median(row["samples"]), path.name
            assert len(row["samples"]) == made["repeats"], path.name
        if made["peak"] and made["peak"]["source"] != "measured":
            assert all(max(r["mfu"], r["hbu"]) <= 1 for r in made["rows"]), path.name


def test_rounds_interleave_and_drop_the_warm_up():
    calls, clock = [], iter(range(1, 100))

    def sampler(name):
        def sample():
            calls.append(name)
            return float(next(clock))

        return sample

    keys = [("prefill", 1), ("decode", 1), ("uncached", 1)]
    seconds = bench.rounds({key: sampler(key) for key in keys}, 3)
    assert calls == keys + keys[::-1] + keys + keys[::-1]
    assert seconds[keys[0]] == [6.0, 7.0, 12.0]
    with pytest.raises(
        ValueError, match="decode at 1 tokens takes less than the noise"
    ):
        bench.rounds({("decode", 1): lambda: -1.0}, 3)


def test_a_sample_waits_for_the_device():
    class Result:
        def block_until_ready(self):
            time.sleep(0.05)

    assert bench._seconds(lambda n: (Result(), [Result()]), 1) >= 0.1


def test_a_full_device_is_told_in_one_line():
    with pytest.raises(ValueError, match="lengths: 2 x 8 tokens do not fit the memory"):
        with bench._explained(2, [4, 8]):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 12 lines of buffers")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with bench._explained(2, [4, 8]):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_decode_sample_is_free_of_prefill_and_call(monkeypatch):
    monkeypatch.setattr(bench, "_seconds", lambda fn, n: 7.0 + 0.25 * n)
    assert bench._step(None) == 0.25


def test_work_of_an_uncached_pass_is_within_5_percent_of_the_compilers():
    """One chunk, so that the compiler, which counts a loop's body once, is right."""
    sizes = resized(chunk_size=LONGEST_CHUNK["cpu"])
    T = sizes.chunk_size
    params, tokens = jax.eval_shape(
        lambda: (
            ssdlib.init_params(sizes, jax.random.key(0)),
            jax.numpy.zeros((2, T), jax.numpy.int32),
        )
    )
    lowered = jax.jit(ssdlib.forward, static_argnums=1).lower(params, sizes, tokens)
    theirs = lowered.cost_analysis()["flops"]
    ours = bench.work(("uncached", T), sizes, 2).flops
    assert abs(ours / theirs - 1) < 0.05
    lean = bench.work(("prefill", T), sizes, 2).flops
    assert abs(lean / theirs - 1) > 0.05  # without the other heads it is missed


@pytest.mark.usefixtures("as_user")
def test_an_unknown_chip_has_no_utilization():
    class Device:
        platform, device_kind = "gpu", "NVIDIA RTX 4090 (24 GB)"

    assert targets.chip_name(Device) == "nvidia-rtx-4090-24-gb"
    assert bench._peak(Device, "float32", 1) is None
    program = bench.Program(lambda: 1.0, 0.0)
    work = roofline.Work(1.0, 1.0)
    row = record.row(("decode", 8), 1, program, [1.0, 2.0, 3.0], work, None)
    assert (row["mfu"], row["hbu"]) == (None, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--preset 7b", "name: '7b'; it must be one of 130m"),
        ("--model nowhere", "source: 'nowhere' is no folder"),
        ("--what prefill,train", "what: 'train'; it must be of prefill, decode"),
        ("--lengths 0,8", "lengths: 0; it must be an integer of at least 1"),
        ("--lengths 8,x", "lengths: '8,x'; it must be numbers between commas"),
        ("--batch 0", "batch: 0; it must be an integer of at least 1"),
        ("--repeats 2", "repeats: 2; it must be 3 or more"),
        ("--target abacus", "target: 'abacus'; it must be one of cpu"),
        ("--out pyproject.toml", "[Errno 17] File exists: 'pyproject.toml'"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_errors_come_before_the_work_in_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(bench, "_prepare", None)
    if "--out" not in argv:
        monkeypatch.setattr(record, "writable", lambda folder: folder)
    assert main(["bench", *argv.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_an_installed_package_writes_to_the_current_folder(run, monkeypatch, tmp_path):
    made, _, _ = run
    assert record.writable() == record.RUNS == RECORDS / "runs"  # of the book
    home = tmp_path / "site-packages/ssdlib"
    monkeypatch.setattr(record, "RECORDS", home / "results")
    monkeypatch.setattr(record, "RUNS", home / "results/runs")
    monkeypatch.setattr(record, "_ROOT", home.parent)
    monkeypatch.chdir(tmp_path)
    assert record.save(made).parent == tmp_path
    assert not home.exists()


def test_what_is_only_compiled_is_not_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_prepare", None)
    absent = next(
        name
        for name in ("tpu-v6e", "l40s")
        if all(targets.chip_name(d) != name for d in jax.devices())
    )
    assert main(["bench", "--target", absent, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"target: {absent} is not attached" in err
    assert "is no measurement; python -m ssdlib inspect --target" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiles", [False, True])
def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch, compiles):
    """At once if weights and logits say so, else when the compiler says the rest."""
    sizes, T = resized(), 64
    params = jax.eval_shape(lambda: ssdlib.init_params(sizes, jax.random.key(0)))
    sure = sum(4 * v.size for v in jax.tree.leaves(params))  # all are float32
    sure += 2 * ssdlib.init_cache(sizes, 1).nbytes + 4 * T * sizes.vocab_size
    monkeypatch.setattr(record, "free_memory", lambda device: sure - 1 + compiles)

    def only_shapes(config, key, dtype):
        assert isinstance(key, jax.core.Tracer)
        return ssdlib.init_params(config, key, dtype)

    monkeypatch.setattr(bench, "init_params", only_shapes)
    if not compiles:
        monkeypatch.setattr(bench, "_compile", None)
    with pytest.raises(ValueError, match="lengths: uncached of 1 x 64 tokens needs"):
        bench.bench(sizes, ["uncached"], [T])
