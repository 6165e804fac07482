"""Rules of the house: imports point one way, chapters share their first cell."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # from the first row to the last; a module imports from its row and above
    "_checks": "_checks",
    "theory": "recurrence quadratic chunked int8 platforms",
    "model": "params cache model sample generate evaluate",
    "compiler": "",
    "checkpoint": "",
    "beyond": "",
    "scale": "",
    "serve": "",
    "measure": "",
    "companion": "__main__",
}
MAY_IMPORT = {
    "_checks": "",
    "theory": "_checks",
    "model": "_checks theory",
    "compiler": "_checks",
    "checkpoint": "_checks theory model",
    "beyond": "_checks theory model",
    "scale": "_checks theory model checkpoint",
    "serve": "_checks theory model checkpoint",
    "measure": "_checks theory model compiler",
    "companion": "_checks theory model compiler checkpoint beyond scale serve measure"
    " face",
    "face": "theory model compiler checkpoint serve",
}
PACKAGE = ROOT / "ssdlib"
MODULES = sorted(PACKAGE.rglob("*.py"))
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
TEMPLATE = ROOT / "book/_template.ipynb"  # what CONTRIBUTING.md tells to copy


def room(module):
    """The room of a module such as "model" or "scale.parallel"; "face" is ssdlib."""
    top = module.split(".")[0]
    rooms = [name for name, own in ROOMS.items() if top == name or top in own.split()]
    return rooms[0] if rooms else "face"


def imports(path):
    """Names of the ssdlib modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            first, _, rest = node.module.partition(".")
            names = [alias.name for alias in node.names]
            if first == "ssdlib" and (PACKAGE / rest).is_dir():  # ssdlib, or a room
                yield from (f"{rest}.{name}".lstrip(".") for name in names)
            elif first == "ssdlib":
                yield rest
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ssdlib":
                    yield alias.name.partition(".")[2] or "__init__"


def own_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=own_name)
def test_a_room_imports_only_from_the_rooms_it_may(path):
    here = room(own_name(path))
    for other in imports(path):
        there = room(other)
        assert there == here or there in MAY_IMPORT[here].split(), other


def test_the_import_list_is_the_theorem():
    order = ROOMS["theory"].split()
    for i, name in enumerate(order):
        for other in imports(PACKAGE / f"{name}.py"):
            assert other == "_checks" or other in order[:i], f"{name} imports {other}"


def test_nothing_imports_in_a_circle():
    graph = {own_name(p): {o for o in imports(p)} for p in MODULES}
    while free := [m for m, others in graph.items() if not others & graph.keys() - {m}]:
        for m in free:
            del graph[m]
    assert not graph


def test_the_library_is_seen_at_a_glance():
    top = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(top) <= 12
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 300, path


def test_importing_the_library_adds_little_to_jax():
    """No torch, optax, matplotlib or hub client, and no change of JAX's settings."""
    code = """
import sys, jax
before = {k: str(v) for k, v in jax.config.values.items()}
import ssdlib
assert before == {k: str(v) for k, v in jax.config.values.items()}
heavy = {"torch", "optax", "matplotlib", "huggingface_hub", "IPython", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_there_are_chapters():
    assert len(CHAPTERS) >= 5


@pytest.mark.parametrize("path", [*CHAPTERS, TEMPLATE], ids=lambda p: p.stem)
def test_a_chapter_keeps_the_house_rules(path):
    cells = json.loads(path.read_text())["cells"]
    text = ["".join(c["source"]) for c in cells]
    code = [t for c, t in zip(cells, text, strict=True) if c["cell_type"] == "code"]
    first = json.loads(CHAPTERS[0].read_text())["cells"]
    setup = next("".join(c["source"]) for c in first if c["cell_type"] == "code")
    assert code[0] == setup
    assert text[0].startswith("# ")
    shown = [
        cell
        for cell in cells
        if cell["cell_type"] == "code"
        and not any(  # folded plots and solutions, sentences that carry numbers
            tag.startswith(("hide-", "remove-"))
            for tag in cell["metadata"].get("tags", [])
        )
    ]
    assert 10 <= len(shown) <= 20
    assert all(sum(bool(line.strip()) for line in c.splitlines()) <= 15 for c in code)
    assert sum("assert" in c for c in code) >= 3
    whole = "\n".join(text)
    # Sphinx puts a display with two backslashes where no tag is allowed; \cr is fine.
    displays = re.findall(r"\$\$.*?\$\$", whole, re.S)
    assert not [d for d in displays if r"\tag" in d and "\\\\" in d]
    for part in ("Takeaway", "## Exercises", "## Further reading", "## Symbols"):
        assert part in whole, part
    assert "show(fig" in whole
    # A folded answer stands in the box of its question.
    checks = [t for t in text if "> **Check." in t]
    assert not [t for t in checks if re.search("^<details", t, re.M)]
