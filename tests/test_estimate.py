"""Estimates of time: the fit, its interval, and the record behind them."""

import importlib.util
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import record_calibration

from ssdlib.compiler.chips import CHIPS
from ssdlib.compiler.hlo import compile_for
from ssdlib.compiler.targets import versions
from ssdlib.measure import estimate as estimates
from ssdlib.measure.estimate import Estimate, estimate, fit, left_out, model, points

RECORD = json.loads(estimates.PATH.read_text())
CHIP = CHIPS[estimates.TARGET]


def program(roofline, cycles, target=estimates.TARGET):
    size = roofline * CHIP.bandwidth
    return SimpleNamespace(flops=0.0, bytes=size, cycles=cycles, target=target)


def test_the_fit_finds_the_law_that_made_the_times():
    rng = np.random.default_rng(0)
    roofline, cycles = rng.uniform(1e-3, 1, 9), rng.uniform(1e7, 1e9, 9)
    times = 4e-3 * roofline**0.7 * cycles**0.3
    made = fit(roofline, cycles, times)
    assert (made.scale, made.weight) == pytest.approx((4e-3, 0.3))
    arrays = roofline, cycles, times
    assert left_out(*arrays) == pytest.approx(np.minimum(1, times / roofline))


def test_a_program_that_is_left_out_does_not_help_to_estimate_itself():
    arrays = points(RECORD)
    changed = [v.copy() for v in arrays]
    changed[2][0] *= 100
    before, after = left_out(*arrays), left_out(*changed)
    assert after[0] == pytest.approx(100 * before[0])
    assert not np.isclose(after[1:], before[1:]).all()


def test_an_estimate_never_beats_the_roofline():
    for cycles in (1, 10**6, 10**9):
        low, middle, high, roofline = estimate(program(1e-3, cycles))
        assert roofline == pytest.approx(1e-3)
        assert roofline <= low <= middle < high
        assert high == pytest.approx(middle * model().factor)
    assert low == pytest.approx(middle / model().factor) and middle > 2 * roofline


def test_the_interval_holds_95_of_100_programs_that_were_left_out():
    inside = np.abs(np.log(left_out(*points(RECORD)))) <= np.log(model().factor)
    assert 0.9 < inside.mean() < 1


def test_a_chip_without_measured_times_gets_no_estimate():
    for target in ("tpu-v5e", "h100", "cpu"):
        with pytest.raises(ValueError, match=f"program: it is for {target}; it must"):
            estimate(program(1e-3, 10**6, target))


def test_a_ratio_has_the_worst_of_both_intervals_and_the_ratio_of_rooflines():
    ratio = Estimate(2e-3, 3e-3, 8e-3, 2e-3).over(Estimate(1e-3, 2e-3, 5e-3, 1e-3))
    assert ratio == pytest.approx((0.4, 1.5, 8, 2))
    assert ratio.times == "1.5 times (0.4 to 8; rooflines 2)"
    assert Estimate(2e-3, 3.14e-3, 8e-3, 2e-3).ms == "3.1 ms (2 to 8)"


def test_the_record_has_the_programs_of_the_tool_and_says_where_times_are_from():
    rows = {row["name"]: row for row in RECORD["programs"]}
    assert {"ssd", "retention"} <= rows.keys() and len(rows) >= 16
    assert list(rows) == list(record_calibration.PROGRAMS)
    assert RECORD["measured"] == record_calibration.SOURCE
    for (there, what, ms, *_), row in zip(
        record_calibration.PROGRAMS.values(), rows.values(), strict=True
    ):
        said = row["name_there"], row["what"], row["measured_ms"]
        assert said == (there, what, ms)
        least = max(row["flops"] / CHIP.flops, row["bytes"] / CHIP.bandwidth)
        assert row["roofline_ms"] == pytest.approx(1e3 * least, rel=1e-3)
        assert row["cycles"] > 0 and "libtpu" in row["versions"]


@pytest.mark.parametrize("name", ["rms_norm", "relu"])
def test_compiling_a_recorded_program_again_gives_the_same_counts(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    (row,) = (row for row in RECORD["programs"] if row["name"] == name)
    if versions("libtpu") != row["versions"]:
        pytest.skip("recorded with another compiler")
    *_, fn, args = record_calibration.PROGRAMS[name]
    with (
        jax.default_matmul_precision("default"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        made = compile_for(fn, *args, target=estimates.TARGET)
    counts = made.cycles, made.flops, made.bytes
    assert counts == (row["cycles"], row["flops"], row["bytes"])
