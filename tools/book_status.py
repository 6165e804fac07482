"""Sphinx extension: the tables of the status page, made anew at every build.

```{built-with}
```
```{chapter-times}
```
```{on-v5e}
```
"""

import re
from importlib import metadata

import fits
import jax
from docutils import nodes
from docutils.statemachine import StringList
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.util.docutils import SphinxDirective

from ssdlib.compiler.chips import CHIPS
from ssdlib.measure import record

BOOK = fits.PATH.parents[1]
PACKAGES = ("numpy", "jaxtyping", "safetensors", "matplotlib", "ipywidgets", "Sphinx")


class Table(SphinxDirective):
    """A Markdown table from `rows`; the page that holds it is read at every build."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        node = nodes.container()
        lines = [f"| {' | '.join(row)} |" for row in self.rows()]
        lines.insert(1, self.align)
        self.state.nested_parse(StringList(lines, source=""), self.content_offset, node)
        return node.children


class BuiltWith(Table):
    """Device, host and versions of the machine that built the book."""

    align = "|---|---|"

    def rows(self):
        facts = record.provenance(jax.devices()[0])
        device, versions = facts["device"], facts["versions"]
        yield "Built with", "Which"
        yield "Time", facts["date"].replace("T", " ").replace("Z", " UTC")
        yield "Commit", facts["commit"] or "unknown"
        yield "Device", device["kind"]
        yield "Host", f"{device['host'] or 'unknown'}, {device['cores']} cores"
        for name in PACKAGES:
            versions[name] = metadata.version(name)
        for name, version in versions.items():
            yield name, version


class ChapterTimes(Table):
    """How long the code of each page took when it last ran, and the sum."""

    align = "|---|---:|"

    def rows(self):
        yield "Page", "Seconds"
        total = 0.0
        for name, data in sorted(NbMetadataCollector.get_doc_data(self.env).items()):
            seconds = data.get("exec_data", {}).get("runtime")
            if seconds is not None:
                total += seconds
                yield f"[](/{name})", f"{seconds:.1f}"
        yield "All", f"{total:.0f}"


class OnV5e(Table):
    """Memory and minutes of each chapter on a TPU v5e, from records (tools/fits.py)."""

    align = "|---|---|---:|---:|---:|---:|---:|---:|"

    def rows(self):
        yield (
            *("Page", "Largest program", f"GB of {CHIPS['tpu-v5e'].memory / 1e9:.0f}"),
            *("Host, s", "Programs", "Compiler, s", "Runs, s ○", "Minutes ○"),
        )
        for path in sorted(BOOK.glob("[0-9i]*.ipynb")):
            number, page = path.stem.partition("_")[0], fits.of_page(path.stem)
            name = f"Chapter {int(number)}" if number.isdigit() else "Introduction"
            link = f"[{name}](/book/{path.stem})"
            host = page["host"]
            if "largest" not in page:
                nothing = f"{host:.0f}", *[""] * 3, f"{host / 60:.1f}"
                yield link, "none: all on the host", "", *nothing
                continue
            memory = f"`{page['largest']}`", at_least(page["memory"] / 1e9)
            compiler = page["compile"]
            ends = [(host + compiler + s) / 60 for s in page["runs"]]
            runs = " to ".join(map(at_least, page["runs"]))
            cells = f"{compiler:.0f}", runs if any(page["runs"]) else ""
            if limit := re.search(r"MINUTES\b.* = (\d+)", path.read_text()):
                ends = host / 60, host / 60 + int(limit[1])
                cells = "by its table", "by its table"  # which sizes it has time for
            minutes = " to ".join(sorted({f"{v:.1f}" for v in ends}, key=float))
            work = f"{host:.0f}", f"{page['programs'] or ''}", *cells
            yield link, *memory, *work, minutes


def at_least(value: float) -> str:
    """Two digits, but none below a thousandth."""
    return f"{value:.2g}" if value >= 1e-3 else "< 0.001"


def setup(app):
    """Register with Sphinx."""
    app.add_directive("built-with", BuiltWith)
    app.add_directive("chapter-times", ChapterTimes)
    app.add_directive("on-v5e", OnV5e)
    return {"version": "1", "parallel_read_safe": False}
