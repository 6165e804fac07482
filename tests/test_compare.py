"""Side-by-side timing: what it makes of samples, its workers, its records."""

import json
import sys
from contextlib import contextmanager
from math import log
from pathlib import Path
from statistics import median

import jax
import jsonschema
import numpy as np
import pytest

import ssdlib
from ssdlib.compiler.hlo import RECORDS
from ssdlib.measure import roofline
from ssdlib.params import PRESETS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCHEMA = json.loads((RECORDS / "compare/schema.json").read_text())
VALID = jsonschema.Draft202012Validator(SCHEMA)


@contextmanager
def importable():
    """benchmarks/ is no package: its files are found only in here."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path.remove(str(BENCHMARKS))


with importable():
    import compare
    import gguf_file
    import report
    import workers


@pytest.fixture
def checkpoint(tmp_path):
    """(folder, params, config) of a small random model."""
    sizes = ssdlib.Mamba2Config.tiny(n_heads=4)
    params = ssdlib.init_params(sizes, jax.random.key(3))
    ssdlib.save(tmp_path, params, sizes)
    return tmp_path, params, sizes


def test_a_ratio_is_that_of_one_round():
    """1/2, 4/2, 3/4: the ratio of medians would be 3/2."""
    pair = report.compared("decode", "x", "y", [1.0, 4.0, 3.0], [2.0, 2.0, 4.0])
    assert pair["ratio"] == {"median": 0.75, "lowest": 0.5, "highest": 2.0}
    assert (pair["a"], pair["b"]) == ("x", "y")


def test_agreement_is_the_largest_error_over_the_largest_logit():
    want = np.array([[[1.0, -4.0, 2.0], [3.0, 0.0, 1.0]]])
    got = want + np.array([[[0.0, 0.0, 0.2], [-2.5, 0.0, 0.0]]])
    assert report.agreement(got, want) == {"error": 2.5 / 4.0, "argmax": 0.5}


def facts(pairs, limits=None):
    """A record of these pairs, as far as its targets go."""
    sizes = dict(batch=1, prompt=64)
    pairs = [report.compared(*p) for p in pairs]
    return sizes | {"pairs": pairs, "limits": limits or {}}


def test_targets_follow_from_medians_and_limits():
    sizes = ssdlib.Mamba2Config.tiny()
    limit = {"read": 5e9, "in_projection": 7e9, "square": 1e12}
    best = {"XLA": limit, "torch": limit | {"read": 1e10}}
    pairs = [
        ("decode", report.BASE, "llama.cpp float32", [2.0, 3.0, 9.0], [4.0, 3.0, 3.0]),
        ("decode", report.BASE, "ours bfloat16", [2.0] * 3, [1.5] * 3),
        ("prefill", report.BASE, "mamba2-jax float32", [5.0], [20.0]),
        ("prefill", "32768 tokens", "1024 tokens", [64.0], [1.0]),
        ("decode", "float32, batch 8", "float32, batch 1", [4.0], [2.0]),
        ("decode", "ours int8", "llama.cpp q8_0", [1.0], [2.0]),
        ("decode", "ours bfloat16", "llama.cpp float32", [9.0], [1.0]),  # no aim
    ]
    made = report.targets(facts(pairs, best), sizes)
    value = {t["name"]: t["value"] for t in made}
    assert value["decode: ours / llama.cpp float32"] == 1.0
    assert value["decode: ours bfloat16 / float32"] == pytest.approx(0.75)
    assert value["prefill: ours / mamba2-jax float32"] == 0.25
    assert value["prefill: exponent, 1k to 32k"] == pytest.approx(log(64) / log(32))
    assert value["tokens/s: float32, batch 8 / batch 1"] == 4.0
    assert value["decode: ours int8 / llama.cpp q8_0"] == 0.5
    nbytes = roofline.decode(sizes, 1).bytes
    assert value["decode: share of read"] == pytest.approx(nbytes / 2.0 / 1e10)
    flops = roofline.prefill(sizes, 1, 64).flops
    assert value["prefill: share of in_projection"] == pytest.approx(flops / 5.0 / 7e9)
    assert len(made) == len(value) == 8
    assert all(("most" in t) != ("least" in t) for t in made)


class FakePeer:
    """A worker that answers at once; mlx-lm is missing, as it may be."""

    def __init__(self, run, name, dtype="float32", batch=None):
        self.label = f"{name} {dtype}"
        run.facts["versions"] |= {name: "1"}
        if name == "mlx-lm":
            raise RuntimeError("ModuleNotFoundError: No module named 'mlx'")

    def __call__(self, method, *args):
        if method == "check":
            np.save(args[0], np.eye(2, 8)[:, None])
        return {"prefill": 0.5, "decode": 0.25}.get(method, 2.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_record_of_everything_is_valid_and_names_what_is_missing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(PRESETS, "130m", (64, 1))
    monkeypatch.setattr(compare, "Peer", FakePeer)
    monkeypatch.setattr(compare.os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert compare.main(["--repeats", "3", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-130m-*.json")
    made = json.loads(path.read_text())
    VALID.validate(made)
    assert str(tmp_path) not in path.read_text()
    assert set(made["skipped"]) == {"mlx-lm float32", "mlx-lm bfloat16"}
    kinds = {(p["what"], p["b"]) for p in made["pairs"]}
    assert {("prefill", "llama.cpp q8_0"), ("decode", "ours bfloat16")} <= kinds
    assert ("token", "256 bare steps") in kinds and ("decode", "after 128") in kinds
    out = capsys.readouterr().out
    for t in made["targets"]:
        assert t["name"] in out
    assert "No module named 'mlx'" in out
    for broken in ({"pairs": [{}]}, {"threads": 0}, {"limits": {"cuBLAS": {}}}):
        assert not VALID.is_valid(made | broken)


def test_every_comparison_in_the_book_is_valid_and_follows_from_its_samples():
    for path in RECORDS.glob("compare/cpu-*.json"):
        made = json.loads(path.read_text())
        VALID.validate(made)
        for p in made["pairs"]:
            a, b = np.array(p["seconds_a"]), np.array(p["seconds_b"])
            assert p["ratio"]["median"] == pytest.approx(median(a / b), rel=1e-3)


def test_a_worker_reads_steps_times_and_reports_errors(checkpoint):
    folder, params, sizes = checkpoint
    args = compare.arguments(["--prompt", "9", "--batch", "2"])
    run = compare.Run(args, str(folder), sizes, {"versions": {}, "skipped": {}})
    with compare.Peer(run, "ours") as ours:
        got = compare.logits(run, ours)
        assert ours("prefill") > 0 and ours("decode", 3) is not None
        with pytest.raises(RuntimeError, match="AttributeError"):
            ours("sing")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, sizes.vocab_size, (2, 10), np.int32)
    want = np.moveaxis(np.asarray(ssdlib.forward(params, sizes, tokens))[:, -2:], 1, 0)
    assert abs(got - want).max() / abs(want).max() < 1e-5
    assert run.facts["versions"]["jax"] == jax.__version__
    assert ours.process.returncode == 0
    with run.skipping("nobody"), compare.Peer(run, "nobody"):
        raise AssertionError("it has no worker")
    assert run.facts["skipped"] == {"nobody": "KeyError: 'nobody'"}


def test_tensors_get_the_names_and_shapes_of_llama_cpp():
    """A itself, not its logarithm; columns; no middle axis in the convolution."""
    layer = "backbone.layers.7.mixer."
    name, A = gguf_file.gguf_tensor(layer + "A_log", np.log([2.0, 3.0]), 2)
    assert name == "blk.7.ssm_a" and A.shape == (2, 1)
    np.testing.assert_allclose(A[:, 0], [-2.0, -3.0])
    for key, shape, want in (
        ("D", (2,), ("blk.7.ssm_d", (2, 1))),
        ("conv1d.weight", (6, 1, 4), ("blk.7.ssm_conv1d.weight", (6, 4))),
        ("norm.weight", (6,), ("blk.7.ssm_norm.weight", (2, 3))),
        ("in_proj.weight", (5, 3), ("blk.7.ssm_in.weight", (5, 3))),
    ):
        name, value = gguf_file.gguf_tensor(layer + key, np.ones(shape), 2)
        assert (name, value.shape) == want


def test_a_checkpoint_survives_gguf(checkpoint):
    gguf = pytest.importorskip("gguf", reason="only where llama.cpp is compared")
    folder, params, sizes = checkpoint
    gguf_file.write_gguf(folder, folder / "x.gguf", "float32")
    reader = gguf.GGUFReader(folder / "x.gguf")
    stored = {t.name: t.data for t in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "mamba2"
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert len(stored) == 2 + 10 * sizes.n_layers - sizes.n_layers
    p = params["layers"][1]
    np.testing.assert_array_equal(stored["blk.1.ssm_in.weight"], p["in"])
    np.testing.assert_array_equal(stored["token_embd.weight"], params["embedding"])
    np.testing.assert_allclose(
        stored["blk.1.ssm_a"][:, 0], -np.exp(p["A_log"]), rtol=1e-6
    )


def test_a_limit_is_work_over_the_best_time(monkeypatch):
    limits = workers.Limits({"name": "NumPy", "threads": 1})
    monkeypatch.setattr(limits, "best", lambda fn, *args: next(times))
    times = iter([0.5, 0.25])
    assert limits.product(10, 20, 30) == 2 * 10 * 20 * 30 / 0.25
