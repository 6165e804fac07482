"""Read the text of a compiled program.

    computation:  %name (parameters) -> type { instructions }
    instruction:  [ROOT] %name = type opcode(operands), attributes

A program starts at its ENTRY computation. `while` names a body that runs many times, a
fusion names a computation that runs as one kernel, and each instruction says which line
of Python it came from.
Source: the HLO grammar of openxla/xla, xla/hlo/parser/hlo_parser.cc.
"""

import json
import math
import re
from dataclasses import dataclass, field

__all__ = [
    "COLLECTIVES",
    "Computation",
    "Instruction",
    "Module",
    "Shape",
    "excerpt",
    "only_collectives",
    "parse",
    "strip",
]

COLLECTIVES = (  # opcodes that send something to another device
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's type."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # memory space: 0 is the main memory, on a TPU 1 is VMEM
    order: str  # minor-to-major, as in "1,0"

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.search(r"\d+", self.dtype)[0])
        return self.size * bits / 8

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # one array, or those of a tuple
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: str = ""  # what stands in the parentheses

    def called(self, *keys: str) -> list[str]:
        """Names of the computations given as `key=%name` or `key={%a, %b}`."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if match:
                found += re.findall(r"[\w.\-]+", match[1])
        return found

    def ints(self, key: str) -> list[int]:
        """An attribute such as lhs_contracting_dims={1,2}."""
        match = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in match[1].split(",") if n] if match else []

    @property
    def config(self) -> dict:
        """backend_config: what the compiler notes for itself, in JSON."""
        _, found, text = self.attributes.partition("backend_config=")
        if not found or not text.startswith("{"):
            return {}
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except json.JSONDecodeError:
            return {}

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate for one execution; TPU only."""
        window = self.config.get("window_config", {})
        cycles = window.get("estimated_cycles")
        return None if cycles is None else int(cycles)


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def parameter(self, number: int) -> Instruction:
        """The parameter of this number."""
        return next(
            i
            for i in self.instructions.values()
            if i.opcode == "parameter" and i.literal == str(number)
        )

    def users(self, name: str) -> list[Instruction]:
        """Instructions that read `name`."""
        return [i for i in self.instructions.values() if name in i.operands]


@dataclass
class Module:
    """A program: its computations, and where its lines come from."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, int]]  # stack_frame_id: (file, line), innermost


def parse(text: str) -> Module:
    """Parse what `compiled.as_text()` returns."""
    computations, entry, current = {}, "", None
    tables = {"FileNames": {}, "FileLocations": {}, "StackFrames": {}}
    table = None
    for line in text.splitlines():
        if current is None and line in ("FileNames", "FunctionNames", *tables):
            table = tables.get(line)
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
        elif start := _START.match(line):
            current = computations[start[2]] = Computation(start[2])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (head := _HEAD.match(line)):
            instruction = _instruction(head[2], head[3], bool(head[1]))
            current.instructions[instruction.name] = instruction
    return Module(computations, entry, _frames(**tables))


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    """Split `type opcode(operands), attributes`; types and operands nest brackets."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    literal = rest[len(opcode) + 1 : end - 1]
    shapes = tuple(_shape(*match) for match in _SHAPE.findall(kind))
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, opcode, shapes, operands, rest[end:], root, literal)


def _closing(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"text: no closing parenthesis in {text[:80]!r}")


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    return Shape(dtype, sizes, int(space[1]) if space else 0, layout.split(":")[0])


def _frames(FileNames, FileLocations, StackFrames) -> dict[int, tuple[str, int]]:
    """Join the three tables that the text starts with."""
    files = {k: v.strip('"') for k, v in FileNames.items()}
    places = {}
    for k, row in FileLocations.items():
        entry = dict(pair.split("=") for pair in row.strip("{}").split())
        places[k] = files[int(entry["file_name_id"])], int(entry["line"])
    frames = {}
    for k, row in StackFrames.items():
        at = int(re.search(r"file_location_id=(\d+)", row)[1])
        frames[k] = places.get(at, ("", 0))
    return frames


# --- text to show --------------------------------------------------------------------


def strip(text: str) -> str:
    """The program without metadata, file names and backend settings."""
    keep, table = [], False
    for line in text.splitlines():
        table = line in (
            "FileNames",
            "FunctionNames",
            "FileLocations",
            "StackFrames",
        ) or (table and bool(re.match(r"\d+ |$", line)))
        if not table:
            keep.append(_strip_line(line, layouts=True))
    return "\n".join(keep).strip("\n")


def _strip_line(line: str, layouts: bool) -> str:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    line = re.sub(
        r", (metadata|sharding|frontend_attributes)=\{[^{}]*(\{[^{}]*\}[^{}]*)*\}",
        "",
        line,
    )
    line = line.partition(", backend_config=")[0]
    line = re.sub(r"/\*index=\d+\*/", "", line)
    if known:
        line += f', backend_config={{"known_trip_count":{{"n":"{known[1]}"}}}}'
    return line if layouts else re.sub(r"(\])\{[^{}]*\}", r"\1", line)


def only_collectives(text: str) -> str:
    """The collectives of a program and the instructions whose results they send."""
    keep = set()
    for computation in parse(text).computations.values():
        for i in computation.instructions.values():
            if i.opcode.removesuffix("-start") in COLLECTIVES:
                keep |= {i.name, *i.operands}
    lines, inside = [], []
    for line in text.splitlines() if keep else []:
        if _START.match(line):
            inside = [line]
        elif line.startswith("}"):
            lines += [*inside, line] if len(inside) > 1 else []
        elif (head := _HEAD.match(line)) and head[2] in keep:
            inside.append(line)
    return "\n".join(lines)


def excerpt(text: str, name: str, called: list[str], layouts: bool) -> str:
    """The lines of one instruction and of the computations that it calls."""
    lines, inside = [], False
    for line in text.splitlines():
        start = _START.match(line)
        inside = inside or bool(start and start[2] in called)
        head = _HEAD.match(line)
        if inside or (head and head[2] == name):
            lines.append(_strip_line(line, layouts))
        inside = inside and not line.startswith("}")
    return "\n".join(lines)
