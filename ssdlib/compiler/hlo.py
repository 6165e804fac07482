"""Compile for a target and read what XLA made of the program.

    compile_for(ssd_chunked, x, dt, A, B, C, target="tpu-v6e").show()

The table lists every kernel of the scheduled program: what it computes, how often it
runs, the bytes it moves, the cycles that the compiler expects, and the line of JAX that
it came from. Needs no device of the target: see `targets`.
"""

import datetime
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ssdlib._checks import check_is
from ssdlib.compiler import text as hlo_text
from ssdlib.compiler import view as hlo_view
from ssdlib.compiler.ops import Op, table
from ssdlib.compiler.targets import CompilerMissing, compile_with, versions

__all__ = [
    "RECORDS",
    "Compiled",
    "CompilerMissing",
    "Op",
    "compile_for",
    "diff",
    "has_record",
    "load_record",
    "read",
]

# A wheel carries the records, a checkout has the book.
_HERE = Path(__file__).parents[1]
_BOOK = _HERE.parent / "book/results"
RECORDS = _BOOK if _BOOK.exists() else _HERE / "results"
COMPILERS = {"tpu": ["libtpu"], "cpu": []}  # beside jaxlib
OF_GPUS = "jax-cuda12-pjrt", "jax-cuda13-pjrt"


@dataclass(frozen=True)
class Compiled:
    """A program as compiled for one target."""

    target: str
    origin: str  # attached, absent (compiled only) or recorded
    versions: dict[str, str]
    date: str
    compile_seconds: float
    memory: dict[str, int]  # bytes: argument, output, temp, alias
    unknown_loops: int  # kernels of loops whose trips the text does not tell: once
    ops: tuple[Op, ...]
    hlo: str  # the text; a record keeps it without metadata

    @property
    def flops(self) -> float:
        """All FLOPs, loops multiplied out: 2 a multiply-add, 1 other arithmetic."""
        return sum((op.flops for op in self.ops), 0.0)

    @property
    def bytes(self) -> float:
        """Bytes to and from main memory if every kernel reads and writes there."""
        return sum((op.bytes for op in self.ops), 0.0)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimates summed, loops multiplied out: a model, no time.

        Transfers to fast memory have none. A program that hides its reads behind other
        work can therefore seem faster than memory allows; see `roofline`.
        """
        cycles = [op.cycles for op in self.ops if op.cycles is not None]
        return sum(cycles) if cycles else None

    @property
    def fusions(self) -> int:
        """Fusions in the program; one in a loop body counts once."""
        return sum(op.opcode == "fusion" for op in self.ops)

    @property
    def launches(self) -> int:
        """Kernels executed, loops multiplied out."""
        return sum(op.times for op in self.ops)

    @property
    def custom_calls(self) -> dict[str, int]:
        """Calls of code that XLA did not generate, by name."""
        return dict(Counter(op.primitive for op in self.ops if op.kind == "custom"))

    @property
    def caption(self) -> str:
        """Where these numbers come from: target, compiler, date, device or none."""
        versions = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        how = {
            "attached": "compiled here for the attached device",
            "absent": "compiled here, no such device attached",
        }.get(self.origin, f"recorded on {self.date}")
        return f"{self.target}: {how}, with {versions}."

    def show(self, rows: int = 20, by: str = "line") -> hlo_view.Table:
        """A table, by "line" of JAX (the costliest first) or by "kernel" (in order)."""
        views = {"line": hlo_view.lines, "kernel": hlo_view.kernels}
        if by not in views:
            raise ValueError(f'by: {by!r}; it must be "line" or "kernel"')
        return views[by](self, rows)

    def excerpt(self, name: str, layouts: bool = False) -> str:
        """The text of one kernel: a fusion's computation, or its one line."""
        module = hlo_text.parse(self.hlo)
        for computation in module.computations.values():
            if name in computation.instructions:
                i = computation.instructions[name]
                called = i.called("calls") if i.opcode == "fusion" else []
                return hlo_text.excerpt(self.hlo, name, called, layouts)
        recorded = "; the record of a long one keeps only what is sent to other devices"
        why = recorded if self.origin == "recorded" else ""
        raise ValueError(f"name: {name!r} is no instruction of this program{why}")

    def save(self, name: str) -> None:
        """Write a record: JSON without paths, layouts kept.

        Of a long text only what is sent to other devices is kept.
        """
        path = _path(name, self.target)
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        text = hlo_text.strip(self.hlo)
        data["hlo"] = text if len(text) < 80_000 else hlo_text.only_collectives(text)
        data["columns"] = [f.name for f in fields(Op)]
        data["ops"] = [astuple(op) for op in self.ops]
        packed = gzip.compress(json.dumps(data).encode(), 9, mtime=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed)


def compile_for(fn, *args, target="cpu", donate_argnums=()) -> Compiled:
    """Compile fn(*args) for a chip, attached or not, and read the result.

    Targets: cpu, tpu-v5e, tpu-v5p, tpu-v6e, tpu-7x, t4, l4, l40s, a100, h100, h200.
    Arrays and `ShapeDtypeStruct`s are traced, anything else is static; nothing is run
    and no absent device is initialized. Products have the precision that
    `jax.default_matmul_precision` says.

    Raises ValueError for an unknown target, and CompilerMissing (an ImportError) that
    names the extra to install.
    """
    return read(target, *compile_with(target, fn, args, donate_argnums))


def read(target: str, compiled, origin: str, seconds: float) -> Compiled:
    """What is in a program that jax has compiled, for one device or for many."""
    text = compiled.as_text()
    stats = compiled.memory_analysis()
    memory = {
        name: getattr(stats, f"{name}_size_in_bytes")
        for name in ("argument", "output", "temp", "alias")
    }
    ops, unknown = table(hlo_text.parse(text))
    return Compiled(
        target=target,
        origin=origin,
        versions=versions(*COMPILERS.get(target[:3], OF_GPUS)),
        date=datetime.date.today().isoformat(),
        compile_seconds=round(seconds, 2),
        memory=memory,
        unknown_loops=unknown,
        ops=ops,
        hlo=text,
    )


def load_record(name: str, target: str) -> Compiled:
    """A recorded compilation; needs no compiler. OSError if there is none."""
    data = json.loads(gzip.decompress(_path(name, target).read_bytes()))
    columns = data.pop("columns")
    ops = []
    for row in data.pop("ops"):
        cells = dict(zip(columns, row, strict=True))
        ops.append(Op(**(cells | {"inside": tuple(cells["inside"])})))
    return Compiled(**(data | dict(ops=tuple(ops), origin="recorded")))


def has_record(name: str, target: str) -> bool:
    """Whether `load_record` would find one."""
    return _path(name, target).exists()


def _path(name: str, target: str) -> Path:
    return RECORDS / "hlo" / f"{name}@{target}.json.gz"


def diff(*programs: Compiled, names: Sequence[str] | None = None) -> hlo_view.Table:
    """Programs or targets side by side, by kind of kernel; names default to targets."""
    for program in programs:
        check_is("programs", program, Compiled)
    names = names or [p.target for p in programs]
    return hlo_view.compare(dict(zip(names, programs, strict=True)))
