"""The paper's claims, and one verdict for each, computed from records.

    reproduced         measured here, on what the claim names
    supported          what it names is not all here; what was compiled or measured
                       here could have disagreed, and agrees
    contradicted       what is here disagrees
    not settled here   nothing here can tell; the command can

What the paper says, what was computed or compiled, and what was measured never share a
column. Their numbers come from paper.json, from records and from `chips.CHIPS`:
without these a cell is empty. Chapter 09 shows the table.
"""

from typing import NamedTuple

from ssdlib.companion.evidence import BACKENDS, Evidence, names, rows_of
from ssdlib.compiler.view import Table, count
from ssdlib.config import Mamba2Config
from ssdlib.measure import roofline

__all__ = ["CLOCK", "VERDICTS", "Finding", "judge", "table"]

VERDICTS = "reproduced", "supported", "contradicted", "not settled here"
REPRODUCED, SUPPORTED, CONTRADICTED, OPEN = VERDICTS
CLOCK = 1.75e9  # cycles a second of a v6e: an assumption, Google publishes none
ROUNDING = 1e-5  # between two programs in float32, as in tests/test_parity.py
HOST = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}


class Finding(NamedTuple):
    """What is known of one claim; `by` is where to see it, or what settles it."""

    computed: str
    measured: str
    verdict: str
    by: str


def judge(claim: dict, evidence: Evidence) -> Finding:
    """The verdict on one claim, by the rule of that claim."""
    return _RULES[claim["id"]](claim, evidence)


def table(
    claims: list[dict], evidence: Evidence, mine: Evidence | None = None
) -> Table:
    """A row for each claim; `mine`, of the reader, gets a column of its own."""
    header = ["claim", "verdict", "what the paper says", "computed or compiled"]
    header += ["measured here", *["your machine"] * bool(mine), "see, or run"]
    rows = []
    for claim in claims:
        known = judge(claim, evidence)
        found = judge(claim, evidence | mine) if mine else known
        said = claim["words"].format(**claim["numbers"])
        place = f"{' and '.join(claim['versions'])}, {claim['place']}"
        row = [claim["title"], f"**{found.verdict}**", f"{said} ({place})", *known[:2]]
        row += [judge(claim, mine).measured] if mine else []
        rows += [[*row, found.by]]
    return Table(header, rows, "", wrap=True)


# --- speed: only the chip that the claim names can settle it -------------------------


def _prefill(claim, evidence):
    programs = evidence.of_sizes("mamba2_jax_prefill").values()
    rates = [p.flops / p.cycles * CLOCK / 1e12 for p in programs]
    computed = f"its code, by estimate: {_range(rates)} TFLOPS" if rates else ""
    return _speed(claim, evidence, "prefill", "tflops", "TFLOPS", computed)


def _bandwidth(claim, evidence):
    uses = [
        100 * roofline.decode(Mamba2Config.preset(size), 1).hbu(p.cycles / CLOCK, chip)
        for size, p in evidence.of_sizes("mamba2_jax_step").items()
        if (chip := evidence.chips.get("tpu-v6e"))
    ]
    computed = f"its code, by estimate: {_range(uses)} %" if uses else ""
    return _speed(claim, evidence, "decode", "hbu", "% of the bandwidth", computed)


def _speed(claim, evidence, what, key, unit, computed):
    """What was reached, and whether a v6e reached nine tenths of the claim."""
    rows = [row for row in evidence.rows(what) if row[key] is not None]
    best, on_v6e = _best(rows, lambda row: row[key])
    reached = (100 if key == "hbu" else 1) * best[key] if best else 0
    measured = f"{reached:.2g} {unit} ({_at(best)})" if best else ""
    holds = on_v6e and reached >= 0.9 * claim["numbers"][key]
    return Finding(computed, measured, REPRODUCED if holds else OPEN, _bench(what))


def _ceiling(claim, evidence):
    """The largest MFU that the roofline allows, for a short and a long prompt."""
    if not (chip := evidence.chips.get("tpu-v6e")):
        return Finding("", "", OPEN, "")
    config, mfu = Mamba2Config.preset("2.7b"), claim["numbers"]["mfu"] / 100
    top = {T: roofline.prefill(config, 1, T).ceiling(chip) for T in (128, 1024)}
    parts = ", ".join(f"{part:.0%} at {T:,} tokens" for T, part in top.items())
    holds = [part <= 2 * mfu for part in top.values()]
    verdict = _held(all(holds), exact=False) if len(set(holds)) == 1 else OPEN
    computed = f"the ceiling is {parts} (2.7b); the abstract gives no length"
    return Finding(computed, "", verdict, f"chapter 08; {_bench('prefill')}")


def _speedup(claim, evidence):
    """Uncached over cached time, after the longest text that was measured."""
    rows = [s | names(run) for run in evidence.runs for s in run["speedups"]]
    best, on_v6e = _best(rows, lambda s: (s["length"], s["ratio"]["median"]))
    ratio = best["ratio"]["median"] if best else 0
    measured = f"{ratio:.3g} times ({_at(best)})" if best else ""
    holds = on_v6e and ratio >= 0.9 * claim["numbers"]["ratio"]
    computed = ""
    if "heat_map" in claim:
        step, read = map(evidence.of_sizes, ("mamba2_jax_step", "mamba2_jax_prefill"))
        ratios = [read[s].cycles / step[s].cycles for s in step.keys() & read.keys()]
        computed = f"its code, by estimate: {_range(ratios)} at 1,024" if ratios else ""
    by = _bench("decode,uncached")
    return Finding(computed, measured, REPRODUCED if holds else OPEN, by)


# --- a cache of fixed size -----------------------------------------------------------


def _memory(claim, evidence):
    """A step writes its cache over the last one; all runs have one size of it."""
    step = evidence.program("step_130m", "tpu-v6e")
    computed = f"{count(step.memory['alias'], 'B')}, updated in place" if step else ""
    found = [(run["memory"]["cache"], rows_of(run, "decode")) for run in evidence.runs]
    found = [(size, rows) for size, rows in found if rows]
    if not found:
        return Finding(computed, "", OPEN, _bench("decode"))
    size, rows = found[0]
    sizes = {(r[0]["model"], r[0]["dtype"], r[0]["batch"], n) for n, r in found}
    holds = len(sizes) == len({key[:-1] for key in sizes})
    measured = f"{count(size, 'B')} {_span(rows)}"
    return Finding(computed, measured, _held(holds), "chapters 04 and 06")


def _length(claim, evidence):
    """Time after the longest text over that after the shortest, within the spread."""
    program, by = evidence.program("step", "l40s"), _bench("decode", "l40s")
    computed = "one program for all lengths" if program else ""
    runs = [rows for run in evidence.runs if len(rows := rows_of(run, "decode")) > 1]
    if not runs:
        return Finding(computed, "", OPEN, by)

    def growth(rows, end="median", start="median"):
        return rows[-1]["seconds"][end] / rows[0]["seconds"][start]

    worst = max(runs, key=growth)
    measured = f"at most {growth(worst):.2f} times as long {_span(worst)}"
    holds = all(growth(rows, "lowest", "highest") < 1.2 for rows in runs)
    exact = any(rows[0]["chip"] == "l40s" for rows in runs)
    return Finding(computed, measured, _held(holds, exact), by)


# --- what the compilers made ---------------------------------------------------------


def _backends(claim, evidence):
    return _everywhere(evidence, "step", lambda op: False, "compiled for {targets}")


def _kernels(claim, evidence):
    text = "{found} custom calls in {all:,} kernels on {targets}"
    return _everywhere(evidence, "step", lambda op: op.kind == "custom", text)


def _host(claim, evidence):
    def visits(op):
        return op.opcode in HOST or "callback" in op.primitive

    text = "{found} of {all:,} kernels on {targets} exchange data with it"
    return _everywhere(evidence, "generate", visits, text)


def _everywhere(evidence, name, bad, text):
    """Whether no kernel is bad, on any backend; reproduced if it ran on all of them."""
    made = {target: evidence.program(name, target) for target in BACKENDS}
    made = {target: program for target, program in made.items() if program}
    found = [op for program in made.values() for op in program.ops if bad(op)]
    every = sum(len(program.ops) for program in made.values())
    text = text.format(found=len(found), all=every, targets=", ".join(made))
    ran = {run["device"]["platform"]: run["device"]["kind"] for run in evidence.runs}
    measured = f"ran on {', '.join(ran.values())}" if ran else ""
    by = _bench("decode", "l40s") + " and on a TPU"
    if len(made) < len(BACKENDS):
        return Finding(text if made else "", measured, OPEN, by)
    verdict = _held(not found, exact={"cpu", "gpu", "tpu"} <= ran.keys())
    return Finding(text, measured, verdict, by)


# --- the same numbers as other implementations ---------------------------------------


def _tokens(claim, evidence):
    equal = [case["greedy"] for case in evidence.cases()]
    text = "{worst} with every model, {n} tried, against {reference}"
    steps = claim["numbers"]["steps"]
    return _parity(evidence, equal, min, text, lambda n: n >= steps, "chapter 05")


def _rounding(claim, evidence):
    errors = [max(case.get("h", 0), case["logits"]) for case in evidence.cases()]
    text = "states and logits: {worst:.0e} of the largest, against {reference}"
    by = "chapters 05 and 10"
    return _parity(evidence, errors, max, text, lambda e: e <= ROUNDING, by)


def _perplexity(claim, evidence):
    pairs = [case["perplexity"] for case in evidence.cases("shipped")]
    apart = [abs(ours - theirs) for ours, theirs in pairs]
    text = "{worst:.0e} on a text in English, against {reference}"
    by = "`python -m ssdlib evaluate --model state-spaces/mamba2-130m --text FILE`"
    limit = claim["numbers"]["difference"]
    return _parity(evidence, apart, max, text, lambda d: d <= limit, by)


def _parity(evidence, values, worst_of, text, holds, by):
    """Supported at best: neither CUDA nor the published weights are here."""
    if not values:
        return Finding("", "", OPEN, by)
    worst, reference = worst_of(values), evidence.parity["reference"]
    measured = text.format(worst=worst, n=len(values), reference=reference)
    return Finding("", measured, _held(holds(worst), exact=False), by)


def _transfer(claim, evidence):
    models = evidence.parity.get("models", {}).values()
    errors = [model["error"] for model in models if model["as_is"]]
    if not errors:
        return Finding("", "", OPEN, "chapter 11")
    measured = f"{len(errors)} models tried, error at most {max(errors):.0e}"
    return Finding("", measured, _held(max(errors) <= ROUNDING), "chapter 11")


_RULES = {
    "prefill": _prefill,
    "ceiling": _ceiling,
    "bandwidth": _bandwidth,
    "speedup_review": _speedup,
    "speedup_abstract": _speedup,
    "speedup_figure": _speedup,
    "memory": _memory,
    "length": _length,
    "backends": _backends,
    "tokens": _tokens,
    "rounding": _rounding,
    "perplexity": _perplexity,
    "kernels": _kernels,
    "host": _host,
    "transfer": _transfer,
}


# --- words ---------------------------------------------------------------------------


def _held(holds: bool, exact: bool = True) -> str:
    """exact: measured on what the claim names."""
    return (REPRODUCED if exact else SUPPORTED) if holds else CONTRADICTED


def _best(rows, key):
    """(the largest, whether it is of a v6e): a v6e's rows count before all others."""
    v6e = [row for row in rows if row["chip"] == "tpu-v6e"]
    return max(v6e or rows, key=key, default=None), bool(v6e)


def _at(row: dict) -> str:
    return f"{row['model']}, {row['length']:,} tokens, {row['chip']}"


def _span(rows: list[dict]) -> str:
    first, last = rows[0], rows[-1]
    lengths = f"{first['length']:,} to {last['length']:,} tokens"
    return f"after {lengths} ({last['model']}, {last['chip']})"


def _range(values) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _bench(what: str, target: str = "tpu-v6e") -> str:
    return f"`python -m ssdlib bench --preset 2.7b --what {what} --target {target}`"
