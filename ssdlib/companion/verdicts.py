"""The rules that turn evidence into a verdict, one for each claim of the paper.

    reproduced         measured here, on what the claim names
    supported          what it names is not all here; what was compiled or measured
                       here could have disagreed, and agrees
    contradicted       what is here disagrees
    not settled here   nothing here can tell; what could is named

A claim about every recurrence is contradicted by one and supported by many, and never
reproduced. Without records a rule has no number to show and settles nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ssdlib.compiler.view import count
from ssdlib.measure import roofline
from ssdlib.measure.estimate import estimate
from ssdlib.params import PRESETS, Mamba2Config

__all__ = ["RULES", "VERDICTS", "Finding"]

VERDICTS = "reproduced", "supported", "contradicted", "not settled here"
REPRODUCED, SUPPORTED, CONTRADICTED, OPEN = VERDICTS
ROUNDING = 1e-5  # between two programs in float32, as in tests/test_parity.py
LEVEL = 1.1  # times that differ by less are the same time
HOST = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
OF_XLA = "TopK", "Sharding", "__cublas", "__cudnn", "cu_threefry2x32"


class Finding(NamedTuple):
    """What is known of one claim."""

    computed: str
    measured: str
    verdict: str


# --- speed: a v6e settles it; what is computed can only agree or not -----------------


def _prefill(claim, evidence):
    """Their program: the roofline bounds it, and its estimate has an interval."""
    said, chip = claim["numbers"]["tflops"], evidence.chips.get("tpu-v6e")
    programs = evidence.of_sizes("mamba2_jax_prefill").values() if chip else ()
    spans = [(p.flops / 1e12, estimate(p)) for p in programs]
    if not spans:
        return _speed(claim, evidence, "prefill", "tflops", " TFLOPS", "", OPEN)
    low = min(work / time.high for work, time in spans)
    high = max(work / time.low for work, time in spans)
    text = f"its code, all sizes: {low:.3g} to {high:.3g} TFLOPS by estimates"
    verdict = CONTRADICTED if said > high else SUPPORTED if low <= said else OPEN
    return _speed(claim, evidence, "prefill", "tflops", " TFLOPS", text, verdict)


def _bandwidth(claim, evidence):
    """Their README's times: bytes of the weights over time and bandwidth."""
    said, chip = claim["numbers"]["hbu"], evidence.chips.get("tpu-v6e")
    if not chip or not evidence.rates:
        return _speed(claim, evidence, "decode", "hbu", " %", "", OPEN)

    def best(itemsize):
        steps = {s: Mamba2Config.preset(s) for s in evidence.rates}
        steps = {s: roofline.decode(c, 1, itemsize) for s, c in steps.items()}
        return max(100 * steps[s].hbu(1 / r, chip) for s, r in evidence.rates.items())

    text = f"its README's times: up to {best(4):.0f} % with weights in float32, "
    text += f"{best(2):.0f} % in bfloat16 (state and logits counted)"
    agrees = 0.9 * said <= best(4) <= min(1.1 * said, 100)
    verdict = SUPPORTED if agrees else CONTRADICTED
    return _speed(claim, evidence, "decode", "hbu", " %", text, verdict)


def _speed(claim, evidence, what, key, unit, computed, verdict):
    """The best of the rows that were timed, those of a v6e before all others."""
    rows = [row for row in evidence.rows(what) if row[key] is not None]
    on_v6e = [row for row in rows if row["chip"] == "tpu-v6e"]
    best = max(on_v6e or rows, key=lambda row: row[key], default=None)
    reached = (100 if key == "hbu" else 1) * best[key] if best else 0
    measured = f"{reached:.2g}{unit} ({_at(best)})" if best else ""
    if on_v6e:
        verdict = _by_part(reached / claim["numbers"][key], on_v6e, verdict)
    return Finding(computed, measured, verdict)


def _speedup(claim, evidence):
    """Uncached over cached time; a claim for all sizes is as good as its worst one."""
    numbers, rows = claim["numbers"], evidence.rows("speedup")
    on_v6e = [row for row in rows if row["chip"] == "tpu-v6e"]
    on_v6e = [r for r in on_v6e if r["length"] == numbers.get("length", r["length"])]
    best = max(
        on_v6e or rows, key=lambda r: (r["length"], r["ratio"]["median"]), default=None
    )
    measured = f"{best['ratio']['median']:.3g} times ({_at(best)})" if best else ""
    if not on_v6e or ("scales" in numbers and not _complete(on_v6e)):
        return Finding("", measured, OPEN)
    pick = min if "scales" in numbers else max
    part = pick(row["ratio"]["median"] for row in on_v6e) / numbers["ratio"]
    return Finding("", measured, _by_part(part, on_v6e, OPEN))


def _by_part(part: float, rows: list[dict], verdict: str) -> str:
    """Nine tenths of a claimed speed are enough; half of it for all sizes is not."""
    if part >= 0.9:
        return REPRODUCED
    return CONTRADICTED if part < 0.5 and _complete(rows) else verdict


def _complete(rows: list[dict]) -> bool:
    return {row["model"] for row in rows} >= PRESETS.keys()


def _ceiling(claim, evidence):
    """The MFU that the roofline allows, for a short and a long prompt."""
    if not (chip := evidence.chips.get("tpu-v6e")):
        return Finding("", "", OPEN)
    config, mfu = Mamba2Config.preset("2.7b"), claim["numbers"]["mfu"] / 100
    top = {T: roofline.prefill(config, 1, T).ceiling(chip) for T in (128, 1024)}
    parts = ", ".join(f"{part:.0%} at {T:,} tokens" for T, part in top.items())
    holds = {part <= 2 * mfu for part in top.values()}
    verdict = {(True,): SUPPORTED, (False,): CONTRADICTED}.get((*holds,), OPEN)
    computed = f"at most {parts} (2.7b), if activations never leave the chip"
    return Finding(computed, "", verdict)


# --- a cache of fixed size ------------------------------------------------------------


def _memory(claim, evidence):
    """The cache after each length has the bytes of its formula, and no more."""
    step = evidence.program("step_130m", "tpu-v6e")
    computed = f"{count(step.memory['alias'], 'B')}, updated in place" if step else ""
    found = [(run, evidence.of_run(run, "decode")) for run in evidence.runs]
    found = [(run, rows) for run, rows in found if len(rows) > 1 and "cache" in rows[0]]
    if not found:
        return Finding(computed, "", OPEN)
    holds = all({row["cache"] for row in rows} == {_card(run)} for run, rows in found)
    rows = max((rows for _, rows in found), key=lambda rows: rows[-1]["length"])
    measured = f"{count(rows[-1]['cache'], 'B')} {_span(rows)}"
    verdict = REPRODUCED if holds else CONTRADICTED
    return Finding(computed, measured, verdict)


def _card(run: dict) -> int:
    """Bytes of a cache: states in float32, conv states in the dtype, and a count.

    With int8 matrices, activations and so conv states are float32.
    """
    c, dtype = Mamba2Config(**run["model"]["sizes"]), run["dtype"]
    itemsize = jnp.dtype("float32" if dtype == "int8" else dtype).itemsize
    conv, state = (c.d_conv - 1) * c.d_xBC, c.d_inner * c.d_state
    return run["batch"] * (c.n_layers * (itemsize * conv + 4 * state) + 4)


def _length(claim, evidence):
    """The slowest length over the quickest; both rows of samples have to part."""
    program = evidence.program("step", "l40s")
    computed = "one program for all lengths" if program else ""
    runs = [evidence.of_run(run, "decode") for run in evidence.runs]
    runs = [r for r in runs if r and r[-1]["length"] >= 8 * r[0]["length"]]
    if not runs:
        return Finding(computed, "", OPEN)
    found = []
    for rows in runs:
        ordered = sorted((row["seconds"] for row in rows), key=lambda s: s["median"])
        quick, slow = ordered[0], ordered[-1]
        apart = slow["lowest"] > quick["highest"]
        found.append((slow["median"] / quick["median"], apart, rows))
    growth, _, rows = max(found, key=lambda item: item[0])
    measured = f"at most {growth:.2f} times as long {_span(rows)}"
    if any(growth > LEVEL and apart for growth, apart, _ in found):
        return Finding(computed, measured, CONTRADICTED)
    exact = any(rows[0]["chip"] == "l40s" for rows in runs)
    verdict = OPEN if growth > LEVEL else REPRODUCED if exact else SUPPORTED
    return Finding(computed, measured, verdict)


# --- what the compilers made ----------------------------------------------------------


def _backends(claim, evidence):
    """All three programs come from the same files of source, and ran."""
    made = evidence.on_backends("step")
    files = [{op.source.split(":")[0] for op in p.ops} - {""} for p in made.values()]
    every = set().union(*files)
    alone = sorted(file for file in every if any(file not in some for some in files))
    text = f"compiled for {', '.join(made)} from {len(every)} files"
    text += f"; not all from {', '.join(alone)}" if alone else ""
    return _compiled(evidence, made, text, not alone)


def _kernels(claim, evidence):
    """No kernel is called that neither XLA nor a library inside of it has made."""
    made = evidence.on_backends("step")
    calls = {
        t: [name for name in p.custom_calls if not name.startswith(OF_XLA)]
        for t, p in made.items()
    }
    found = [f"{name} on {t}" for t, names in calls.items() for name in names]
    every = sum(p.launches for p in made.values())
    text = f"{', '.join(found) or 'none'} of {every:,} kernels on {', '.join(made)}"
    return _compiled(evidence, made, text, not found)


def _host(claim, evidence):
    """A loop is in every program, and no kernel of it exchanges data with the host."""
    made = evidence.on_backends("generate")
    kernels = [op for p in made.values() for op in p.ops]
    found = [op for op in kernels if op.opcode in HOST or "callback" in op.primitive]
    loops = [
        max(op.times for op in p.ops) > 1 or p.unknown_loops for p in made.values()
    ]
    text = f"{len(found)} of {len(kernels):,} kernels in the texts for "
    text += f"{', '.join(made)} exchange data with it, in {sum(map(bool, loops))} loops"
    return _compiled(evidence, made, text, all(loops) and not found)


def _compiled(evidence, made, text, holds):
    """Reproduced only by what also ran on a CPU, a GPU and a TPU."""
    ran = {run["device"]["platform"]: run["device"]["kind"] for run in evidence.runs}
    measured = f"ran on {', '.join(ran.values())}" if ran else ""
    if len(made) < 3:
        return Finding(text if made else "", measured, OPEN)
    verdict = REPRODUCED if ran.keys() >= {"cpu", "gpu", "tpu"} else SUPPORTED
    return Finding(text, measured, verdict if holds else CONTRADICTED)


# --- the same numbers as other implementations ----------------------------------------


def _tokens(claim, evidence):
    equal = [case["greedy"] for case in evidence.cases()]
    text = "{worst} with every model, {n} tried, against {reference}"
    steps = claim["numbers"]["steps"]
    return _parity(evidence, equal, min, text, lambda n: n >= steps)


def _rounding(claim, evidence):
    errors = [max(case.get("h", 0), case["logits"]) for case in evidence.cases()]
    text = "logits: {worst:.0e} of the largest, against {reference}"
    if any("h" in case for case in evidence.cases()):
        text = "states h and " + text
    return _parity(evidence, errors, max, text, lambda e: e <= ROUNDING)


def _parity(evidence, values, worst_of, text, holds):
    """Reproduced by the published program on CUDA alone."""
    if not values:
        return Finding("", "", OPEN)
    worst, reference = worst_of(values), evidence.parity["reference"]
    measured = text.format(worst=worst, n=len(values), reference=reference)
    exact = "mamba_ssm" in reference and "CUDA" in reference
    verdict = REPRODUCED if exact else SUPPORTED
    return Finding("", measured, verdict if holds(worst) else CONTRADICTED)


def _perplexity(claim, evidence):
    """Both programs on that text with published weights; nothing else tells."""
    if not (case := evidence.parity.get("wikitext-103")):
        return Finding("", "", OPEN)
    ours, theirs = case["perplexity"]
    measured = f"{ours:.4f}, against {theirs:.4f} by {case['reference']}"
    holds = abs(ours - theirs) <= claim["numbers"]["difference"]
    return Finding("", measured, REPRODUCED if holds else CONTRADICTED)


def _transfer(claim, evidence):
    """Each recurrence that meets the conditions has to go through the form as it is."""
    models = evidence.parity.get("models", {})
    named = {k: m for k, m in models.items() if m["decay"] in ("scalar", "diagonal")}
    if not named:
        return Finding("", "", OPEN)
    off = {k: max(m["error"], m["error_of_other_code"]) for k, m in named.items()}
    fail = [k for k, m in named.items() if not m["as_is"] or off[k] > ROUNDING]
    fit = [off[k] for k in named if k not in fail]
    measured = f"{len(fit)} of {len(named)} recurrences, by renaming or a change of "
    measured += f"variable, error at most {max(fit, default=0):.0e}"
    measured += f"; not as it is: {', '.join(fail)}" if fail else ""
    return Finding("", measured, CONTRADICTED if fail else SUPPORTED)


RULES = dict(prefill=_prefill, ceiling=_ceiling, bandwidth=_bandwidth)
RULES |= {f"speedup_{where}": _speedup for where in ("review", "abstract", "figure")}
RULES |= dict(memory=_memory, length=_length, backends=_backends, tokens=_tokens)
RULES |= dict(rounding=_rounding, perplexity=_perplexity, kernels=_kernels)
RULES |= dict(host=_host, transfer=_transfer)


# --- words ----------------------------------------------------------------------------


def _at(row: dict) -> str:
    return f"{row['model']}, {row['length']:,} tokens, {row['chip']}"


def _span(rows: list[dict]) -> str:
    first, last = rows[0], rows[-1]
    lengths = f"{first['length']:,} to {last['length']:,} tokens"
    return f"after {lengths} ({last['model']}, {last['chip']})"
