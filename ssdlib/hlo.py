"""Compile for a target and read what XLA made of the program.

    compile_for(ssd_chunked, x, dt, A, B, C, target="tpu-v6e").show()

The table lists every kernel of the scheduled program: what it computes, how often it
runs, the bytes it moves, the cycles that the compiler expects, and the line of JAX that
it came from. Needs no device of the target: see `targets`.
"""

import datetime
import linecache
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib

from ssdlib import hlo_text
from ssdlib.targets import compile_with

__all__ = ["Compiled", "Op", "compile_for", "diff"]


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
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes to and from main memory if every kernel reads and writes there."""
        return sum(op.bytes for op in self.ops)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimates summed, loops multiplied out. A model, no clock."""
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
    for i, at, times in hlo_text.executed(module):
        unknown += times is None
        times = times or 1
        main, _ = hlo_text.traffic(module, i, at)
        pairs = hlo_text.inside(module, i)
        opcodes = sorted({j.opcode for j, _ in pairs} - hlo_text.FREE)
        scope, primitive, source, code = _origin(module, i, pairs)
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
                flops=times * hlo_text.flops(module, i, at),
                bytes=times * main,
                cycles=None if i.cycles is None else times * i.cycles,
                primitive=primitive,
                scope=scope,
                source=source,
                code=code,
                inputs=tuple(_producers(at, i, seen)),
            )
        )
    return tuple(ops), unknown


def _kind(i: hlo_text.Instruction, opcodes: list[str]) -> str:
    found = set(opcodes) or {i.opcode}
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
    return "elementwise" if found <= _DATA | hlo_text.ARITHMETIC else "other"


def _origin(module, i, pairs) -> tuple[str, str, str, str]:
    """(scope, primitive, file:line, code) of the JAX operation behind a kernel."""
    products = [j for j, _ in pairs if j.opcode in ("dot", "convolution")]
    candidates = [*products, i, *(j for j, _ in reversed(pairs))]
    for j in candidates:
        name = re.search(r'op_name="([^"]*)"', j.attributes)
        frame = re.search(r"stack_frame_id=(\d+)", j.attributes)
        if name and frame:
            *scope, primitive = name[1].split("/")
            file, line = module.frames.get(int(frame[1]), ("", 0))
            code = linecache.getline(file, line).strip()
            short = "cell" if "ipykernel" in file else Path(file).name
            return "/".join(scope), primitive, f"{short}:{line}", code
    return "", i.opcode, "", ""


def _producers(at, i, seen):
    """Kernels whose results i reads, through the instructions that only name values."""
    todo, found = list(i.operands), []
    while todo:
        source = at.instructions[todo.pop()]
        if source.name in seen and source.name != i.name:
            found.append(source.name)
        else:
            todo += source.operands
    return dict.fromkeys(found)
