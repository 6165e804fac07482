"""Records of rows, of which each has a key of its own."""

import json
from pathlib import Path


def put(path: Path, key: tuple[str, ...], new: list[dict]) -> None:
    """Write rows, each in the place of the one that has the same values of `key`."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {tuple(row[k] for k in key): row for row in [*old, *new]}
    rows = [known[values] for values in sorted(known)]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
