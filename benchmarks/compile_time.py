"""Seconds to lower and to compile our programs, and those of mamba2-jax 1.1.2.

    pip install mamba2-jax==1.1.2 ".[tpu]"
    python benchmarks/compile_time.py [--size 2.7b] [--what step,prefill] ...

Every program is made in a process of its own, ours and theirs in turn, for a TPU that
need not be here; weights are shapes only and nothing is run. Lowering is what JAX does
in Python, from the function to StableHLO; compiling is what XLA does after it.
Processor seconds are those of both, of all threads: they tell more than wall seconds
where other programs run. No compilation cache is used. Appends one row a process to
book/results/compile_time.json: delete it to begin anew. Prints medians of its rows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
from estimates import programs as ours
from mamba2_jax_hlo import PREFILL
from mamba2_jax_hlo import programs as theirs

from ssdlib.compiler import hlo
from ssdlib.compiler.targets import compile_with
from ssdlib.measure import record
from ssdlib.params import PRESETS

PATH = hlo.RECORDS / "compile_time.json"
KEY = "who", "what", "size", "layers", "dtype", "target"
SECONDS = "lower", "compile", "processor"


def measure(who, what, size, layers, dtype, target) -> dict:
    """Lower and compile one program in this process: its seconds."""
    struct = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    compile_with(target, jnp.sin, (struct,))  # starts the compiler
    make = ours if who == "ssdlib" else theirs
    dtypes = (dtype,) if who == "ssdlib" else ()
    fn, args = make(size, *dtypes, layers=layers)[what]
    donate = (len(args) - 1,) if what == "step" else ()
    wall, processor = time.perf_counter(), time.process_time()
    _, _, seconds = compile_with(target, fn, args, donate)
    wall = time.perf_counter() - wall
    spent = time.process_time() - processor
    values = wall - seconds, seconds, spent
    return {k: round(v, 2) for k, v in zip(SECONDS, values, strict=True)}


def rows() -> list[dict]:
    """What the record holds."""
    return json.loads(PATH.read_text())["rows"] if PATH.exists() else []


def main() -> None:
    """Start one process after another, add what they say to the record, print."""
    p = argparse.ArgumentParser(description="Compile in fresh processes; take seconds.")
    split = partial(str.split, sep=",")
    p.add_argument("--size", default="2.7b", choices=PRESETS)
    p.add_argument("--what", type=split, default=["step", "prefill"])
    p.add_argument("--who", type=split, default=["ssdlib", "mamba2-jax"])
    p.add_argument("--layers", type=split, help="default: as many as the size has")
    p.add_argument("--dtype", default="float32", help="of ours; theirs: float32")
    p.add_argument("--target", default="tpu-v6e")
    p.add_argument("--rounds", type=int, default=1)
    args = p.parse_args()
    layers = [int(n) for n in args.layers or [PRESETS[args.size][1]]]
    jobs = [
        (who, what, args.size, n, args.dtype, args.target)
        for what in args.what
        for n in layers
        for who in args.who
    ] * args.rounds
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    for job in jobs:
        load = record.load_average()
        command = [sys.executable, __file__, json.dumps(job)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
        facts = record.provenance(jax.devices("cpu")[0]) | {"load": load}
        facts = {k: facts[k] for k in ("date", "commit", "load", "versions", "device")}
        row = dict(zip(KEY, job, strict=True)) | json.loads(done.stdout) | facts
        text = json.dumps({"prefill": PREFILL, "batch": 1, "rows": [*rows(), row]})
        PATH.write_text(text.replace('{"who"', '\n{"who"') + "\n")
    for job in dict.fromkeys(jobs):
        same = [r for r in rows() if tuple(r[k] for k in KEY) == job]
        values = (f"{k} {median(r[k] for r in same):.2f}" for k in SECONDS)
        print(*job, *values, f"(median of {len(same)}, seconds)")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
