"""Run a program on the attached device and time each of its kernels.

    measure(decode_step, params, config, token, cache, donate_argnums=3).table()

A `Compiled` says what each kernel does, a trace of `jax.profiler` when it ran, and both
know it by the name of its HLO instruction. An instant belongs to the event that started
last of those that run, so that a kernel in a `while` is not counted twice, and

    time of a call = kernels + other events + time outside them all.

Run on CPUs. The rules for a GPU and a TPU are tested on traces written by hand after
openxla/xla: xla/tsl/profiler/utils/xplane_schema.cc (planes and lines),
xla/python/xplane_to_profile_instructions.cc (names). The "end: " of a CPU's kernel is
in xla/backends/cpu/runtime/thunk_executor.cc.
"""

import contextlib
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from ssdlib._checks import check_size
from ssdlib.compiler.hlo import Compiled, read
from ssdlib.compiler.targets import attached, chip_name, compile_with, is_static
from ssdlib.compiler.text import parse
from ssdlib.compiler.view import Table, count

__all__ = ["Profile", "measure", "read_trace"]


@dataclass(frozen=True)
class Profile:
    """The fastest of some calls of a program, kernel by kernel; times in seconds."""

    program: Compiled
    alone: float  # the fastest call without the profiler
    call: float  # the call that was traced, as its caller saw it
    seconds: dict[str, float]  # of each kernel, all its executions
    runs: dict[str, int]  # executions seen
    other: dict[str, float]  # events that are no kernel of the program, as loops

    @property
    def explained(self) -> float:
        """The share of the call in which a kernel of the program ran."""
        return sum(self.seconds.values()) / self.call

    @property
    def caption(self) -> str:
        """How much of the call is explained, and what the profiler itself cost."""
        other = sum(self.other.values()) / self.call
        return (
            f"A call took {1e3 * self.call:.2f} ms with the profiler and "
            f"{1e3 * self.alone:.2f} without: kernels {self.explained:.1%}, other "
            f"events {other:.1%}, outside them all {1 - self.explained - other:.1%}. "
            f"{self.program.caption}"
        )

    def table(self, rows: int = 12, by: str = "line") -> Table:
        """The slowest rows, by "line" of JAX or by "kernel", with the rates reached.

        Bytes and FLOPs are those of the compiled text. Where data stay in a cache, a
        kernel can be faster than main memory.
        """
        label = {"line": "primitive", "kernel": "name"}.get(by)
        if label is None:
            raise ValueError(f'by: {by!r}; it must be "line" or "kernel"')
        groups, made = defaultdict(list), []
        for op in self.program.ops:
            groups[op.kind, getattr(op, label), op.code[:60], op.source].append(op)
        for key, ops in groups.items():
            s = sum(self.seconds.get(name, 0.0) for name in {op.name for op in ops})
            work = sum(op.bytes for op in ops), sum(op.flops for op in ops)
            rates = (f"{w / s / 1e9:.3g}" if s else "-" for w in work)
            runs = sum(op.times for op in ops)
            row = f"{1e3 * s:.3f}", f"{s / self.call:.1%}", runs, *map(count, work)
            made.append((s, (*row, *rates, *key)))
        made.sort(key=lambda pair: -pair[0])
        header = f"ms share runs bytes FLOP GB/s GFLOP/s kind {label} code line".split()
        return Table(header, [row for _, row in made[:rows]], self.caption)


def measure(fn, *args, repeats: int = 5, donate_argnums=()) -> Profile:
    """Compile fn(*args) for the first device, run it, and time its kernels there.

    Arguments without arrays are static; those to donate are copied before each call.
    Calls with and without a profiler take turns, 2 repeats + 1 in all. The fastest of
    each is kept, since what else a machine does only adds time.

    Raises ValueError for shapes without values, and for repeats below 1.
    """
    check_size("repeats", repeats)
    for i, arg in enumerate(args):
        if any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(arg)):
            raise ValueError(f"args: number {i} has shapes only; it must hold arrays")
    device = attached()
    compiled, *how = compile_with(device, fn, args, donate_argnums)
    program = read(chip_name(device), compiled, *how)
    donated = jax.tree.leaves(donate_argnums)
    inputs = {i: a for i, a in enumerate(args) if not is_static(a)}
    inputs = jax.device_put(inputs, device)

    def timed(trace=None) -> float:
        fresh = inputs | {i: jax.tree.map(jnp.copy, inputs[i]) for i in donated}
        jax.block_until_ready(fresh)
        with trace or contextlib.nullcontext():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*fresh.values()))
            return time.perf_counter() - start

    def traced() -> tuple:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would only cost time
        with tempfile.TemporaryDirectory() as folder:
            seconds = timed(jax.profiler.trace(folder, profiler_options=options))
            (path,) = Path(folder).rglob("*.xplane.pb")
            return seconds, *read_trace(path.read_bytes(), program)

    timed()
    alone, calls = zip(*((timed(), traced()) for _ in range(repeats)), strict=True)
    return Profile(program, min(alone), *min(calls, key=lambda call: call[0]))


def read_trace(trace: bytes, program: Compiled) -> tuple[dict, dict, dict]:
    """(seconds and runs of each kernel, seconds of other events) in a trace."""
    names = {re.sub(r"\W", "_", op.name): op.name for op in program.ops}  # on a GPU
    names |= {op.name: op.name for op in program.ops}
    for computation in parse(program.hlo).computations.values():
        for i in computation.instructions.values():
            if i.opcode.endswith(("-update", "-done")):  # waits for what was started
                names[i.name] = names.get(i.operands[0], i.operands[0])
    seconds, other, runs = Counter(), Counter(), Counter()
    events = _events(jax.profiler.ProfileData.from_serialized_xspace(trace))
    for own, (_, _, *known_as) in zip(_own_times(events), events, strict=True):
        kernel = next((names[name] for name in known_as if name in names), None)
        (other if kernel is None else seconds)[kernel or known_as[0]] += own / 1e9
        runs[kernel] += 1
    del runs[None]
    return dict(seconds), dict(runs), dict(other)


def _events(data) -> list[tuple[float, float, str, str]]:
    """(start and stop in ns, two names) of what a device ran, or a CPU's threads."""
    device, host, ends = [], [], {}
    with warnings.catch_warnings():  # of jaxlib's own types; an error ends the process
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in data.planes:
            here = plane.name.startswith("/device:")
            for line in plane.lines:
                if here and not line.name.startswith(("XLA Ops", "Stream")):
                    continue
                for event in line.events:
                    stats, name = dict(event.stats), event.name.split(" = ")[0]
                    if name.startswith("end: "):  # on the thread that came last
                        ends[stats.get("_c")] = event.start_ns
                    elif here or "hlo_op" in stats:
                        name = name.removeprefix("%")  # a TPU gives a line of the text
                        names = stats.get("hlo_op", name), name
                        found = event.start_ns, event.end_ns, stats.get("_p"), *names
                        (device if here else host).append(found)
    return [
        (start, max(stop, ends.get(link, stop)), *names)
        for start, stop, link, *names in device or host
    ]


def _own_times(events) -> list[float]:
    """Nanoseconds in which an event was the last to have started of those that ran."""
    own, marks, running, before = [0.0] * len(events), [], [], 0.0
    for n, (start, stop, *_) in enumerate(events):
        marks += [(start, 0, -stop, n), (stop, 1, 0.0, n)]  # of two, the longer first
    for at, stops, _, n in sorted(marks):
        if running:
            own[running[-1]] += at - before
        before = at
        (running.remove if stops else running.append)(n)
    return own
