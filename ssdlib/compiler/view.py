"""Show compiled programs: tables of kernels, programs side by side, the graph.

A view prints as text and displays as HTML or SVG in a notebook.
"""

import html
import re
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["Graph", "Table", "compare", "count", "kernels", "lines"]

COLORS = {  # of a kernel's kind, in graphs
    "product": "#2f7ed8",
    "reduce": "#d9822b",
    "elementwise": "#2a9d6e",
    "gather": "#8a63d2",
    "custom": "#cc4778",
}


def count(n: float | int | None, unit: str = "") -> str:
    """A number with three digits and a unit: 1.23 MB."""
    if n is None:
        return "-"
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n) < 999.5 or prefix == "T":
            return f"{n:.3g} {prefix}{unit}".rstrip()
        n /= 1000


class Table:
    """Rows of text under a header, with a caption.

    With wrap=True cells are sentences: they break, and know **bold** and `code`.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence],
        caption: str,
        wrap: bool = False,
    ):
        self.header, self.caption, self.wrap = list(header), caption, wrap
        self.rows = [[str(cell) for cell in row] for row in rows]
        self.right = [
            all(c[:1] in "0123456789.-" for c in column)
            for column in zip(*self.rows, strict=True)
        ] or [False] * len(self.header)

    def __repr__(self) -> str:
        grid = [self.header, *self.rows]
        width = [min(60, max(map(len, column))) for column in zip(*grid, strict=True)]
        lines = []
        for row in grid:
            cells = zip(row, width, self.right, strict=True)
            texts = (c[:w].rjust(w) if r else c[:w].ljust(w) for c, w, r in cells)
            lines.append("  ".join(texts).rstrip())
        return "\n".join([*lines, self.caption])

    def _repr_html_(self) -> str:
        show, space = (_marked, "normal") if self.wrap else (_code, "nowrap")
        top = ";vertical-align:top" * self.wrap

        def row(cells, tag):
            style = ["right" if r else "left" for r in self.right]
            parts = (
                f'<{tag} style="text-align:{s};padding:1px 6px{top}">{show(c)}</{tag}>'
                for c, s in zip(cells, style, strict=True)
            )
            return f"<tr>{''.join(parts)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        width = f";min-width:{9 * len(self.header)}rem" if self.wrap else ""
        return (
            '<div style="overflow-x:auto">'
            f'<table style="font-size:75%;white-space:{space}{width}">'
            f"<thead>{row(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
            f"</div><p><small>{html.escape(self.caption)}</small></p>"
        )


def _code(cell: str) -> str:
    text = html.escape(cell)
    return f"<code>{text}</code>" if any(c in cell for c in "[(=_→") else text


def _marked(cell: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(cell))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def lines(program, rows: int) -> Table:
    """Kernels gathered by the line of JAX that they came from, the costliest first.

    Before a line, → means: made by the compiler, for a later kernel of that line.
    """
    groups = defaultdict(list)
    for op in program.ops:
        groups[op.kind, op.primitive, op.source, op.code].append(op)
    cost = program.cycles, program.bytes
    table = []
    for (kind, primitive, source, code), ops in groups.items():
        amounts = _amounts(ops)
        share = _share(amounts, cost)
        largest = _result(max(ops, key=lambda op: op.bytes))
        runs, flops, size, cycles = map(count, amounts)
        row = (runs, kind, primitive, f"{share:.1%}", cycles, size, flops)
        table.append((share, (*row, code[:60], source, largest)))
    table.sort(key=lambda pair: -pair[0])
    header = "runs kind primitive share cycles bytes FLOP code line result".split()
    caption = program.caption
    if len(table) > rows:
        rest = 1 - sum(share for share, _ in table[:rows])
        caption = f"{len(table) - rows} more rows, {rest:.1%} of the cost. {caption}"
    return Table(header, [row for _, row in table[:rows]], caption)


def kernels(program, rows: int) -> Table:
    """Kernels one by one, in the order in which they run."""
    header = "runs kernel kind memory cycles bytes FLOP code line result".split()
    table = [
        (
            *(op.times, op.name[:32], op.kind, op.memory),
            *map(count, (op.cycles, op.bytes, op.flops)),
            *(op.code[:60], op.source, _result(op)),
        )
        for op in program.ops[:rows]
    ]
    more = len(program.ops) - rows
    caption = f"{more} more kernels. " if more > 0 else ""
    return Table(header, table, caption + program.caption)


def compare(programs: dict) -> Table:
    """Programs side by side: kernels, bytes and cycles of every kind, then totals."""
    kinds = [*COLORS, "copy", "transfer", "other"]
    rows = []
    for kind in kinds:
        cells = []
        for program in programs.values():
            ops = [op for op in program.ops if op.kind == kind]
            runs, _, size, cycles = _amounts(ops)
            cells += [count(runs), count(size), count(cycles)] if ops else ["-"] * 3
        if set(cells) != {"-"}:
            rows.append([kind, *cells])
    cells, extra = [], []
    for program in programs.values():
        cells += [count(program.launches), count(program.bytes), count(program.cycles)]
        extra += [program.fusions, sum(program.custom_calls.values()), ""]
    rows += [["all", *cells]]
    for i, title in enumerate(("fusions in the text", "custom calls")):
        picked = [[extra[3 * p + i], "", ""] for p in range(len(programs))]
        rows.append([title, *(c for cell in picked for c in cell)])
    header = ["kind"]
    for name in programs:
        header += [f"{name}: runs", "bytes", "cycles"]
    captions = dict.fromkeys(p.caption for p in programs.values())
    return Table(header, rows, " ".join(captions))


def _result(op) -> str:
    """The first array of the result, and how many more there are."""
    first, *more = op.shape.split(" ")
    return f"{first} +{len(more)}" if more else first


def _amounts(ops):
    cycles = [op.cycles for op in ops if op.cycles is not None]
    return (
        sum(op.times for op in ops),
        sum(op.flops for op in ops),
        sum(op.bytes for op in ops),
        sum(cycles) if cycles else None,
    )


def _share(amounts, cost):
    """Part of the program's cost: of the cycles where there are any, else the bytes."""
    _, _, size, cycles = amounts
    all_cycles, all_bytes = cost
    if all_cycles:
        return (cycles or 0) / all_cycles
    return size / all_bytes if all_bytes else 0.0


class Graph:
    """Kernels as boxes, from top to bottom as data flows; an arrow is an array."""

    def __init__(self, program, limit: int = 60):
        if len(program.ops) > limit:
            raise ValueError(
                f"program: {len(program.ops)} kernels; a graph holds at most {limit}"
            )
        self.program = program
        self.level: dict[str, int] = {}
        for op in program.ops:
            above = [self.level[name] for name in op.inputs if name in self.level]
            self.level[op.name] = 1 + max(above, default=-1)

    def __repr__(self) -> str:
        return "\n".join(
            f"{op.name} <- {', '.join(op.inputs) or 'arguments'}"
            for op in self.program.ops
        )

    def _repr_html_(self) -> str:
        rows = defaultdict(list)
        for op in self.program.ops:
            rows[self.level[op.name]].append(op)
        widest = max(map(len, rows.values()), default=1)
        width, height = 176 * widest, 64 * len(rows)
        at = {
            op.name: (width * (i + 0.5) / len(row), 64 * level + 28)
            for level, row in rows.items()
            for i, op in enumerate(row)
        }
        parts = []
        for op in self.program.ops:
            x, y = at[op.name]
            for name in op.inputs:
                if name in at:
                    x0, y0 = at[name]
                    d = f"M{x0:.0f} {y0 + 20:.0f}L{x:.0f} {y - 21:.0f}"
                    parts.append(f'<path d="{d}" stroke="currentColor" opacity=".45"/>')
        for op in self.program.ops:
            parts.append(self._box(op, *at[op.name]))
        label = f"{len(self.program.ops)} kernels and the arrays between them"
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
            f'style="width:min(100%,{width}px)" fill="none" font-size="11">'
            f"{''.join(parts)}</svg><p><small>{html.escape(self.program.caption)}"
            "</small></p>"
        )

    @staticmethod
    def _box(op, x, y) -> str:
        color = COLORS.get(op.kind, "#7f7f7f")
        title = f"{op.name}: {op.source} {op.code}"
        times = f"{op.times} × " if op.times > 1 else ""
        texts = f"{times}{op.kind}: {op.primitive}"[:28], _result(op)[:28]
        return (
            f"<g><title>{html.escape(title)}</title>"
            f'<rect x="{x - 82:.0f}" y="{y - 20:.0f}" width="164" height="40" rx="5" '
            f'fill="{color}" fill-opacity=".14" stroke="{color}"/>'
            + "".join(
                f'<text x="{x:.0f}" y="{y - 4 + 15 * i:.0f}" text-anchor="middle" '
                f'fill="currentColor">{html.escape(t)}</text>'
                for i, t in enumerate(texts)
            )
            + "</g>"
        )
