"""What of a compiled program runs, how often, and its work: FLOPs and memory traffic.

Conventions are those of XLA's own cost analysis (openxla/xla,
xla/service/hlo_cost_analysis.cc), which not every compiler reports, and which counts
the body of a loop once: 2 FLOPs a multiply-add, 1 for other arithmetic, 0 for
transcendentals and data movement. Conversions are data movement here; a sort and an
FFT count nothing.
"""

import math
import re

from ssdlib.compiler.text import (
    COLLECTIVES,
    Computation,
    Instruction,
    Module,
    Shape,
    parse,
)

__all__ = [
    "bytes_moved",
    "collectives",
    "executed",
    "flops",
    "inside",
    "trip_count",
]

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
MOVES = "copy-start", "slice-start", "collective-permute-start"  # one array, elsewhere
GEMM = re.compile(r"__cublas\$(gemm|lt\$matmul)")
_ALONE = re.compile(r"replica_groups=(\[\d+,1\]|\{\{\d+\})")  # groups of one device
_MEMORY_NAMES = "AllocateBuffer", "ConcatBitcast"  # custom calls of libtpu without code


# --- what runs -----------------------------------------------------------------------


def executed(module: Module) -> list[tuple[Instruction, Computation, int | None]]:
    """(instruction, its computation, times) for all that runs, in order.

    Loop bodies count as often as they run; times is None where the text does not say
    (then also for loops inside). Of a conditional's branches the one with the
    most work counts. The insides of a fusion are not listed: they are one kernel.
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
            if not any(f'"{name}"' in i.attributes for name in _MEMORY_NAMES):
                yield i, computation, times


def _weight(module, branch):
    """FLOPs plus bytes: which branch of a conditional is the costly one."""
    return sum(
        (times or 1) * (flops(module, i, at) + bytes_moved(module, i, at)[1])
        for i, at, times in branch
    )


def trip_count(module: Module, computation: Computation, loop: Instruction):
    """How often a `while` runs its body; None if the text does not say.

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
    limits = [o.literal for o in operands if o.opcode == "constant"]
    counters = [o for o in operands if o.opcode == "get-tuple-element"]
    if "direction=LT" not in root.attributes or len(limits) != 1 or len(counters) != 1:
        return None
    index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    start = computation.instructions[loop.operands[0]]
    while start.opcode in ("tuple", "copy"):
        name = start.operands[index if start.opcode == "tuple" else 0]
        start = computation.instructions[name]
    body = module.computations[loop.called("body")[0]]
    if start.opcode != "constant" or body.root.opcode != "tuple":
        return None
    after = body.instructions[body.root.operands[index]]
    if _in_steps(module, body, after, index) != (1, 1):
        return None
    if not all(re.fullmatch(r"-?\d+", v) for v in (limits[0], start.literal)):
        return None
    return max(0, int(limits[0]) - int(start.literal))


def _in_steps(module, at, i, index, arguments=()):
    """(m, n) where a value in the body of a loop is m counter + n; else None."""

    def of(name):
        return _in_steps(module, at, at.instructions[name], index, arguments)

    if i.opcode == "constant":
        return (0, int(i.literal)) if re.fullmatch(r"-?\d+", i.literal) else None
    if i.opcode == "get-tuple-element":
        whole = at.instructions[i.operands[0]].opcode == "parameter" and not arguments
        words = re.findall(r"[\w=]+", i.attributes)
        return (1, 0) if whole and f"index={index}" in words else None
    if i.opcode == "parameter" and arguments:
        return arguments[int(i.literal)]
    if i.opcode in ("copy", "bitcast"):
        return of(i.operands[0])
    if i.opcode == "add":
        a, b = map(of, i.operands)
        return (a[0] + b[0], a[1] + b[1]) if a and b else None
    if i.opcode == "fusion":
        called = module.computations[i.called("calls")[0]]
        values = tuple(map(of, i.operands))
        return _in_steps(module, called, called.root, index, values)
    return None


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (how many, bytes that one device puts in), from a compiled program.

    Counts each instruction once: no loop of these programs holds any.
    """
    found: dict = {}
    for computation in parse(text).computations.values():
        lines = computation.instructions
        for i in lines.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not _ALONE.search(i.attributes):
                sizes = (s.nbytes for name in i.operands for s in lines[name].shapes)
                n, total = found.get(kind, (0, 0))
                found[kind] = n + 1, total + int(sum(sizes))
    return found


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
    if i.opcode == "custom-call" and GEMM.search(i.attributes):
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
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    lhs_labels, kernel_labels, out_labels = labels.groups()
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


def bytes_moved(module: Module, i: Instruction, at: Computation) -> tuple[float, float]:
    """(bytes to and from main memory, bytes to and from all memories), one execution.

    Every operand is read once and the result written once. Only the slice counts where
    a slice of an operand is read, and only the update where a part is overwritten.
    """
    if i.opcode == "all-gather-start":  # its results hold its operands
        all_ = sum(s.nbytes for s in i.shapes)
        return sum(s.nbytes for s in i.shapes if not s.space), all_
    if i.opcode in MOVES:  # (to, from, ...), or (from, to, ...)
        n = min(s.nbytes for s in i.shapes[:2])
        return n * sum(not s.space for s in i.shapes[:2]), 2 * n
    parts = [  # (shape, bytes that move), operands then results
        (source.shapes[0], _read_by(module, at, source, i))
        for name in dict.fromkeys(i.operands)
        if (source := at.instructions[name]).shapes
    ]
    parts += zip(i.shapes, _written(module, at, i), strict=True)
    main = sum((n for shape, n in parts if not shape.space), 0.0)
    return main, sum((n for _, n in parts), 0.0)


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
