"""Compile for a target and read what XLA made of the program.

    compile_for(ssd_chunked, x, dt, A, B, C, target="tpu-v6e").show()

The table lists every kernel of the scheduled program: what it computes, how often it
runs, the bytes it moves, the cycles that the compiler expects, and the line of JAX that
it came from. Needs no device of the target: see `targets`.
"""

import datetime
import gzip
import json
import linecache
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import jax
import jaxlib

from ssdlib import hlo_cost, hlo_text, hlo_view
from ssdlib.targets import CompilerMissing, compile_with

__all__ = [
    "RECORDS",
    "Compiled",
    "CompilerMissing",
    "Op",
    "compile_for",
    "diff",
    "has_record",
    "load_record",
]

_HERE = Path(__file__).parent  # a wheel carries the records, a checkout has the book
RECORDS = next(
    (p for p in (_HERE / "results", _HERE.parent / "book/results") if p.exists()),
    _HERE / "results",
)


@dataclass(frozen=True)
class Op:
    """One kernel of a compiled program. Amounts count all its executions."""

    name: str
    opcode: str  # of HLO: fusion, dot, copy, ...
    kind: str  # product, reduce, elementwise, gather, copy, transfer, custom, other
    inside: tuple[str, ...]  # opcodes of a fusion, else empty
    shape: str
    memory: str  # where the result goes: main, or fast (VMEM)
    times: int
    flops: float
    bytes: float  # to and from main memory
    cycles: int | None  # the compiler's estimate; None where it gives none
    primitive: str  # of JAX: dot_general, exp, ...
    scope: str  # jax.named_scope and function names
    source: str  # file:line
    code: str  # that line
    inputs: tuple[str, ...]  # names of the kernels that it reads from


@dataclass(frozen=True)
class Compiled:
    """A program as compiled for one target."""

    target: str
    origin: str  # attached, absent (compiled only) or recorded
    versions: dict[str, str]
    date: str
    compile_seconds: float
    memory: dict[str, int]  # bytes: argument, output, temp, alias
    unknown_loops: int  # loops whose trip count is not in the text: counted once
    ops: tuple[Op, ...]
    hlo: str  # the text; a record keeps it without layouts and metadata

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

    def graph(self) -> hlo_view.Graph:
        """The kernels and the arrays between them, as SVG. For up to 60 kernels."""
        return hlo_view.Graph(self)

    def excerpt(self, name: str, layouts: bool = False) -> str:
        """The text of one kernel: a fusion's computation, or its one line."""
        module = hlo_text.parse(self.hlo)
        for computation in module.computations.values():
            if name in computation.instructions:
                i = computation.instructions[name]
                called = i.called("calls") if i.opcode == "fusion" else []
                return hlo_text.excerpt(self.hlo, name, called, layouts)
        raise ValueError(f"name: {name!r} is no instruction of this program")

    def save(self, name: str) -> None:
        """Write a record: JSON without paths, layouts kept, long texts left out."""
        path = _path(name, self.target)
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        text = hlo_text.strip(self.hlo)
        data["hlo"] = text if len(text) < 60_000 else ""
        data["columns"] = [f.name for f in fields(Op)]
        data["ops"] = [astuple(op) for op in self.ops]
        packed = gzip.compress(json.dumps(data).encode(), 9, mtime=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed)


def compile_for(fn, *args, target="cpu", donate_argnums=()) -> Compiled:
    """Compile fn(*args) for a chip, attached or not, and read the result.

    Targets: cpu, tpu-v5e, tpu-v5p, tpu-v6e, tpu-7x, t4, a100, l4, l40s, h100. Arrays
    and `ShapeDtypeStruct`s are traced, anything else is static; nothing is run and no
    absent device is initialized. Products have the precision that
    `jax.default_matmul_precision` says.

    Raises ValueError for an unknown target, and CompilerMissing (an ImportError) that
    names the extra to install.
    """
    compiled, origin, seconds = compile_with(target, fn, args, donate_argnums)
    text = compiled.as_text()
    stats = compiled.memory_analysis()
    memory = {
        name: getattr(stats, f"{name}_size_in_bytes")
        for name in ("argument", "output", "temp", "alias")
    }
    ops, unknown = _table(hlo_text.parse(text))
    return Compiled(
        target=target,
        origin=origin,
        versions=_versions(target),
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
        cells |= {k: tuple(cells[k]) for k in ("inside", "inputs")}
        ops.append(Op(**cells))
    return Compiled(**(data | dict(ops=tuple(ops), origin="recorded")))


def has_record(name: str, target: str) -> bool:
    """Whether `load_record` would find one."""
    return _path(name, target).exists()


def _path(name: str, target: str) -> Path:
    return RECORDS / "hlo" / f"{name}@{target}.json.gz"


def diff(*programs: Compiled, names: Sequence[str] | None = None) -> hlo_view.Table:
    """Programs or targets side by side, by kind of kernel; names default to targets."""
    names = names or [p.target for p in programs]
    return hlo_view.compare(dict(zip(names, programs, strict=True)))


def _versions(target: str) -> dict[str, str]:
    from importlib import metadata

    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    package = {"tpu": "libtpu", "cpu": None}.get(target[:3], "jax-cuda12-pjrt")
    if package:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


# --- the table -----------------------------------------------------------------------

_DATA = set(
    "copy transpose reshape broadcast slice dynamic-slice dynamic-update-slice pad "
    "concatenate reverse iota convert bitcast-convert".split()
)


def _table(module: hlo_text.Module) -> tuple[tuple[Op, ...], int]:
    """(the ops, number of kernels whose loop has an unknown trip count)."""
    ops, unknown, seen = [], 0, set()
    for i, at, times in hlo_cost.executed(module):
        unknown += times is None
        times = times or 1
        main, _ = hlo_cost.traffic(module, i, at)
        pairs = hlo_cost.inside(module, i)
        opcodes = sorted({j.opcode for j, _ in pairs} - hlo_cost.FREE)
        scope, primitive, source, code = _origin(module, i, at, pairs)
        kind = _kind(i, opcodes)
        if kind == "custom":
            primitive = re.search(r'custom_call_target="([^"]*)"', i.attributes)[1]
        seen.add(i.name)
        ops.append(
            Op(
                name=i.name,
                opcode=i.opcode,
                kind=kind,
                inside=tuple(opcodes),
                shape=" ".join(map(str, i.shapes)),
                memory="fast" if i.shapes and i.shapes[0].space else "main",
                times=times,
                flops=float(times * hlo_cost.flops(module, i, at)),
                bytes=float(times * main),
                cycles=None if i.cycles is None else times * i.cycles,
                primitive=primitive,
                scope=scope,
                source=source,
                code=code,
                inputs=tuple(_producers(module, at, i, seen)),
            )
        )
    return tuple(ops), unknown


def _kind(i: hlo_text.Instruction, opcodes: list[str]) -> str:
    found = set(opcodes) if i.opcode == "fusion" else {i.opcode}
    if i.opcode == "custom-call":
        return "product" if "__cublas$gemm" in i.attributes else "custom"
    if i.opcode.endswith("-start"):
        return "transfer"
    if found & {"dot", "convolution"}:
        return "product"
    if found & {"reduce", "reduce-window"}:
        return "reduce"
    if found & {"gather", "scatter"}:
        return "gather"
    if found <= _DATA:
        return "copy"
    return "elementwise" if found <= _DATA | hlo_cost.ARITHMETIC else "other"


def _origin(module, i, at, pairs) -> tuple[str, str, str, str]:
    """(scope, primitive, file:line, code) of the JAX operation behind a kernel."""
    products = [j for j, _ in pairs if j.opcode in ("dot", "convolution")]
    for j in [*products, i, *(j for j, _ in reversed(pairs))]:
        if found := _metadata(module, j):
            return found
    opcode = (products or [*(j for j, _ in pairs), i])[-1].opcode
    users, found = [i], None
    while users and not found:  # what the compiler inserts has no name: who needs it?
        users = [user for j in users[:1] for user in at.users(j.name)]
        insides = (j for user in users for j, _ in hlo_cost.inside(module, user))
        found = next(filter(None, (_metadata(module, j) for j in users)), None)
        found = found or next(
            filter(None, (_metadata(module, j) for j in insides)), None
        )
    if not found:
        return "", opcode, "", ""
    scope, primitive, source, code = found
    if primitive.startswith(opcode):  # a rewrite left the name to a bitcast
        return scope, primitive, source, code
    return scope, opcode, source, f"→ {code}"


def _metadata(module, i):
    name = re.search(r'op_name="([^"]*)"', i.attributes)
    frame = re.search(r"stack_frame_id=(\d+)", i.attributes)
    if not name or not frame:
        return None
    scope, _, primitive = name[1].rpartition("/")
    file, line = module.frames.get(int(frame[1]), ("", 0))
    short = "cell" if "ipykernel" in file else Path(file).name
    code = linecache.getline(file, line).strip()
    return scope, primitive, f"{short}:{line}", code


def _producers(module, at, i, seen):
    """Kernels whose results i reads, through the instructions that only name values."""
    todo, found = [(at, name) for name in i.operands], {}
    while todo:
        place, name = todo.pop()
        source = place.instructions[name]
        if name in seen and name != i.name:
            found[name] = None
            continue
        whole = place.instructions.get(source.operands[0]) if source.operands else None
        if source.opcode == "get-tuple-element" and whole.opcode in ("while", "call"):
            inner = module.computations[whole.called("body", "to_apply")[0]]
            index = int(re.search(r"index=(\d+)", source.attributes)[1])
            results = inner.root.operands  # of the last pass of the loop
            todo += [(inner, results[index])] if index < len(results) else []
        else:
            todo += [(place, operand) for operand in source.operands]
    return found
