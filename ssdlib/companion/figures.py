"""A matplotlib figure as inline SVG that fits a page: light or dark, wide or narrow.

Every figure is drawn twice. The second drawing is for a phone: its panels stand below
each other, titles are wrapped, and text has the size that it needs there. Style sheets
of the book choose; where there are none, as in Colab, the wide one is seen.
"""

import hashlib
import io
import re
import textwrap
from html import escape
from itertools import pairwise

import matplotlib.pyplot as plt
from matplotlib.gridspec import GridSpec
from matplotlib.text import Text

__all__ = ["COLOR", "COLORS", "HUES", "INK", "css", "inline"]

INK = "#010203"  # stands for the page's own text color, light or dark
HUES = {  # on a light page, and on a dark one, as book.css has it: `--fig-blue`, ...
    "blue": ("#1f6cc0", "#6fb1ff"),
    "orange": ("#b45309", "#f0a35e"),
    "green": ("#1a7a52", "#5cc79b"),
    "pink": ("#c0356a", "#f58fb5"),
    "purple": ("#7448c4", "#b79cf5"),
    "gray": ("#696969", "#a8a8a8"),
    "teal": ("#0b7680", "#5cc9d3"),
    "gold": ("#806600", "#d9b44a"),
    "red": ("#c0392b", "#ff8f80"),
}
COLORS = [light for light, _ in HUES.values()][:6]  # for a series without a meaning
COLOR = {  # one color for one thing in the whole book
    "state": HUES["blue"][0],
    "attention": HUES["orange"][0],
    "recurrence": HUES["green"][0],
    "dual": HUES["pink"][0],
    "chunked": HUES["purple"][0],
    "float32": HUES["teal"][0],
    "bfloat16": HUES["gold"][0],
    "int8": HUES["red"][0],
    "ours": INK,
    "theirs": HUES["gray"][0],
}
PHONE = 3.5  # inches of the narrow drawing, shown at 100 pixels an inch


def css(color: str) -> str:
    """A color of `COLOR` as a page writes it, which knows whether it is dark."""
    names = {light: name for name, (light, _) in HUES.items()}
    return "currentColor" if color == INK else f"var(--fig-{names[color]}, {color})"


def inline(figure, alt: str) -> str:
    """HTML with both drawings of a figure, which is closed; `alt` describes it."""
    wide = _drawn(figure, alt, "wide", f"width: min(100%, {_pixels(figure)})")
    _narrow(figure)
    narrow = _drawn(figure, alt, "narrow", f"width: {_pixels(figure)}; display: none")
    plt.close(figure)
    return f'<div class="figure">{wide}{narrow}</div>'


def _pixels(figure) -> str:
    return f"{110 * figure.get_figwidth():.0f}px"  # a small one is not blown up


def _narrow(figure) -> None:
    """Make a figure as wide as a phone: panels below each other, text at least 8 pt."""
    axes = [ax for ax in figure.axes if ax.get_subplotspec()]
    if not axes:  # placed by hand
        return
    panels = list(dict.fromkeys(ax.get_subplotspec() for ax in axes))
    height = figure.get_figheight()
    grid = panels[0].get_gridspec()
    columns = grid.ncols
    shapes = [ax.get_data_ratio() for ax in axes if ax.get_aspect() != "auto"]
    if grid.nrows == 1 < columns:
        beside = 2 if shapes and columns == 4 else 1
        below = GridSpec(columns // beside, beside, figure=figure)
        for ax in axes:
            ax.set_subplotspec(below[panels.index(ax.get_subplotspec())])
            if ax in axes[0].get_shared_y_axes().get_siblings(axes[0]):
                ax.tick_params(labelleft=True)  # it had those of its neighbor
        height, columns = height * columns, beside
    height *= 0.75
    if shapes:  # matrices: as high as their columns are wide, with room for labels
        rows = len(panels) / columns
        height = rows * (max(shapes) * (PHONE / columns - 0.6) + 0.6)
    lines = 0
    for ax in axes:
        for place in ("left", "center", "right"):
            title = _wrapped(ax.get_title(place), 34 // columns)
            if title:
                ax.set_title(title, loc=place)
                lines += title.count("\n")
        ax.set_xlabel(_wrapped(ax.get_xlabel(), 42 // columns))
    if title := _wrapped(figure.get_suptitle(), 44):
        figure.suptitle(title, x=0.01, ha="left")
        lines += 1 + title.count("\n")
    for text in figure.findobj(Text):
        text.set_size(max(8, 0.8 * text.get_size()))
    for ax in axes:
        ax.tick_params(labelsize=8.8)
    figure.set_size_inches(PHONE, height + 0.2 * lines)
    _keep_apart(figure, axes)


def _keep_apart(figure, axes) -> None:
    """Let no letters of a narrow figure cover others or leave it."""
    figure.draw_without_rendering()
    for ax in axes:
        low, high = sorted(ax.get_xlim())
        inside = [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
        labels = [label for label in inside if label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        if boxes and boxes[-1].x1 > figure.bbox.x1 - 3:  # of a tick at the very edge
            labels[-1].set_ha("right")
        if any(a.x1 > b.x0 for a, b in pairwise(boxes)):
            plt.setp(labels, rotation=90, ha="center")
            boxes = [label.get_window_extent() for label in labels]
            if any(0.8 * (a.x1 - a.x0) > b.x0 - a.x0 for a, b in pairwise(boxes)):
                ax.set_xticklabels([])
    words = [e for ax in axes for e in ax.get_children() if isinstance(e, Text)]
    for text in words:  # titles too
        for letters in 28, 20:  # until it does not leave the figure
            box = text.get_window_extent()
            spare = 0.05 * box.width  # a browser's letters are a little wider
            if box.x0 < spare or box.x1 > figure.bbox.x1 - spare:
                text.set_text(_wrapped(text.get_text(), letters))
    for ax in axes:  # of two names that would cover each other, the first is seen
        seen = []
        for text in ax.texts:
            box = text.get_window_extent().shrunk(0.9, 0.75)
            text.set_visible(not any(box.overlaps(other) for other in seen))
            seen += [box] * text.get_visible()


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width` letters; a formula is not cut."""
    whole = re.sub(r"\$[^$]*\$", lambda m: m[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, width, break_long_words=False).replace("\0", " ")


def _drawn(figure, alt: str, kind: str, style: str) -> str:
    """One drawing as an <svg> element whose ids no other drawing on a page has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, css(INK))
    for light, _ in HUES.values():
        svg = svg.replace(f": {light}", f": {css(light)}")
    svg = re.sub(r"\b([1-9]\d*\.\d\d)\d+", r"\1", svg)  # a hundredth of a point will do
    # Two drawings weigh little more than one had: no blanks, short names of letters.
    svg = re.sub(r"\s*(<!--.*?-->)?\s*\n\s*", "\n", svg, flags=re.S)
    svg = svg.replace("xlink:href", "href").replace("DejaVuSans-", "g")
    prefix = "f" + hashlib.sha256(alt.encode()).hexdigest()[:6] + kind[0] + "-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    about = f'class="{kind}" role="img" aria-label="{escape(alt)}" style="{style}"'
    return svg.replace("<svg", f"<svg {about}", 1)
