"""The small programs of the first pages need NumPy alone, and agree."""

import ast
import json
from pathlib import Path

import numpy as np
import oracle

BOOK = Path(__file__).parent.parent / "book"


def code(page):
    cells = json.loads((BOOK / f"{page}.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def toy(page, name):
    """A function of a page, with nothing but NumPy in reach."""
    for text in code(page):
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                names = {"np": np}
                exec(ast.unparse(node), names)
                return names[name]
    raise AssertionError(f"{page} has no function {name}")


def test_the_cell_of_the_introduction_runs_in_any_python():
    (text,) = [t for t in code("intro") if "by_chunk" in t]
    names = {}
    exec(text, names)  # it asserts that the three programs agree
    modules = {k for k, v in names.items() if type(v).__name__ == "module"}
    assert modules == {"np"} and len(names["by_card"]) == 12
    assert text.count("assert") == 2 and "ssdlib" not in text


def test_the_toys_of_three_chapters_are_one_map():
    rng = np.random.default_rng(0)
    x, B, C = (rng.standard_normal((11, n)) for n in (3, 5, 5))
    dt, A, h0 = rng.uniform(0.1, 1, 11), -0.7, rng.standard_normal((3, 5))
    full = (
        x[None, :, None],
        dt[None, :, None],
        [A],
        B[None, :, None],
        C[None, :, None],
    )
    y, h = toy("01_recurrence", "toy")(*full, [0.0], h0[None, None])
    forms = [(y[0, :, 0], h[0, 0]), toy("02_duality", "toy")(x, dt, A, B, C, h0)]
    chunked = toy("03_chunking", "toy_chunked")
    forms += [chunked(x, dt, A, B, C, h0, Q) for Q in (1, 4, 11, 20)]
    for y, h in forms[1:]:
        assert oracle.error(y, forms[0][0]) < 1e-12
        assert oracle.error(h, forms[0][1]) < 1e-12
