"""Record every compilation that the chapters show: book/results/hlo/*.json.gz.

    python tools/record_hlo.py [book/08_hlo.ipynb ...]

Runs the chapters with SSDLIB_RECORD set, which makes `notebook.compiled` write what it
compiles. Needs the compilers: pip install ".[tpu,cuda,book]". Takes minutes,
since the records of the large models are compiled too. The one of mamba2-jax comes
from benchmarks/mamba2_jax_hlo.py, because that package needs flax.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

BOOK = Path(__file__).parent.parent / "book"
NAMES = (
    "03_chunking",
    "08_hlo",
    "09_roofline",
    "10_results",
    "15_scale_out",
    "12_performance",
)
CHAPTERS = [BOOK / f"{name}.ipynb" for name in NAMES]


def main() -> None:
    """Run each chapter and say what it wrote."""
    os.environ["SSDLIB_RECORD"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    start = time.time()
    for path in [Path(p) for p in sys.argv[1:]] or CHAPTERS:
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=1800, resources=where).execute()
        print(f"{path.name}: {time.time() - start:.0f} s")
    for path in sorted((BOOK / "results/hlo").glob("*.json.gz")):
        fresh = "new" if path.stat().st_mtime > start else "old"
        print(f"{fresh}  {path.stat().st_size / 1e3:7.1f} kB  {path.name}")


if __name__ == "__main__":
    main()
