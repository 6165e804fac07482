"""Record how far other implementations and we are apart: book/results/parity.json.

    python tools/record_parity.py

Chapter 10 shows it. Runs the nine models of tests/golden/make_golden.py with torch and
transformers on the CPU, live, and the models of chapters 13 and 14 against the loops
of their papers. Needs the test extra and requirements-extras.txt. Takes about a minute.
"""

import datetime
import json
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/golden")]
import make_golden as golden  # noqa: E402
import oracle  # noqa: E402
import test_recurrences as others  # noqa: E402

OUT = ROOT / "book/results/parity.json"


def main() -> None:
    """Run every model, and write what a page can show or run again."""
    jax.config.update("jax_default_matmul_precision", "highest")
    cases, shipped = {}, {}
    for name in golden.CASES:
        with tempfile.TemporaryDirectory() as folder:
            folder = golden.write_checkpoint(Path(folder), name)
            mine, theirs = golden.ours(folder, name), golden.reference(folder, name)
        errors = golden.compare(mine, theirs)
        errors["perplexity"] = [float(np.exp(v["nats"])) for v in (mine, theirs)]
        cases[name] = errors
        if name == "shipped":
            shipped = kept(theirs)
    packages = "jax", "jaxlib", "numpy", "torch", "transformers"
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in packages}
    data = {
        "origin": "measured",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "python tools/record_parity.py",
        "reference": f"transformers {versions['transformers']} on a CPU",
        "versions": versions,
        "steps": golden.STEPS,
        "cases": cases,
        "shipped": shipped,
        "models": models(),
    }
    OUT.write_text(json.dumps(data, indent=1) + "\n")
    print(f"written: {OUT.relative_to(ROOT)}")


def kept(theirs: dict) -> dict:
    """What the reader's machine must give for the model that ships with ssdlib."""
    ids = golden.passage("shipped")[0]
    return {
        "prompt": golden.prompt("shipped")[0].tolist(),
        "greedy": theirs["greedy"][0].tolist(),
        "logits": [float(f"{v:.7g}") for v in theirs["logits"][0, -1]],
        "text": bytes(ids.astype(np.uint8)).decode("ascii"),
        "nats": float(theirs["nats"]),
    }


FLA = "flash-linear-attention 0.6.0"
OTHER_CODE = {  # model: (its outputs in tests/golden/recurrences.npz, whose they are)
    "linear attention": ("y_linear_attention", FLA),
    "normalized linear attention": ("y_normalized", FLA),
    "simple GLA": ("y_simple_gla", FLA),
    "RetNet": ("y_retention_unrotated", FLA),
    "mLSTM": ("y_mlstm", "transformers 5.23.0"),
    "Mamba-3": ("y_mamba3", "mamba3-jax 1.0.1"),
    "GLA": ("y_gla", FLA),
    "DeltaNet": ("y_delta_net", FLA),
}
DECAYS = {"GLA": "diagonal", "DeltaNet": "matrix"}  # of all others: one number a head


def models() -> dict[str, dict]:
    """Error of each model in chunks, and whether it needs no code beside the form."""
    found = {}
    for name, (function, _, _) in others.MODELS.items():
        function = getattr(function, "func", function)
        _, args, loop = others.case(name, 37)
        y_star, _ = others.definition(name, loop, args)
        y, _ = others.run(name, args, 8)
        as_is = function.__module__ == "ssdlib.beyond.scalar_decay"
        theirs, by = OTHER_CODE[name]
        ours, _ = others.beside_other_code(theirs)
        found[name] = {
            "decay": DECAYS.get(name, "scalar"),
            "as_is": as_is,
            "error": float(oracle.error(y, y_star)),
            "error_of_other_code": float(oracle.error(ours, others.GOLDEN[theirs])),
            "other_code": by,
        }
    return found


if __name__ == "__main__":
    main()
