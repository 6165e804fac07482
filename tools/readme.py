"""Write what in README.md comes from elsewhere: its results table and its figure.

    make readme

The table is made from the records of compilations, training and measurements; a row
whose record is missing is left out. The figure is the first one of the introduction.
"""

import io
import json
import re
import sys
from pathlib import Path

import repository

from ssdlib.companion.figures import HUES, INK
from ssdlib.compiler import hlo
from ssdlib.measure.estimate import estimate

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RUNS = ROOT / "book/results/runs"
COMPARED = ROOT / "book/results/compare"
INKS = {"light": "#1f2328", "dark": "#e6edf3"}  # text on GitHub's two backgrounds
CHIPS = {"cpu": "CPU", "l40s": "L40S", "tpu-v6e": "TPU v6e"}


def table(runs: Path = RUNS) -> str:
    """The table of results; measurements are those of a folder."""
    lines = ["| What | Result | Record |", "|---|---|---|"]
    rows = [*compiled(), *measured(runs), *compared(), *trained()]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def load(name: str, target: str):
    """The record of a compilation, or None."""
    return hlo.load_record(name, target) if hlo.has_record(name, target) else None


def compiled():
    """Rows about compiled programs: what they call, and the work of a decode step."""
    programs = {chip: load("step", target) for target, chip in CHIPS.items()}
    programs = {chip: p for chip, p in programs.items() if p is not None}
    if programs:
        calls = {name for p in programs.values() for name in p.custom_calls}
        what = f"Custom calls in a decode step compiled for {', '.join(programs)}"
        yield what, ", ".join(sorted(calls)) or "none", "`book/results/hlo/step@*`"
    ours, theirs = (load(f"{who}step_130m", "tpu-v6e") for who in ("", "mamba2_jax_"))
    if ours is None or theirs is None:
        return
    source = "`book/results/hlo/*step_130m@tpu-v6e`"
    name = f"mamba2-jax {theirs.versions['mamba2-jax']}"
    what = "FLOPs of one decoded token, 130m, compiled for TPU v6e"
    flops = f"{ours.flops / 1e9:.2f} G; {name}: {theirs.flops / 1e9:.1f} G"
    yield what, flops, source
    yield "Kernels in it", f"{ours.launches}; {name}: {theirs.launches}", source
    times = [estimate(program).ms for program in (ours, theirs)]
    what = "Its time on a v6e, estimated (95 % interval, chapter 9; nothing was run)"
    yield what, f"{times[0]}; {name}: {times[1]}", "`book/results/calibration.json`"


def measured(folder: Path):
    """Rows about runs: the newest record of each device, model and dtype."""
    newest = {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if "rows" not in record:  # schema.json
            continue
        key = record["device"]["kind"], record["model"]["name"], record["dtype"]
        if key not in newest or record["date"] > newest[key][0]["date"]:
            newest[key] = record, path.name
    for _, (record, name) in sorted(newest.items()):
        yield measurement(record), result(record), f"`book/results/runs/{name}`"


def measurement(record: dict) -> str:
    """What was measured: model, dtype, batch, device, date, version of jax."""
    device = record["device"]
    chip = device["kind"]
    if device["platform"] == "cpu":
        chip = f"{device['host']}, {device['cores']} cores"
    return (
        f"{record['model']['name']}, {record['dtype']}, batch {record['batch']}, on "
        f"{chip} ({record['date'][:10]}, jax {record['versions']['jax']})"
    )


def result(record: dict) -> str:
    """The longest prefill and decode of a record, and cached against uncached."""
    parts = []
    for what in ("prefill", "decode"):
        rows = [row for row in record["rows"] if row["what"] == what]
        if not rows:
            continue
        row = max(rows, key=lambda row: row["length"])
        use = {"prefill": ("MFU", row["mfu"]), "decode": ("HBU", row["hbu"])}[what]
        share = "" if use[1] is None else f", {use[0]} {100 * use[1]:.0f} %"
        where = "of" if what == "prefill" else "after"
        parts += [
            f"{what} {where} {row['length']} tokens: {row['ms_per_token']:.3g} ms a "
            f"token{share}"
        ]
    if record["speedups"]:
        best = max(record["speedups"], key=lambda s: s["length"])
        parts += [
            f"cached against uncached at {best['length']}: "
            f"{best['ratio']['median']:.3g} times"
        ]
    return "; ".join(parts)


def compared(folder: Path = COMPARED):
    """The row about other programs: the newest record that has more than one."""
    for path in sorted(
        folder.glob("cpu-*.json"), key=lambda path: path.stem[-15:], reverse=True
    ):
        record = json.loads(path.read_text())
        pairs = [p for p in record["pairs"] if p["a"] == "ours float32"]
        others = [p for p in pairs if p["b"].endswith(" float32")]
        if len({p["b"] for p in others}) > 1:
            break
    else:
        return
    parts = {
        what: ", ".join(
            f"{p['b'].removesuffix(' float32')} {p['ratio']['median']:.2f}"
            for p in others
            if p["what"] == what
        )
        for what in ("decode", "prefill")
    }
    what = (
        f"Our time over that of others, {record['size']}, float32, batch "
        f"{record['batch']}, {record['threads']} threads of {record['device']['host']} "
        f"({record['date'][:10]})"
    )
    of = f"prefill of {record['prompt']} tokens"
    text = f"decode: {parts['decode']}; {of}: {parts['prefill']}"
    yield what, text, f"`book/results/compare/{path.name}`"


def trained():
    """The row about the model that ships with the package."""
    record = json.loads((ROOT / "ssdlib/tiny/training.json").read_text())
    model, xz, triples = (
        f"{record['held_out_bits_per_byte'][name]:.2f}"
        for name in ("model", "xz -9, given the rest", "order-2 byte model")
    )
    yield (
        f"Bits per byte, shipped model, {record['held_out_bytes']:,} held-out bytes",
        f"{model}; `xz -9` given the rest: {xz}; a table of byte triples: {triples}",
        "`ssdlib/tiny/training.json`",
    )


def figures() -> dict[str, str]:
    """The introduction's first figure as SVG, in ink for light and for dark pages."""
    plain = repository.notebook((ROOT / "book/intro.ipynb").read_text(), None)
    cells = json.loads(plain)["cells"]  # without %pip
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    until = next(i for i, text in enumerate(code) if "show(fig" in text)
    names: dict = {}
    for text in code[:until]:
        exec(text, names)
    out = {}
    for theme, ink in INKS.items():
        names["show"] = lambda figure, alt, t=theme, i=ink: out.update(
            {t: svg(figure, i, t == "dark")}
        )
        exec(code[until], names)
    return out


def svg(figure, ink: str, dark: bool) -> str:
    """A figure of the book as the text of an SVG file, for a page of one theme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(INK, ink)
    for light, lighter in HUES.values():
        text = text.replace(light, lighter if dark else light)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(r" +\n", "\n", text)


def updated(readme: str) -> str:
    """README.md's text with a fresh table between its marks."""
    marks = r"(<!-- results -->\n).*?(?=<!-- end of results -->)"
    text, n = re.subn(marks, lambda m: m[1] + table(), readme, flags=re.S)
    if n != 1:
        raise ValueError("README.md: it must hold <!-- results --> and its end once")
    return text


def main() -> None:
    """Write the table and the figure."""
    README.write_text(updated(README.read_text()))
    for theme, text in figures().items():
        (ROOT / f"book/_static/readme-{theme}.svg").write_text(text)
    print("written: README.md, book/_static/readme-light.svg and -dark.svg")


if __name__ == "__main__":
    sys.exit(main())
