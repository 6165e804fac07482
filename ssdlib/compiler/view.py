"""Show compiled programs: tables of kernels, and programs side by side.

A view prints as text and displays as HTML in a notebook.
"""

import html
import re
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["Table", "compare", "count", "kernels", "lines"]

KINDS = "product reduce elementwise gather custom copy transfer other".split()


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
        show = _marked if self.wrap else _code
        top = ";vertical-align:top" * self.wrap

        def row(cells, tag):
            parts = []
            for cell, right in zip(cells, self.right, strict=True):
                side = "right" if right else "left"
                style = f"text-align:{side};padding:1px 6px{top}"
                if len(cell) > 16:  # a long one breaks rather than hide the rest
                    width = 10 if len(cell) > 40 else 6
                    style += f";white-space:normal;min-width:{width}rem"
                parts.append(f'<{tag} style="{style}">{show(cell)}</{tag}>')
            return f"<tr>{''.join(parts)}</tr>"

        columns = len(self.header)
        body = "".join(row(cells, "td") for cells in self.rows)
        wide = " full-width" * (columns > 7)  # a page may use its margin for it
        space = "normal" if self.wrap else "nowrap"
        width = f";min-width:{min(9 * columns, 45)}rem" if self.wrap else ""
        return (
            f'<div class="data{wide}" style="overflow-x:auto">'
            f'<table style="font-size:75%;white-space:{space}{width}">'
            f"<thead>{row(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
            f"</div><p><small>{html.escape(self.caption)}</small></p>"
        )


def _code(cell: str) -> str:
    text = html.escape(cell).replace("/", "/<wbr>")
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
    made, rows = programs.values(), []
    for kind in KINDS:
        found = [[op for op in p.ops if op.kind == kind] for p in made]
        if any(found):
            rows.append([kind])
            for runs, _, size, cycles in map(_amounts, found):
                rows[-1] += [count(runs or None), count(size or None), count(cycles)]
    rows.append(["all"])
    for p in made:
        rows[-1] += [count(p.launches), count(p.bytes), count(p.cycles)]
    rows.append(
        ["fusions in the text", *(c for p in made for c in (p.fusions, "", ""))]
    )
    calls = (sum(p.custom_calls.values()) for p in made)
    rows.append(["custom calls", *(c for n in calls for c in (n, "", ""))])
    header = ["kind"]
    for name in programs:
        header += [f"{name}: runs", "bytes", "cycles"]
    captions = dict.fromkeys(p.caption for p in made)
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
