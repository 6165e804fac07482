"""What compare.py makes of its samples: ratios, targets, tables."""

from math import log
from statistics import median

import numpy as np

from ssdlib.compiler.view import Table
from ssdlib.measure import roofline

BASE = "ours float32"


def compared(what, a, b, of_a, of_b):
    """One pair of the record: samples in seconds, and a over b within each round."""
    ratios = [x / y for x, y in zip(of_a, of_b, strict=True)]
    ratio = dict(median=median(ratios), lowest=min(ratios), highest=max(ratios))
    return dict(what=what, a=a, b=b, seconds_a=of_a, seconds_b=of_b, ratio=ratio)


def agreement(got, want):
    """max|y - y*| / max|y*|, and the share of rows with the same best token."""
    same = float(np.mean(got.argmax(-1) == want.argmax(-1)))
    return {"error": float(abs(got - want).max() / abs(want).max()), "argmax": same}


def targets(facts, config):
    """The aims of this run: {name, value, and the most or the least it should be}."""
    every = {(p["what"], p["a"], p["b"]): p["ratio"]["median"] for p in facts["pairs"]}
    narrow = "ours bfloat16", "ours int8"  # beside others: not the float32 of `found`
    found = {(w, b): ratio for (w, a, b), ratio in every.items() if a not in narrow}
    out = []

    def aim(name, value, **bound):
        if value is not None:
            out.append({"name": name, "value": value} | bound)

    for what, peer, most in AIMS:
        aim(f"{what}: ours / {peer}", found.get((what, peer)), most=most)
    for dtype, most in (("bfloat16", 0.85), ("int8", 0.6)):
        if f32 := found.get(("decode", f"ours {dtype}")):
            aim(f"decode: ours {dtype} / float32", 1 / f32, most=most)
    q8 = every.get(("decode", "ours int8", "llama.cpp q8_0"))
    aim("decode: ours int8 / llama.cpp q8_0", q8, most=1.25)
    if ratio := found.get(("prefill", "1024 tokens")):
        aim("prefill: exponent, 1k to 32k", log(ratio, 32), most=1.05)
    for dtype in ("float32", "int8"):
        if ratio := found.get(("decode", f"{dtype}, batch 1")):
            aim(f"tokens/s: {dtype}, batch 8 / batch 1", 8 / ratio, least=4.5)
    for what, limit, work in (
        ("decode", "read", roofline.decode(config, facts["batch"]).bytes),
        ("prefill", "in_projection", None),
    ):
        work = work or roofline.prefill(config, facts["batch"], facts["prompt"]).flops
        seconds = [s for p in facts["pairs"] if p["what"] == what for s in of_base(p)]
        if seconds and facts["limits"]:
            peak = max(library[limit] for library in facts["limits"].values())
            aim(f"{what}: share of {limit}", work / median(seconds) / peak, least=0.75)
    return out


AIMS = [  # what, against what, at most: for 130m, batch 1, two threads
    ("decode", "llama.cpp float32", 1.05),
    ("decode", "mamba2-jax float32", 1 / 25),
    ("decode", "transformers float32", 1 / 3),
    ("prefill", "llama.cpp float32", 0.95),
    ("prefill", "mamba2-jax float32", 0.38),
    ("prefill", "transformers float32", 0.4),
    ("token", "256 bare steps", 1.08),
    ("decode", "after 128", 1.03),
]


def of_base(pair):
    return pair["seconds_a"] if pair["a"] == BASE else []


def show(facts):
    """Print the pairs, the limits and the targets."""
    rows = []
    for p in facts["pairs"]:
        ms = [f"{1e3 * median(p[k]):.4g}" for k in ("seconds_a", "seconds_b")]
        ratio = [f"{p['ratio'][k]:.3g}" for k in ("median", "lowest", "highest")]
        error = f"{p['error']:.1e}" if "error" in p else "-"
        same = f"{p['argmax']:.0%}" if "argmax" in p else "-"
        rows.append([p["what"], p["a"], p["b"], *ms, *ratio, error, same])
    header = ["what", "a", "b", "ms a", "ms b", "a / b", "lowest", "highest"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    note = (
        f"{facts['size']}, batch {facts['batch']}, prompt {facts['prompt']}, "
        f"{facts['threads']} threads, median of {facts['repeats']}; "
        f"error and argmax: logits of b against ours float32.\n{versions}\n"
        f"skipped: {facts['skipped'] or 'none'}\n"
    )
    print(Table([*header, "error", "argmax"], rows, note))
    rows = [
        [name, *(f"{value / 1e9:.4g}" for value in limit.values())]
        for name, limit in facts["limits"].items()
    ]
    print(Table(["limit", "read GB/s", "in-projection GFLOP/s", "square"], rows, ""))
    rows = [
        [t["name"], f"{t['value']:.3g}", bound, f"{t[bound]:.3g}"]
        for t in facts["targets"]
        for bound in ("most", "least")
        if bound in t
    ]
    print(Table(["targets of this run", "value", "at", ""], rows, ""))
