"""The six everyday pictures of the book, each an SVG of lines, boxes and words.

    two_readers · history · assembly_line · traffic_lights · chef · adapter

The introduction shows all six; a chapter shows one again, small, where its idea becomes
exact. Every picture is 350 units wide, so that its words can be read on a phone, takes
the page's ink, and gives each thing its color of `figures.COLOR`.
"""

from html import escape

from IPython.display import HTML, display

from ssdlib.companion.figures import COLOR, INK, css

__all__ = [
    "SMALL",
    "adapter",
    "assembly_line",
    "chef",
    "history",
    "traffic_lights",
    "two_readers",
]

WIDTH, SMALL = 480, 360  # pixels on a wide screen: in the introduction, in a chapter


class Sketch:
    """Marks on a canvas of 350 units, drawn in the order in which they are made."""

    def __init__(self, height: int):
        self.height, self.marks = height, []

    def line(self, *points, of=None, arrow=False, dashed=False, width=1.5):
        """Through (x, y) points; `of` names a thing of `COLOR`, None is ink."""
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        if arrow:  # a head of two strokes, along the last piece
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            u, v = 5 * (x - x0) / length, 5 * (y - y0) / length
            head = (x - u - v, y - v + u), (x, y), (x - u + v, y - v - u)
            path += " M" + " L".join(f"{x:g},{y:g}" for x, y in head)
        dash = "; stroke-dasharray: 3 3" if dashed else ""
        style = f"fill: none; stroke: {_css(of)}; stroke-width: {width}{dash}"
        self.marks.append(f'<path d="{path}" style="{style}"/>')

    def box(self, x, y, w, h, of=None, fill=0.15, edge=1.5, round=3):
        """A rectangle from its upper left corner, filled with so much of its color."""
        style = f"fill: {_css(of)}; fill-opacity: {fill:.2g}; "
        style += f"stroke: {_css(of)}; stroke-width: {edge}"
        place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round}"'
        self.marks.append(f'<rect {place} style="{style}"/>')

    def text(self, x, y, words, of=None, at="middle", size=12):
        """Words whose baseline is y, `at` their start, middle or end."""
        style = f"fill: {_css(of)}; font-size: {size}px; text-anchor: {at}"
        place = f'x="{x:g}" y="{y:g}"'
        self.marks.append(f'<text {place} style="{style}">{escape(words)}</text>')

    def card(self, x, y, w=46, h=30):
        """The card: its writing fades from line to line."""
        self.box(x, y, w, h, "state")
        for i, part in enumerate((0.7, 0.5, 0.6)):
            at = y + (i + 1) * h / 4
            self.line((x + 5, at), (x + 5 + part * (w - 5), at), of="state", width=1)

    def reader(self, x, y, of):
        """Head and shoulders of somebody who reads."""
        self.box(x - 7, y - 30, 14, 14, of, round=7)
        self.line((x - 13, y), (x - 9, y - 11), (x + 9, y - 11), (x + 13, y), of=of)

    def svg(self, alt: str, width: int) -> str:
        style = f"width: min(100%, {width}px); min-width: 0; font-family: inherit"
        about = f'role="img" aria-label="{escape(alt)}" style="{style}"'
        size = f'viewBox="0 0 350 {self.height:g}" xmlns="http://www.w3.org/2000/svg"'
        return f"<svg {about} {size}>{''.join(self.marks)}</svg>"

    def show(self, alt: str, width: int) -> None:
        display(HTML(f'<div class="figure">{self.svg(alt, width)}</div>'))


def _css(thing: str | None) -> str:
    return css(COLOR[thing] if thing else INK)


def two_readers(width: int = WIDTH) -> None:
    """One reader's notebook grows with the text; the other's card does not."""
    s = Sketch(232)
    s.text(8, 16, "after", at="start")
    for x, tokens in ((128, "1 token"), (212, "10 tokens"), (300, "1,000 tokens")):
        s.text(x, 16, tokens)
        s.card(x - 23, 176)
    s.reader(32, 132, "attention")
    s.text(8, 150, "keeps a notebook", "attention", "start")
    for x, pages in ((128, 1), (212, 10), (300, 31)):
        for i in range(pages):
            s.box(x - 26, 127 - 3 * i, 52, 3, "attention", 0.25, 0.7, round=0)
    s.line(
        (274, 33), (283, 27), (292, 34), (301, 27), (310, 34), (326, 28), dashed=True
    )
    s.text(268, 80, "and on", "attention", "end")
    s.reader(32, 206, "state")
    s.text(8, 224, "keeps a card", "state", "start")
    s.text(212, 224, "the same size at every token", "state")
    s.show(
        "Two readers after 1, 10 and 1,000 tokens. The pile of the one with a notebook "
        "grows from one sheet beyond the picture; the card of the other never grows.",
        width,
    )


def history(width: int = WIDTH) -> None:
    """The card after each token, as rows of one triangular table."""
    s, left, top, n = Sketch(226), 132, 46, 5
    s.text(left + 90, 16, "what is left of token", "dual")
    for t in range(n):
        y = top + 32 * t
        s.text(left + 36 * t + 18, 36, str(t + 1))
        s.card(70, y, 40, 25)
        s.text(60, y + 17, f"after {t + 1}", at="end")
        if t:
            s.line((90, y - 6), (90, y - 1), of="recurrence")
        for j in range(n):
            fill = 0.8 * 0.55 ** (t - j) if j <= t else 0
            s.box(left + 36 * j, y, 36, 25, "dual", fill, 0.7, round=0)
    s.line((12, top + 30), (12, top + 118), of="recurrence", arrow=True)
    s.text(8, 222, "card by card", "recurrence", "start")
    s.text(left + 90, 222, "or the whole table at once", "dual")
    s.show(
        "Five cards in a column, one after each token. Beside each a row of a table: "
        "what is left on it of tokens 1 to 5, paler with age. The table is a triangle.",
        width,
    )


def assembly_line(width: int = WIDTH) -> None:
    """Stations that fill in a small table each, and hand on one tray."""
    s = Sketch(176)
    for k in range(3):
        x = 10 + 108 * k
        s.box(x, 42, 66, 66, "chunked", 0.08)
        for t in range(4):
            for j in range(t + 1):
                place = x + 13 + 10 * j, 55 + 10 * t
                s.box(*place, 10, 10, "dual", 0.8 * 0.6 ** (t - j), 0.5, round=0)
        for i in range(4):
            s.line((x + 12 + 14 * i, 130), (x + 12 + 14 * i, 112), arrow=True, width=1)
        s.line((x + 33, 38), (x + 33, 24), arrow=True)
        s.text(x + 33, 146, f"chunk {k + 1}", "chunked")
        s.line((x + 68, 75), (x + 104, 75), of="state", arrow=True)
        s.card(x + 74, 48, 24, 18)
    s.text(175, 16, "all outputs of a chunk at once")
    s.text(175, 170, "one tray between stations: the state", "state")
    s.show(
        "Three stations in a row. Each takes four tokens, fills in a small triangular "
        "table, gives its outputs, and hands one card on to the next.",
        width,
    )


def traffic_lights(width: int = WIDTH) -> None:
    """A plan that is printed in advance against a question at every corner."""
    s = Sketch(212)
    s.text(8, 16, "The plan is printed in advance: nobody stops", at="start")
    s.line((10, 64), (340, 64), arrow=True, width=2.5)
    for i in range(4):
        x = 60 + 75 * i
        s.box(x - 6, 26, 12, 30, fill=0, round=4)
        for j, fill in enumerate((0.0, 0.0, 0.9)):
            s.box(x - 3, 29 + 8.5 * j, 6, 6, "ours", fill, 0.7, round=3)
        s.text(x, 82, f"0:{10 * (i + 1)}")
    s.text(8, 116, "Asking at every corner: everybody waits", at="start")
    s.box(120, 126, 110, 22, "theirs", round=3)
    s.text(175, 141, "which way?")
    for i in range(4):
        x = 60 + 75 * i
        s.line((x - 57 + 7 * (not i), 196), (x - 14, 196), width=2.5)
        s.line((x - 9, 190), (150 + 13 * i, 152), of="theirs", arrow=True)
        s.line((163 + 13 * i, 152), (x + 5, 190), of="theirs", arrow=True, dashed=True)
        s.text(x - 2, 208, "?", "theirs")
    s.line((303, 196), (340, 196), arrow=True, width=2.5)
    s.show(
        "Above, a road without a stop past four green lights whose times are printed. "
        "Below, a road cut at four corners, at each of which somebody asks and waits.",
        width,
    )


def chef(width: int = WIDTH) -> None:
    """Dishes cooked with a question after each, and with the whole order at once."""
    s = Sketch(196)
    s.text(8, 16, "A question after each dish", at="start")
    s.text(8, 116, "The whole order at once", at="start")
    for top in (24, 124):
        s.text(62, top + 18, "counter", "theirs", "end")
        s.text(62, top + 46, "kitchen", "ours", "end")
        s.line((70, top + 60), (340, top + 60), arrow=True, width=1)
    for i in range(4):
        x = 72 + 64 * i
        s.box(x, 26, 28, 20, "theirs", 0.3)
        s.box(x + 32, 56, 26, 20, "ours", 0.35)
        s.line((x + 28, 46), (x + 33, 54), arrow=True, width=1)
        s.line((x + 58, 56), (x + 63, 48), arrow=True, width=1)
        s.box(104 + 26 * i, 156, 26, 20, "ours", 0.35)
    s.box(72, 126, 28, 20, "theirs", 0.3)
    s.line((100, 146), (105, 154), arrow=True, width=1)
    s.text(276, 170, "done", "ours")
    s.text(340, 98, "time", at="end", size=11)
    s.show(
        "Two timelines of a counter and a kitchen. Above, four dishes, each after a "
        "visit to the counter. Below, one visit, then four dishes without a pause.",
        width,
    )


def adapter(width: int = WIDTH) -> None:
    """One source, one compiler, many chips."""
    s = Sketch(150)
    s.box(8, 50, 92, 46, "ours", 0.06)
    s.text(54, 70, "one source")
    s.text(54, 86, "in plain JAX", size=11)
    s.line((100, 67), (122, 67), width=3)
    s.line((100, 79), (122, 79), width=3)
    s.box(126, 44, 78, 58, "ours", 0.3, round=10)
    s.text(165, 70, "XLA", size=14)
    s.text(165, 88, "the adapter", size=11)
    for i, chip in enumerate(("CPU", "NVIDIA GPU", "TPU")):
        y = 24 + 49 * i
        s.line((204, 73), (226, 73), (226, y), (244, y), arrow=True)
        s.box(248, y - 17, 94, 34, "theirs", 0.12)
        s.text(295, y + 4, chip)
    s.show(
        "One box, the source, plugged into an adapter, the compiler XLA, from which "
        "three leads go to a CPU, a GPU and a TPU.",
        width,
    )
