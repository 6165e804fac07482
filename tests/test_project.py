"""Rules of the house: imports point one way, chapters share their first cell."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [  # a module imports only from those above it
    "_checks",
    "config",
    "recurrence",
    "quadratic",
    "chunked",
    "platforms",
    "recurrences",
    "nonscalar",
    "params",
    "cache",
    "model",
    "hub",
    "config_json",
    "tensor_files",
    "weights",
    "sharding",
    "parallel",
    "text",
    "generate",
    "evaluate",
    "transformer",
    "attention",
    "train",
    "roofline",
    "targets",
    "hlo_text",
    "traffic",
    "hlo_cost",
    "hlo_ops",
    "hlo_view",
    "hlo",
    "record",
    "bench",
    "evidence",
    "claims",
    "notebook",
    "__init__",
    "commands",
    "__main__",
]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
TEMPLATE = ROOT / "book/_template.ipynb"  # what CONTRIBUTING.md tells to copy


def imports(path):
    """Names of the ssdlib modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ssdlib":
                names = [a.name for a in node.names]
                yield from (n if n in ORDER else "__init__" for n in names)
            elif node.module.startswith("ssdlib."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("ssdlib"):
                    yield [*alias.name.split("."), "__init__"][1]


def test_every_module_is_in_the_order():
    assert {p.stem for p in (ROOT / "ssdlib").glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_up(name):
    for other in imports(ROOT / "ssdlib" / f"{name}.py"):
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


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
