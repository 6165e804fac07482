"""Sphinx extension: the two tables of the status page, made anew at every build.

```{built-with}
```
```{chapter-times}
```
"""

from importlib import metadata

import jax
from docutils import nodes
from docutils.statemachine import StringList
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.util.docutils import SphinxDirective

from ssdlib.measure import record

PACKAGES = ("numpy", "jaxtyping", "safetensors", "matplotlib", "ipywidgets", "Sphinx")


class Table(SphinxDirective):
    """A Markdown table from `rows`; the page that holds it is read at every build."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        node = nodes.container()
        lines = [f"| {' | '.join(row)} |" for row in self.rows()]
        lines.insert(1, "|---|---:|" if self.right else "|---|---|")
        self.state.nested_parse(StringList(lines, source=""), self.content_offset, node)
        return node.children


class BuiltWith(Table):
    """Device, host and versions of the machine that built the book."""

    right = False

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

    right = True

    def rows(self):
        yield "Page", "Seconds"
        total = 0.0
        for name, data in sorted(NbMetadataCollector.get_doc_data(self.env).items()):
            seconds = data.get("exec_data", {}).get("runtime")
            if seconds is not None:
                total += seconds
                yield f"[](/{name})", f"{seconds:.1f}"
        yield "All", f"{total:.0f}"


def setup(app):
    """Register with Sphinx."""
    app.add_directive("built-with", BuiltWith)
    app.add_directive("chapter-times", ChapterTimes)
    return {"version": "1", "parallel_read_safe": False}
