"""What the chapters share: set-up, computed prose, library source, inline figures.

Needs the `book` extra (matplotlib, ipython, ipywidgets).
"""

import ast
import glob
import inspect
import os
import sys
import textwrap
import time

import ipywidgets as widgets
import jax
import jax.experimental
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import traitlets
from IPython.display import HTML, Markdown, display

from ssdlib.companion.figures import COLOR, COLORS, INK, inline
from ssdlib.companion.numerals import written
from ssdlib.compiler import hlo, targets
from ssdlib.scale import parallel, sharding

__all__ = [
    "COLOR",
    "COLORS",
    "compiled",
    "compiled_over",
    "enable_x64",
    "exactly",
    "explore",
    "inline",
    "link",
    "pick",
    "say",
    "show",
    "source",
    "stack",
    "start",
    "tolerance",
]

_CHIPS = {"TPU": ("/dev/accel*", "/dev/vfio/[0-9]*"), "GPU": ("/dev/nvidia[0-9]*",)}

try:
    enable_x64 = jax.enable_x64
except AttributeError:  # jax 0.7
    enable_x64 = jax.experimental.enable_x64


def start() -> bool:
    """Set precision and plot style, print versions and device; True on an accelerator.

    Chapters do more by the answer: little on a CPU, all on a GPU or TPU. The variable
    SSDLIB_FULL=1 rehearses the whole on a CPU, with the small sizes of `pick`.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    ink = dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color"], INK
    )
    plt.rcParams.update(ink)
    plt.rcParams.update(
        {
            "ytick.color": INK,
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
    kind, platform = device.device_kind, device.platform
    where = kind if kind == platform else f"{kind} ({platform})"
    print(f"jax {jax.__version__} on {where}")
    if not _accelerated() and (why := _unseen()):
        print(why)
    return _accelerated() or os.environ.get("SSDLIB_FULL") == "1"


def pick(full, small):
    """The size for this device: `full` on a GPU or TPU, `small` on a CPU."""
    return full if _accelerated() else small


def tolerance(limit: float) -> float:
    """A limit of rounding errors that holds for float32 on a CPU, on this device.

    A TPU makes a float32 product of six products of bfloat16 pieces, and its exp, log
    and rsqrt are off by some units in the last place: four times as much (chapter 11).
    """
    exact = not _accelerated() and os.environ.get("SSDLIB_ARITHMETIC") != "tpu"
    return limit if exact else 4 * limit


def exactly(a, b) -> bool:
    """Whether arrays are equal: in every bit on a CPU, elsewhere up to rounding.

    Two programs of different sizes may add in another order there.
    """
    off = np.abs(np.asarray(a) - np.asarray(b)).max()
    limit = tolerance(2e-6)
    return bool(off <= (0 if limit == 2e-6 else limit * np.abs(b).max()))


def _accelerated() -> bool:
    return jax.devices()[0].platform != "cpu"


def _unseen() -> str:
    """Why jax has no accelerator here, and what to do; nothing where that is meant."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return ""
    for chip, paths in _CHIPS.items():
        if any(map(glob.glob, paths)):
            return (
                f"A {chip} is attached, but this jax does not see it: was jax or its "
                "plugin changed? In Colab: Disconnect and delete runtime, run again."
            )
    if "google.colab" in sys.modules:
        return "For a TPU or GPU: Runtime, Change runtime type, then run all again."
    return ""


def say(text: str) -> None:
    """Markdown prose, for sentences that carry a computed number (see `written`)."""
    display(Markdown(written(text)))


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
    """The figure in the page's text color, wide and narrow; `alt` describes it."""
    display(HTML(inline(figure, alt)))


def explore(label: str, values, draw, first: int = 0) -> None:
    """A slider over figures: `draw(value)` gives a figure and its alt text.

    All frames are drawn now, and the browser links slider and frame: so the figure is
    alive in the static page too, by mouse and by arrow keys. `first` is the index of
    the frame that is seen first.
    """
    wide = widgets.Layout(width="100%")
    frames = [widgets.HTML(inline(*draw(value)), layout=wide) for value in values]
    seen = stack(frames, first)
    options = [(f"{value:,}", value) for value in values]
    slider = widgets.SelectionSlider(
        options=options,
        index=first,
        description=label,
        layout=wide,
        style={"description_width": "initial"},
    )
    link(slider, seen)
    display(widgets.VBox([slider, seen], layout=wide))


def stack(children: list, first: int = 0) -> widgets.Widget:
    """Widgets of which one is seen, that of its `selected_index`; see `link`."""
    wide = widgets.Layout(width="100%")
    if hasattr(widgets, "Stack"):
        return widgets.Stack(children, selected_index=first, layout=wide)
    box = widgets.VBox(children, layout=wide)  # ipywidgets 7, of Colab
    box.add_traits(selected_index=traitlets.Int(first))

    def turn(_):
        for i, child in enumerate(children):
            look = None if i == box.selected_index else "none"
            child.layout = widgets.Layout(width="100%", display=look)

    box.observe(turn, "selected_index")
    turn(None)
    return box


def link(control: widgets.Widget, seen: widgets.Widget) -> None:
    """Let the index of a control choose what a `stack` shows.

    The browser does it, without a kernel, from ipywidgets 8 on; before, the kernel.
    """
    how = widgets.jslink if hasattr(widgets, "Stack") else widgets.link
    how((control, "index"), (seen, "selected_index"))
