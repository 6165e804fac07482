"""Run chapters as Colab would: the package installed, no checkout beside them.

    python tools/imitate_colab.py [book/09_results.ipynb ...]

Builds the wheel, installs it with the extra `book` into a bare environment in a
temporary folder, copies the chapters to another folder and runs them there unchanged,
on the CPU. Then checks the records that they wrote. Needs a network, and minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECK = """
import json, pathlib, jsonschema, ssdlib
from ssdlib.measure.record import RUNS
home = pathlib.Path(ssdlib.__file__)
assert "site-packages" in home.parts, home
schema = json.loads((RUNS / "schema.json").read_text())
paths = sorted(pathlib.Path("measured").glob("*.json"))
assert paths, "no record was written"
for path in paths:
    made = json.loads(path.read_text())
    jsonschema.validate(made, schema)
    print("finished record:", path.name, len(made["rows"]), "rows")
"""


def main() -> None:
    """Install, run, check; raises where one of them fails."""
    chapters = [Path(p) for p in sys.argv[1:]] or [ROOT / "book/09_results.ipynb"]
    with tempfile.TemporaryDirectory() as folder:
        python, content = install(Path(folder)), Path(folder) / "content"
        content.mkdir()
        keep = {k: os.environ[k] for k in ("HOME", "PATH", "LANG") if k in os.environ}
        here = dict(cwd=content, env=keep | {"JAX_PLATFORMS": "cpu"}, check=True)
        for chapter in chapters:
            shutil.copy(chapter, content)
            start = time.time()
            run = [python, "-m", "jupyter", "execute", "--timeout=600", chapter.name]
            subprocess.run(run, **here)
            print(f"{chapter.name}: {time.time() - start:.0f} s", flush=True)
        subprocess.run([python, "-c", CHECK], **here)


def install(folder: Path) -> Path:
    """The Python of a new environment that holds the wheel and nothing else."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True, cwd=folder
    )
    (wheel,) = folder.glob("ssdlib-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    pins = ROOT / "requirements.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", pins, f"{wheel}[book]"],
        check=True,
        cwd=folder,
    )
    return python


if __name__ == "__main__":
    main()
