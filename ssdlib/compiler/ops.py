"""One row for each kernel of a compiled program: its work and its line of JAX."""

import linecache
import re
from dataclasses import dataclass
from pathlib import Path

from ssdlib.compiler import cost as hlo_cost
from ssdlib.compiler import text as hlo_text

__all__ = ["Op", "table"]


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


_DATA = set(
    "copy transpose reshape broadcast slice dynamic-slice dynamic-update-slice pad "
    "concatenate reverse iota convert bitcast-convert".split()
)


def table(module: hlo_text.Module) -> tuple[tuple[Op, ...], int]:
    """(the ops, number of kernels whose loop has an unknown trip count)."""
    ops, unknown = [], 0
    for i, at, times in hlo_cost.executed(module):
        unknown += times is None
        times = times or 1
        main, _ = hlo_cost.bytes_moved(module, i, at)
        pairs = hlo_cost.inside(module, i)
        opcodes = sorted({j.opcode for j, _ in pairs} - hlo_cost.FREE)
        scope, primitive, source, code = _origin(module, i, at, pairs)
        kind = _kind(i, opcodes)
        if kind == "custom":
            primitive = re.search(r'custom_call_target="([^"]*)"', i.attributes)[1]
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
            )
        )
    return tuple(ops), unknown


def _kind(i: hlo_text.Instruction, opcodes: list[str]) -> str:
    found = set(opcodes) if i.opcode == "fusion" else {i.opcode}
    if i.opcode == "custom-call":
        return "product" if hlo_cost.GEMM.search(i.attributes) else "custom"
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
    user, names = i, []
    while not names and (users := at.users(user.name)):  # the compiler's own: for what?
        inner = [j for user in users for j, _ in hlo_cost.inside(module, user)]
        names = [m for j in [*users, *inner] if (m := _metadata(module, j))]
        user = users[0]
    if opcode in ("dot", "convolution"):  # a rewrite left the name to a bitcast
        for name in names:
            if name[1].startswith(("dot_general", "conv_general")):
                return name
    if names:
        scope, _, source, code = names[0]
        return scope, opcode, source, f"→ {code}"
    return "", opcode, "", ""


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
