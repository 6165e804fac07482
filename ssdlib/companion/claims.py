"""The paper's claims, what is known of each, and the table of verdicts.

`paper.json` states each claim so that it can be tested, says whose code the evidence is
about, and what would turn the verdict; `verdicts` has the rules. What the paper says,
what was computed or compiled, and what was measured never share a column. Chapter 10
shows the table.
"""

import html
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ssdlib._checks import check_is
from ssdlib.companion.numerals import written
from ssdlib.companion.verdicts import RULES, VERDICTS, Finding
from ssdlib.compiler import hlo
from ssdlib.compiler.chips import CHIPS, Chip
from ssdlib.compiler.view import Table
from ssdlib.params import PRESETS

__all__ = ["BACKENDS", "Evidence", "judge", "load", "table"]

BACKENDS = "cpu", "l40s", "tpu-v6e"  # one of each backend
MARKS = dict(zip(VERDICTS, "✓◐✗?", strict=True))  # so that color is not all that tells


@dataclass(frozen=True)
class Evidence:
    """What verdicts rest on; `Evidence()` is none at all.

    runs:    records of `bench`, measured
    parity:  the record of tools/record_parity.py, measured
    program: (name, target) -> what was compiled, for chips that are here or not
    rates:   tokens a second by size, read off the README of the paper's code
    """

    runs: Sequence[dict] = ()
    parity: dict = field(default_factory=dict)
    program: Callable[[str, str], hlo.Compiled | None] = lambda name, target: None
    chips: dict[str, Chip] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def rows(self, what: str) -> list[dict]:
        """What was timed in all runs, or the "speedup" of each length."""
        return [row for run in self.runs for row in self.of_run(run, what)]

    @staticmethod
    def of_run(run: dict, what: str) -> list[dict]:
        """The rows of one kind, the shortest first, each with its chip and model."""
        who = {"chip": run["device"]["name"], "model": run["model"]["name"]}
        who |= {"dtype": run["dtype"], "batch": run["batch"]}
        rows = run["speedups"] if what == "speedup" else run["rows"]
        rows = [row | who for row in rows if row.get("what", what) == what]
        return sorted(rows, key=lambda row: row["length"])

    def cases(self) -> list[dict]:
        """Comparisons with another implementation."""
        return list(self.parity.get("cases", {}).values())

    def on_backends(self, name: str) -> dict[str, hlo.Compiled]:
        """Target -> program for one target of each backend, where it is recorded."""
        found = {target: self.program(name, target) for target in BACKENDS}
        return {target: program for target, program in found.items() if program}

    def of_sizes(self, name: str) -> dict[str, hlo.Compiled]:
        """Size -> program for a v6e, where it is recorded."""
        found = {size: self.program(f"{name}_{size}", "tpu-v6e") for size in PRESETS}
        return {size: program for size, program in found.items() if program}

    def __or__(self, other: "Evidence") -> "Evidence":
        """This, and the runs and comparisons of other."""
        theirs = {f"{k} (again)": v for k, v in other.parity.get("cases", {}).items()}
        cases = self.parity.get("cases", {}) | theirs
        parity = self.parity | ({"cases": cases} if cases else {})
        runs = [*self.runs, *other.runs]
        return Evidence(runs, parity, self.program, self.chips, self.rates)


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
    rates = next(c["heat_map"]["tokens_per_second"] for c in claims if "heat_map" in c)
    rates = {size: float(rate) for size, rate in rates.items()}
    return claims, Evidence(runs, parity, _recorded, CHIPS, rates)


@cache
def _recorded(name: str, target: str) -> hlo.Compiled | None:
    return hlo.load_record(name, target) if hlo.has_record(name, target) else None


def judge(claim: dict, evidence: Evidence) -> Finding:
    """The verdict on one claim, by the rule of that claim."""
    return RULES[claim["id"]](claim, evidence)


class Verdicts(Table):
    """A row for each claim; in a notebook a card for each, below a bar of counts."""

    def _repr_html_(self) -> str:
        found = [row[1].strip("*") for row in self.rows]
        bar = " ".join(
            _badge(verdict, f"{n} ", f"flex:{n}")
            for verdict in VERDICTS
            if (n := found.count(verdict))
        )
        cards = "".join(map(self._card, self.rows))
        return f'<div class="verdict-bar">{bar}</div><div class="claims">{cards}</div>'

    def _card(self, row: list[str]) -> str:
        title, verdict, *cells = map(html.escape, row)
        # The class gives a command a button to copy it; in Colab it is plain text.
        block = r'<div class="highlight"><pre>\1</pre></div>'
        cells[-1] = re.sub(";? ?`(.+?)`", block, cells[-1])
        facts = zip(self.header[2:], cells, strict=True)
        facts = "".join(f"<dt>{k}</dt><dd>{v or '–'}</dd>" for k, v in facts)
        badge = _badge(verdict.strip("*"))
        return f'<div class="claim"><p><b>{title}</b> {badge}</p><dl>{facts}</dl></div>'


def _badge(verdict: str, count: str = "", style: str = "") -> str:
    kind = f"badge v-{verdict.split()[0]}"
    text = f"{MARKS[verdict]} {count}{verdict}"
    return f'<span class="{kind}" style="{style}">{text}</span>'


def table(
    claims: list[dict], evidence: Evidence, mine: Evidence | None = None
) -> Verdicts:
    """A row for each claim; `mine`, of the reader, gets a place of its own."""
    header = ["claim", "verdict", "what the paper says", "computed or compiled"]
    header += ["measured here", *["your machine"] * bool(mine)]
    header += ["whose code", "see, or run"]
    rows = []
    for claim in claims:
        known = judge(claim, evidence)
        found = judge(claim, evidence | mine) if mine else known
        said = claim["words"].format(**claim["numbers"])
        place = f"{' and '.join(claim['versions'])}, {claim['place']}"
        row = [claim["title"], f"**{found.verdict}**", f"{said} ({place})", *known[:2]]
        row += [judge(claim, mine).measured] if mine else []
        rows += [[*map(written, row), claim["whose"], claim["by"]]]
    return Verdicts(header, rows, "", wrap=True)
