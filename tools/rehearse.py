"""Run chapters on a CPU as on an accelerator: FULL true, what a CPU can hold.

    python tools/rehearse.py [--tpu [--fits]] [book/06_generation.ipynb ...]

Sets SSDLIB_FULL, so that the chapters take the path of a GPU or TPU, with sizes that
`notebook.pick` reduces where a CPU needs it. With --tpu the default device computes as
inexactly as a TPU (tpu_arithmetic.py), and `notebook.tolerance` knows. Chapter 15
makes eight devices of a CPU, on a TPU too: it has no --tpu. Takes minutes a chapter.
With --fits every program that was made for that device is also compiled for a TPU v5e
(fits.py), which takes minutes more; chapter 10 has a record of its own for that.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
CHAPTERS = [ROOT / "book/intro.ipynb", *sorted((ROOT / "book").glob("[0-9]*.ipynb"))]
STARTUP = """
import sys
sys.path.insert(0, {!r})
import tpu_arithmetic
tpu_arithmetic.install()
sys.path.pop(0)
"""
LISTEN = """
import sys
sys.path.insert(0, {!r})
import fits
fits.listen(*fits.jax.devices())
sys.path.pop(0)
"""
REPORT = "sys.modules['fits'].compile_heard({!r})"


def main() -> None:
    """Run each chapter; raises where a cell fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tpu", action="store_true", help="the arithmetic of a TPU")
    parser.add_argument("--fits", action="store_true", help="compile for a v5e too")
    parser.add_argument("chapters", nargs="*", type=Path, default=CHAPTERS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in args.chapters:
            rehearse(path, args.tpu, Path(folder), args.fits)


def rehearse(path: Path, tpu: bool, folder: Path, fits: bool = False) -> None:
    """Run one chapter in this folder, and say how long it took."""
    env = os.environ | {"SSDLIB_FULL": "1", "JAX_PLATFORMS": "cpu"}
    tpu = tpu and not path.stem.startswith("15_")
    if tpu:
        startup = folder / "profile_default/startup"
        startup.mkdir(parents=True, exist_ok=True)
        (startup / "tpu.py").write_text(STARTUP.format(str(ROOT / "tools")))
        env |= {"IPYTHONDIR": str(folder), "SSDLIB_ARITHMETIC": "tpu"}
    start, nb = time.time(), nbformat.read(path, as_version=4)
    if fits and tpu and not path.stem.startswith("10_"):
        around = LISTEN.format(str(ROOT / "tools")), REPORT.format(path.stem)
        first, last = map(nbformat.v4.new_code_cell, around)
        nb.cells = [first, *nb.cells, last]
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(nb, timeout=900, resources=where).execute(env=env)
    print(f"{path.name}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
