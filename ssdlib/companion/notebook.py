"""What the chapters share: set-up, computed prose, library source, inline figures.

Needs the `book` extra (matplotlib, ipython, ipywidgets).
"""

import ast
import hashlib
import inspect
import io
import os
import re
import textwrap
import time

import ipywidgets as widgets
import jax
import matplotlib
import matplotlib.pyplot as plt
from IPython.display import HTML, Markdown, display

from ssdlib.compiler import hlo, targets
from ssdlib.scale import parallel, sharding

__all__ = [
    "COLORS",
    "compiled",
    "compiled_over",
    "explore",
    "say",
    "show",
    "source",
    "start",
]

COLORS = ["#2f7ed8", "#d9822b", "#2a9d6e", "#cc4778", "#8a63d2", "#7f7f7f"]
_INK = "#010203"  # stands for the page's own text color, light or dark


def start() -> bool:
    """Set precision and plot style, print versions and device; True on an accelerator.

    Chapters choose their sizes by the answer: small on a CPU, full on a GPU or TPU.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    ink = dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color"], _INK
    )
    plt.rcParams.update(ink)
    plt.rcParams.update(
        {
            "ytick.color": _INK,
            "axes.prop_cycle": matplotlib.cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "figure.figsize": (6.4, 3.2),
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "grid.alpha": 0.25,
            "grid.color": "#808080",
            "legend.frameon": False,
            "lines.linewidth": 2,
            "svg.hashsalt": "ssdlib",
        }
    )
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform})")
    return device.platform != "cpu"


def say(text: str) -> None:
    """Markdown prose, for sentences that carry a computed number."""
    display(Markdown(text))


def source(fn) -> None:
    """The library's own code for fn, without its docstring."""
    code = textwrap.dedent(inspect.getsource(fn))
    node = ast.parse(code).body[0]
    if ast.get_docstring(node) is not None:
        first, lines = node.body[0], code.splitlines()
        body = "\n".join(lines[first.end_lineno :]).lstrip("\n")
        code = "\n".join([*lines[: first.lineno - 1], body])
    display(Markdown(f"```python\n{code.strip()}\n```"))


def compiled(name: str, fn, *args, target: str, live: bool = True, **options):
    """`hlo.compile_for`, or the record `name` where the compiler is missing.

    With live=False always the record: for what takes a compiler too long. The command
    `python tools/record_hlo.py` runs the chapters so that each call writes its record.
    """

    def make():
        return hlo.compile_for(fn, *args, target=target, **options)

    return _made_or_recorded(name, target, make, live)


def compiled_over(name: str, topology: str, mesh, *args, live: bool = True):
    """`parallel.compile_over` for a TPU slice, or the record `name`, as `compiled`.

    `topology` is "v6e:2x4", "v6e:16x16", ...; `mesh` the three sizes of
    `sharding.make_mesh`; `args` are config, b, T, dtype.
    """
    config, *rest = args
    target = "tpu-" + topology.replace(":", "-")

    def make():
        devices = targets.tpu_slice(topology)
        start = time.perf_counter()
        over = sharding.make_mesh(*mesh, devices=devices)
        program = parallel.compile_over(config, over, *rest)
        return hlo.read(target, program, "absent", time.perf_counter() - start)

    return _made_or_recorded(name, target, make, live)


def _made_or_recorded(name, target, make, live):
    record = "SSDLIB_RECORD" in os.environ
    if live or record:
        try:
            program = make()
        except hlo.CompilerMissing:
            if record or not hlo.has_record(name, target):
                raise
        else:
            if record:
                program.save(name)
            return program
    return hlo.load_record(name, target)


def show(figure, alt: str) -> None:
    """The figure as inline SVG that takes the page's text color; `alt` describes it."""
    display(HTML(_svg(figure, alt)))


def explore(label: str, values, draw, first: int = 0) -> None:
    """A slider over figures: `draw(value)` gives a figure and its alt text.

    All frames are drawn now, and the browser links slider and frame: so the figure is
    alive in the static page too, by mouse and by arrow keys. `first` is the index of
    the frame that is seen first.
    """
    wide = widgets.Layout(width="100%")
    frames = [widgets.HTML(_svg(*draw(value)), layout=wide) for value in values]
    stack = widgets.Stack(frames, selected_index=first, layout=wide)
    options = [(f"{value:,}", value) for value in values]
    slider = widgets.SelectionSlider(
        options=options,
        index=first,
        description=label,
        layout=wide,
        style={"description_width": "initial"},
    )
    widgets.jslink((slider, "index"), (stack, "selected_index"))
    display(widgets.VBox([slider, stack], layout=wide))


def _svg(figure, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    prefix = "f" + hashlib.sha256(alt.encode()).hexdigest()[:6] + "-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)  # unique on a page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    width = 110 * figure.get_figwidth()  # pixels; a small figure is not blown up
    about = f'role="img" aria-label="{label}" style="width: min(100%, {width:.0f}px)"'
    svg = svg.replace("<svg", f"<svg {about}", 1)
    return f'<div class="figure">{svg}</div>'
