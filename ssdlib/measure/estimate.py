"""How long a compiled program takes on a chip that is not here, and how sure that is.

    time ≈ scale roofline^(1 - weight) cycles^weight, never below the roofline

The roofline is that of what the compiler made, the cycles are its own estimate. Scale
and weight are fitted, by least squares in logarithms, to programs that were timed on a
real chip (calibration.json, made by tools/record_calibration.py); the scale takes up
the length of a cycle, so no clock is assumed. Each program is also left out of the fit
in turn: the interval is the factor that 95 % of these errors stay below. Chapter 9
shows the fit.
"""

import json
from functools import cache
from typing import NamedTuple

import numpy as np

from ssdlib.compiler.chips import CHIPS
from ssdlib.compiler.hlo import RECORDS
from ssdlib.measure.roofline import Work

__all__ = ["PATH", "TARGET", "Estimate", "estimate", "left_out", "model", "points"]

PATH = RECORDS / "calibration.json"
TARGET = "tpu-v6e"  # times of known programs were at hand for no other chip


class Estimate(NamedTuple):
    """Seconds, or a ratio of two times: an interval, its middle, and the roofline."""

    low: float
    middle: float
    high: float
    roofline: float

    def over(self, other: "Estimate") -> "Estimate":
        """This time over another one; the interval has the worst of both."""
        ends = self.low / other.high, self.middle / other.middle, self.high / other.low
        return Estimate(*ends, self.roofline / other.roofline)

    @property
    def ms(self) -> str:
        """A time: "3.1 ms (2 to 7.6)"."""
        low, middle, high = (_short(1e3 * v) for v in self[:3])
        return f"{middle} ms ({low} to {high})"

    @property
    def times(self) -> str:
        """A ratio: "1.5 times (0.4 to 3.8; rooflines 0.99)"."""
        return "{1:.2g} times ({0:.2g} to {2:.2g}; rooflines {3:.2g})".format(*self)


def _short(v: float) -> str:
    return f"{v:.2g}" if v < 100 else f"{v:.0f}"


class Fit(NamedTuple):
    """The model of time, and the factor of its interval."""

    scale: float
    weight: float
    factor: float = 1.0

    def seconds(self, roofline, cycles):
        """The middle of an estimate, or of many."""
        between = roofline ** (1 - self.weight) * cycles**self.weight
        return np.maximum(roofline, self.scale * between)


def fit(roofline, cycles, seconds) -> Fit:
    """A line through log(seconds / roofline) over log(cycles / roofline)."""
    x, y = np.log(cycles / roofline), np.log(seconds / roofline)
    weight, log_scale = np.polyfit(x, y, 1)
    return Fit(float(np.exp(log_scale)), float(weight))


def left_out(*arrays):
    """Measured over estimated seconds of each program, by a fit to all the others."""
    each = range(len(arrays[0]))
    fits = [fit(*(np.delete(v, i) for v in arrays)) for i in each]
    roofline, cycles, seconds = arrays
    return np.array(
        [seconds[i] / fits[i].seconds(roofline[i], cycles[i]) for i in each]
    )


def points(record: dict) -> list:
    """[rooflines in seconds, cycles, measured seconds] of the recorded programs."""
    rows, chip = record["programs"], CHIPS[TARGET]
    roofline = np.array([Work(r["flops"], r["bytes"]).seconds(chip) for r in rows])
    cycles, ms = (np.array([r[k] for r in rows]) for k in ("cycles", "measured_ms"))
    return [roofline, cycles, 1e-3 * ms]


@cache
def model() -> Fit:
    """The fit to all recorded programs."""
    arrays = points(json.loads(PATH.read_text()))
    error = np.abs(np.log(left_out(*arrays)))
    return fit(*arrays)._replace(factor=float(np.exp(np.quantile(error, 0.95))))


def estimate(program) -> Estimate:
    """Seconds of a program from its target, flops, bytes and cycles, as of `Compiled`.

    Raises ValueError for a chip without measured programs: it has its roofline alone.
    """
    if program.target != TARGET:
        raise ValueError(
            f"program: it is for {program.target}; it must be for {TARGET}, the one "
            "chip with measured programs to hold estimates against"
        )
    least = Work(program.flops, program.bytes).seconds(CHIPS[TARGET])
    middle, factor = float(model().seconds(least, program.cycles)), model().factor
    return Estimate(max(least, middle / factor), middle, middle * factor, least)
