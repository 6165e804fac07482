"""What the TPU's compiler expects of this library and of mamba2-jax 1.1.2.

    pip install mamba2-jax==1.1.2 ".[tpu]"
    python benchmarks/estimates.py [--sizes 130m,2.7b] [--targets tpu-v6e,tpu-v5e] ...

Compiles a decode step and a prefill of 1,024 tokens, batch 1, and writes what chapter
14 reads: book/results/estimates.json, one row a program; a row of the same program is
replaced. Cycles are the compiler's own estimates: a model, no time. Weights are shapes
only and nothing is run. Ours and theirs are compiled in turn, --repeats times, so that
their compile seconds can be compared; processor seconds are those of all threads.
Without mamba2-jax its rows stay as they are.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import time
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
from mamba2_jax_hlo import PREFILL
from mamba2_jax_hlo import programs as theirs

import ssdlib
from ssdlib import hlo
from ssdlib.config import PRESETS

PATH = hlo.RECORDS / "estimates.json"
KEY = "who", "what", "size", "target", "dtype"


def ours(size: str, dtype: str, layers: int | None = None):
    """{"step": (fn, args), "prefill": (fn, args)}, as `mamba2_jax_hlo.programs`."""
    config = ssdlib.Mamba2Config.preset(size)
    config = dataclasses.replace(config, n_layers=layers or config.n_layers)
    make = partial(ssdlib.init_params, config, dtype=jnp.dtype(dtype))
    params = jax.eval_shape(make, jax.random.key(0))
    cache = jax.eval_shape(lambda: ssdlib.init_cache(config, 1, jnp.dtype(dtype)))
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, PREFILL), jnp.int32)
    return {
        "step": (ssdlib.decode_step, (params, config, token, cache)),
        "prefill": (ssdlib.prefill, (params, config, tokens, cache)),
    }


def row(who, what, size, target, dtype):
    """Compile one program: its row of the record."""
    make = partial(ours, size, dtype) if who == "ssdlib" else partial(theirs, size)
    fn, args = make()[what]
    donate = (len(args) - 1,) if what == "step" else ()
    jax.clear_caches()
    start = time.process_time()
    program = hlo.compile_for(fn, *args, target=target, donate_argnums=donate)
    return dict(zip(KEY, (who, what, size, target, dtype), strict=True)) | {
        "cycles": program.cycles,
        "flops": program.flops,
        "bytes": program.bytes,
        "kernels": program.launches,
        "temp": program.memory["temp"],
        "compile_seconds": program.compile_seconds,
        "processor_seconds": round(time.process_time() - start, 2),
        "date": datetime.date.today().isoformat(),
        "versions": program.versions,
    }


def merged(rows: list[dict], repeats: list[dict]) -> list[dict]:
    """The record's rows with one program's repeats in place of its older row."""
    new = repeats[-1] | {
        name: median(r[name] for r in repeats)
        for name in ("compile_seconds", "processor_seconds")
    }
    new["repeats"] = len(repeats)
    keep = [r for r in rows if any(r[k] != new[k] for k in KEY)]
    return sorted([*keep, new], key=lambda r: [r[k] for k in KEY])


def main() -> None:
    """Compile what the arguments say, one size, target and program after another."""
    p = argparse.ArgumentParser(description="Compile for TPUs; compare estimates.")
    split = partial(str.split, sep=",")
    p.add_argument("--sizes", type=split, default=list(PRESETS))
    p.add_argument("--targets", type=split, default=["tpu-v6e", "tpu-v5e"])
    p.add_argument("--what", type=split, default=["step", "prefill"])
    p.add_argument("--who", type=split, default=["ssdlib", "mamba2-jax"])
    p.add_argument("--dtype", type=split, default=["float32", "bfloat16"])
    p.add_argument("--repeats", type=int, default=1)
    args = p.parse_args()
    who = [(w, d) for w in args.who for d in args.dtype]
    if importlib.util.find_spec("mamba2_jax") is None:
        who = [pair for pair in who if pair[0] == "ssdlib"]
        print("mamba2-jax is not installed: its rows stay as they are")
    who = [pair for pair in who if pair != ("mamba2-jax", "bfloat16")]
    for size, target, what in (
        (s, t, w) for s in args.sizes for t in args.targets for w in args.what
    ):
        done: dict = {pair: [] for pair in who}
        for _ in range(args.repeats):
            for w, dtype in who:
                done[w, dtype].append(row(w, what, size, target, dtype))
        for repeats in done.values():
            rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
            record = {"prefill": PREFILL, "batch": 1, "rows": merged(rows, repeats)}
            PATH.write_text(json.dumps(record, indent=1) + "\n")
            r = repeats[-1]
            print(*(r[k] for k in (*KEY, "cycles", "kernels", "compile_seconds")))


if __name__ == "__main__":
    main()
