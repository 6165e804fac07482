"""Record what this jax makes of the programs that chapters 8 and 9 compile.

    python tools/versions.py

Runs the two chapters and writes book/results/versions.json: for every program that was
compiled here, not read from a record, its kernels, FLOPs, bytes and cycles, and the
versions of jax and the compiler. Rows of other versions stay: run it once with each.
Needs the compilers: pip install ".[tpu,cuda,book]".
"""

import json
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "book/results/versions.json"
STARTUP = """
import json
from pathlib import Path
from ssdlib.companion import notebook

def log(name, target, make, live, known=notebook._made_or_recorded):
    p = known(name, target, make, live)
    if p.origin != "recorded":
        row = dict(name=name, target=target, kernels=p.launches, flops=p.flops)
        row |= dict(bytes=p.bytes, cycles=p.cycles, custom_calls=p.custom_calls)
        with Path({!r}).open("a") as lines:
            print(json.dumps(row | dict(date=p.date, versions=p.versions)), file=lines)
    return p

notebook._made_or_recorded = log
"""


def main() -> None:
    """Run both chapters and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        startup, lines = Path(folder, "profile_default/startup"), Path(folder, "rows")
        startup.mkdir(parents=True)
        (startup / "log.py").write_text(STARTUP.format(str(lines)))
        env = os.environ | {"IPYTHONDIR": folder}
        for name in ("08_hlo", "09_roofline"):
            nb = nbformat.read(ROOT / f"book/{name}.ipynb", as_version=4)
            where = {"metadata": {"path": folder}}
            # A claim of the page that another version refutes ends no recording.
            client = NotebookClient(nb, timeout=900, resources=where, allow_errors=True)
            client.execute(env=env)
            outputs = (o for c in nb.cells for o in c.get("outputs", []))
            for error in (o for o in outputs if o.output_type == "error"):
                print(f"{name}: {error.ename} {error.evalue}")
        new = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    here = {key(row) for row in new}
    rows = [row for row in rows if key(row) not in here] + new
    PATH.write_text(json.dumps({"rows": sorted(rows, key=key)}, indent=1) + "\n")
    print(f"{len(new)} programs with {new[0]['versions']}")


def key(row: dict) -> tuple:
    """What a row is about."""
    return row["name"], row["target"], row["versions"]["jax"]


if __name__ == "__main__":
    main()
