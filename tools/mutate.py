"""Change the library one operation at a time and see whether its tests notice.

    python tools/mutate.py ssdlib/quadratic.py tests/test_forms.py

Each mutant swaps one operator, comparison, constant, condition or function of a module
(the first argument) in a copy of this checkout, and runs the tests (the others) there
until one fails. Prints the mutants that all tests let live. Try a few quick tests on
all, then all tests on those that live, with --only. Programs that a mutant does not
change are compiled once for all, and without optimization. Takes seconds a mutant, so
it is no part of CI.
"""

import argparse
import ast
import copy
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SWAPS = [
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mult)),
    *((ast.Pow, ast.Mult), (ast.BitAnd, ast.BitOr), (ast.Mod, ast.FloorDiv)),
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)),
    (ast.And, ast.Or),
]
OTHER = dict(SWAPS) | {b: a for a, b in SWAPS[::-1]}
NAMES = {"minimum": "maximum", "min": "max", "argmax": "argmin", "exp": "exp2"}
NAMES |= {"sum": "max", "cumsum": "cumprod", "fold_in": "the key as it was"}
QUICKLY = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}


def sites(tree: ast.AST):
    """(node, what to do with it) for every change, in the order of the text."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            skipped |= {id(n) for n in ast.walk(node)}
        if isinstance(node, (ast.FunctionDef, ast.AnnAssign, ast.arg)):
            notes = [getattr(node, "returns", None), getattr(node, "annotation", None)]
            notes += getattr(node, "decorator_list", [])
            skipped |= {id(n) for note in notes if note for n in ast.walk(note)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OTHER:
            yield node, "op"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            yield node, "compare"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, "constant"
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            yield node, "unary"
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node, "condition"
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node, "name"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "where":
            yield node, "where"
        elif isinstance(node, ast.Assign) and _again(node):
            yield node, "statement"


def _again(node: ast.Assign) -> bool:
    """Whether an assignment changes what it reads: it can be left out."""
    targets = {n.id for t in node.targets for n in ast.walk(t) if hasattr(n, "id")}
    read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    return bool(targets) and targets <= read


def change(node: ast.AST, how: str) -> None:
    """Make one change to the tree."""
    if how == "op":
        node.op = OTHER[type(node.op)]()
    elif how == "compare":
        node.ops[0] = OTHER[type(node.ops[0])]()
    elif how == "constant":
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1
    elif how == "unary":
        node.op = ast.UAdd()
    elif how == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif how == "name" and node.attr == "fold_in":
        node.__class__, key = ast.Lambda, ast.parse("lambda key, i: key").body[0].value
        node.__dict__ |= {"args": key.args, "body": key.body}
    elif how == "name":
        node.attr = NAMES[node.attr]
    elif how == "where":
        node.args[1:3] = node.args[2:0:-1]
    elif how == "statement":
        node.value = copy.deepcopy(node.targets[0])
        for n in ast.walk(node.value):
            if hasattr(n, "ctx"):
                n.ctx = ast.Load()


def mutants(source: str):
    """(number, where and what, text of the mutant) for every change of a source."""
    for i, (node, how) in enumerate(sites(ast.parse(source))):
        tree = ast.parse(source)
        change(*list(sites(tree))[i])
        text = ast.unparse(ast.fix_missing_locations(tree))
        yield i, f"{node.lineno} {how}", text


def run(job) -> str | None:
    """The description of a mutant that lives, else None."""
    module, tests, programs, limit, i, how, text, plain = job
    with tempfile.TemporaryDirectory() as folder:
        copy_ = Path(folder)
        for name in ("ssdlib", "tests", "tools", "pyproject.toml"):
            here = ROOT / name
            put = shutil.copytree if here.is_dir() else shutil.copy
            put(here, copy_ / name)
        for name in ("book", "benchmarks"):  # which tests read
            (copy_ / name).symlink_to(ROOT / name)
        (copy_ / module).write_text(text)
        env = os.environ | QUICKLY | {"PYTHONPATH": folder}
        env |= {"JAX_COMPILATION_CACHE_DIR": programs}
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        pytest += ["--hypothesis-seed=0"]
        try:
            done = subprocess.run(
                [*pytest, *tests],
                cwd=folder,
                env=env,
                capture_output=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return None
    if done.returncode:
        return None
    pair = plain.splitlines(), text.splitlines()
    diff = [v for v in difflib.unified_diff(*pair, n=0, lineterm="") if v[0] in "-+"]
    return f"{i}: {module}:{how}\n" + "\n".join(diff[2:])


def main() -> None:
    """Run all mutants of a module, and print what lives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", help="a file of the library")
    parser.add_argument("tests", nargs="+", help="test files, the quickest first")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", help="numbers of mutants, as printed: 3,14")
    args = parser.parse_args()
    source = (ROOT / args.module).read_text()
    plain = ast.unparse(ast.parse(source))
    only = args.only and {int(i) for i in args.only.split(",")}
    chosen = [m for m in mutants(source) if not only or m[0] in only]
    programs = tempfile.mkdtemp()
    start, tests = time.time(), (args.module, args.tests, programs)
    if run((*tests, 3600, 0, "unchanged", plain, plain)) is None:
        sys.exit("The tests fail without any change.")
    limit = 60 + 3 * (time.time() - start)  # a loop without an end is noticed too
    jobs = [(*tests, limit, *m, plain) for m in chosen]
    lived = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for i, found in enumerate(pool.map(run, jobs)):
            print(f"\r{i + 1}/{len(jobs)}", end="", file=sys.stderr, flush=True)
            if found:
                lived.append(found)
                print("\n" + found, flush=True)
    shutil.rmtree(programs)
    print(f"{args.module}: {len(jobs)} mutants, {len(lived)} live")


if __name__ == "__main__":
    main()
