"""What verdicts on the paper's claims rest on: everything that the book has recorded.

    measured    runs, by `bench`, and parity, by tools/record_parity.py
    compiled    programs, by `hlo`, for chips that are here or not

`claims` has the rules that turn it into verdicts.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ssdlib._checks import check_is
from ssdlib.compiler import hlo
from ssdlib.compiler.chips import CHIPS, Chip
from ssdlib.config import PRESETS

__all__ = ["BACKENDS", "Evidence", "load", "names", "rows_of"]

BACKENDS = "cpu", "l40s", "tpu-v6e"  # one of each backend


@cache
def _recorded(name: str, target: str) -> hlo.Compiled | None:
    return hlo.load_record(name, target) if hlo.has_record(name, target) else None


@dataclass(frozen=True)
class Evidence:
    """What verdicts rest on; `Evidence()` is none at all."""

    runs: Sequence[dict] = ()  # records of `bench`
    parity: dict = field(default_factory=dict)  # record of tools/record_parity.py
    program: Callable[[str, str], hlo.Compiled | None] = lambda name, target: None
    chips: dict[str, Chip] = field(default_factory=dict)

    def rows(self, what: str) -> list[dict]:
        """What was timed in all runs, and on what."""
        return [row for run in self.runs for row in rows_of(run, what)]

    def cases(self, name: str = "") -> list[dict]:
        """Comparisons with other implementations."""
        cases = self.parity.get("cases", {})
        return [case for key, case in cases.items() if key.startswith(name)]

    def of_sizes(self, name: str) -> dict[str, hlo.Compiled]:
        """Size -> program for a v6e, where it is recorded."""
        found = {size: self.program(f"{name}_{size}", "tpu-v6e") for size in PRESETS}
        return {size: program for size, program in found.items() if program}

    def __or__(self, other: "Evidence") -> "Evidence":
        """This, and the runs and comparisons of other."""
        theirs = {f"{k} (again)": v for k, v in other.parity.get("cases", {}).items()}
        cases = self.parity.get("cases", {}) | theirs
        parity = self.parity | ({"cases": cases} if cases else {})
        return Evidence([*self.runs, *other.runs], parity, self.program, self.chips)


def load(folder: str | Path = hlo.RECORDS) -> tuple[list[dict], Evidence]:
    """(claims, evidence): paper.json, and everything that the book has recorded.

    Raises ValueError for a folder without paper.json.
    """
    check_is("folder", folder, str, os.PathLike)
    folder = Path(folder)
    if not (folder / "paper.json").exists():
        raise ValueError(f"folder: {str(folder)!r}; it must hold paper.json")
    claims = json.loads((folder / "paper.json").read_text())["claims"]
    parity = json.loads((folder / "parity.json").read_text())
    paths = sorted((folder / "runs").glob("*-*.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    return claims, Evidence(runs, parity, _recorded, CHIPS)


def rows_of(run: dict, what: str) -> list[dict]:
    """The rows of one kind, the shortest first."""
    rows = [row | names(run) for row in run["rows"] if row["what"] == what]
    return sorted(rows, key=lambda row: row["length"])


def names(run: dict) -> dict:
    """Chip, model, dtype and batch of a run, and nothing else."""
    who = {"chip": run["device"]["name"], "model": run["model"]["name"]}
    return who | {"dtype": run["dtype"], "batch": run["batch"]}
