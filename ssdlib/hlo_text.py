"""Read the text of a compiled program: instructions, trip counts, FLOPs, bytes.

    computation:  %name (parameters) -> type { instructions }
    instruction:  [ROOT] %name = type opcode(operands), attributes

A program starts at its ENTRY computation. `while` names a body that runs many times, a
fusion names a computation that runs as one kernel, and each instruction says which line
of Python it came from. `executed` walks all that and returns what runs.
Source: the HLO grammar of openxla/xla, xla/hlo/parser/hlo_parser.cc; the FLOP
conventions are those of xla/service/hlo_cost_analysis.cc.
"""

import json
import math
import re
from dataclasses import dataclass, field

__all__ = ["Instruction", "Module", "executed", "parse"]

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_TRANSCENDENTAL = set(
    "exponential exponential-minus-one log log-plus-one logistic power sqrt cbrt rsqrt "
    "tanh tan sine cosine erf atan2".split()
)
_ELEMENTWISE = set(
    "abs add and ceil clamp compare count-leading-zeros divide floor is-finite maximum "
    "minimum multiply negate not or popcnt remainder round-nearest-afz "
    "round-nearest-even select shift-left shift-right-arithmetic shift-right-logical "
    "sign subtract xor".split()
)
ARITHMETIC = _TRANSCENDENTAL | _ELEMENTWISE
FREE = set(  # names for values, not work
    "parameter constant tuple get-tuple-element bitcast after-all partition-id "
    "replica-id add-dependency opt-barrier".split()
)


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


# --- what runs -----------------------------------------------------------------------


def executed(module: Module) -> list[tuple[Instruction, Computation, int | None]]:
    """(instruction, its computation, times) for all that runs, in order.

    Loop bodies count as often as they run; times is None where the text does not tell
    (then also for loops inside). Of a conditional's branches the one with the most
    work counts. The insides of a fusion are not listed: they are one kernel.
    """
    return list(_walk(module, module.entry, 1))


def _walk(module, name, times):
    computation = module.computations[name]
    for i in computation.instructions.values():
        if i.opcode == "while":
            trips = trip_count(module, computation, i)
            total = None if None in (trips, times) else trips * times
            yield from _walk(module, i.called("body")[0], total)
        elif i.opcode == "conditional":
            names = i.called(
                "branch_computations", "true_computation", "false_computation"
            )
            branches = [list(_walk(module, name, times)) for name in names]
            yield from max(branches, key=lambda branch: _weight(module, branch))
        elif i.opcode == "call":
            yield from _walk(module, i.called("to_apply")[0], times)
        elif i.opcode == "async-start":
            yield from _walk(module, i.called("calls")[0], times)
        elif i.opcode not in FREE and not i.opcode.endswith(("-done", "-update")):
            if "AllocateBuffer" not in i.attributes:  # a name for memory, no call
                yield i, computation, times


def _weight(module, branch):
    """FLOPs plus bytes: which branch of a conditional is the costly one."""
    return sum(flops(module, i, at) + traffic(module, i, at)[1] for i, at, _ in branch)


def trip_count(module: Module, computation: Computation, loop: Instruction):
    """How often a `while` runs its body; None if the text does not tell.

    Given by the compiler, or read off a condition `i < n` where i starts at a constant
    and the loop counts by 1, as every scan of JAX does.
    """
    known = loop.config.get("known_trip_count")
    if known:
        return int(known["n"])
    condition = module.computations[loop.called("condition")[0]]
    root, at = condition.root, condition
    operands = [at.instructions[name] for name in root.operands]
    if root.opcode == "fusion":
        root = module.computations[root.called("calls")[0]].root
    limits = [int(o.literal) for o in operands if o.opcode == "constant"]
    counters = [o for o in operands if o.opcode == "get-tuple-element"]
    if "direction=LT" not in root.attributes or len(limits) != 1 or len(counters) != 1:
        return None
    index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    start = computation.instructions[loop.operands[0]]
    while start.opcode in ("tuple", "copy"):
        name = start.operands[index if start.opcode == "tuple" else 0]
        start = computation.instructions[name]
    return limits[0] - int(start.literal) if start.opcode == "constant" else None


# --- work of one instruction ---------------------------------------------------------


def inside(module: Module, i: Instruction) -> list[tuple[Instruction, Computation]]:
    """The instructions of a fusion, nested ones too, each with its computation."""
    found = []
    for name in i.called("calls") if i.opcode == "fusion" else []:
        computation = module.computations[name]
        for j in computation.instructions.values():
            found += inside(module, j) if j.opcode == "fusion" else [(j, computation)]
    return found


def flops(module: Module, i: Instruction, at: Computation) -> int:
    """FLOPs of one execution: 2 a multiply-add, 1 for other arithmetic, 0 for exp."""
    if i.opcode == "fusion":
        return sum(flops(module, *j) for j in inside(module, i))
    out = sum(s.size for s in i.shapes)
    shapes = [s for name in i.operands for s in at.instructions[name].shapes]
    if i.opcode == "dot":
        dims = i.ints("lhs_contracting_dims")
        return 2 * out * math.prod(shapes[0].dims[d] for d in dims)
    if i.opcode == "convolution":
        return 2 * _convolution(i, shapes)
    if i.opcode == "custom-call" and "__cublas$gemm" in i.attributes:
        config = i.config.get("gemm_backend_config", {})
        dims = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        return 2 * i.shapes[0].size * math.prod(shapes[0].dims[int(d)] for d in dims)
    if i.opcode == "reduce":
        arrays = shapes[: len(shapes) // 2]
        return max(s.size for s in arrays) - i.shapes[0].size
    if i.opcode == "reduce-window":
        window = re.search(r"size=([\dx]+)", i.attributes)[1]
        return i.shapes[0].size * (math.prod(map(int, window.split("x"))) - 1)
    return out if i.opcode in _ELEMENTWISE else 0


def _convolution(i: Instruction, shapes: list[Shape]) -> int:
    """Multiply-adds; taps that fall into the padding or between rows do not count.

    libtpu writes batched products as convolutions with such taps.
    """
    _, kernel_labels, out_labels = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes
    ).groups()
    lhs_labels = re.search(r"dim_labels=(\w+)_", i.attributes)[1]
    lhs, kernel, out = shapes[0].dims, shapes[1].dims, i.shapes[0].dims
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    options = dict(p.split("=") for p in window[1].split()) if window else {}

    def option(key, d, default):
        return options[key].split("x")[d] if key in options else default

    total = kernel[kernel_labels.index("i")] * math.prod(
        n for n, label in zip(out, out_labels, strict=True) if not label.isdigit()
    )
    for d in range(sum(c.isdigit() for c in out_labels)):
        n_in, n_out = lhs[lhs_labels.index(str(d))], out[out_labels.index(str(d))]
        stride, low = int(option("stride", d, 1)), option("pad", d, "0_0").split("_")[0]
        spread, step = int(option("lhs_dilate", d, 1)), int(option("rhs_dilate", d, 1))
        taps = kernel[kernel_labels.index(str(d))]
        places = (
            o * stride + k * step - int(low) for o in range(n_out) for k in range(taps)
        )
        total *= sum(p % spread == 0 and 0 <= p // spread < n_in for p in places)
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    return total // (int(groups[1]) if groups else 1)


def traffic(module: Module, i: Instruction, at: Computation) -> tuple[float, float]:
    """(bytes to and from main memory, bytes to and from all memories), one execution.

    Every operand is read once and the result written once. Only the slice counts where
    a slice of an operand is read, and only the update where a part is overwritten.
    """
    if i.opcode.endswith("-start"):  # (to, from, ...), or (from, to, ...)
        n = min(s.nbytes for s in i.shapes[:2])
        return n * sum(not s.space for s in i.shapes[:2]), 2 * n
    parts = [  # (shape, bytes that move), operands then results
        (source.shapes[0], _read_by(module, at, source, i))
        for name in dict.fromkeys(i.operands)
        if (source := at.instructions[name]).shapes
    ]
    parts += zip(i.shapes, _written(module, at, i), strict=True)
    main = sum(n for shape, n in parts if not shape.space)
    return main, sum(n for _, n in parts)


def _read(module, at, value):
    """Bytes of `value` that its users read: the slices, if all of them slice."""
    full = sum(s.nbytes for s in value.shapes)
    return min(
        full, sum(_read_by(module, at, value, user) for user in at.users(value.name))
    )


def _read_by(module, at, value, user):
    full = sum(s.nbytes for s in value.shapes)
    first = bool(user.operands) and user.operands[0] == value.name
    if user.opcode in ("slice", "dynamic-slice", "gather") and first:
        return sum(s.nbytes for s in user.shapes)
    if user.opcode in ("dynamic-update-slice", "scatter") and first:
        return 0
    if user.opcode in ("bitcast", "reshape") and at.users(user.name):
        return _read(module, at, user)
    if user.opcode == "fusion":
        body = module.computations[user.called("calls")[0]]
        numbers = [n for n, name in enumerate(user.operands) if name == value.name]
        return min(full, sum(_read(module, body, body.parameter(n)) for n in numbers))
    return full


def _written(module, at, i) -> list[float]:
    """Bytes written of each result of i."""
    if i.opcode == "fusion":
        body = module.computations[i.called("calls")[0]]
        return _written(module, body, body.root)
    operands = [at.instructions[name] for name in i.operands]
    if i.opcode == "tuple":
        return [n for o in operands for n in _written(module, at, o)]
    if i.opcode == "bitcast":
        return _written(module, at, operands[0])
    if i.opcode in ("dynamic-update-slice", "scatter"):
        operands = operands[1:2] if i.opcode[0] == "d" else operands[-1:]
        return [operands[0].shapes[0].nbytes]
    if i.opcode == "parameter":  # passed on, not written
        return [0.0 for _ in i.shapes]
    return [s.nbytes for s in i.shapes]
