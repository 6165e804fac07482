"""What the TPU's compiler expects of this library.

    pip install ".[tpu]"
    python benchmarks/estimates.py [--sizes 130m,2.7b] [--targets tpu-v6e,tpu-v5e] ...

Compiles a decode step and a prefill of 1,024 tokens, batch 1, and writes what chapter
9 reads: book/results/estimates.json, one row a program; a row of the same program is
replaced. Cycles are the compiler's own estimates: a model, no time. Weights are shapes
only and nothing is run. The programs of mamba2-jax beside which the chapter sets them
are those of mamba2_jax_hlo.py; compile_time.py measures the seconds.
"""

import argparse
import dataclasses
import datetime
import json
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from mamba2_jax_hlo import PREFILL

import ssdlib
from ssdlib.compiler import hlo
from ssdlib.params import PRESETS

PATH = hlo.RECORDS / "estimates.json"
KEY = "what", "size", "target", "dtype"


def programs(size: str, dtype: str, layers: int | None = None):
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


def row(what, size, target, dtype):
    """Compile one program: its row of the record."""
    fn, args = programs(size, dtype)[what]
    donate = (len(args) - 1,) if what == "step" else ()
    program = hlo.compile_for(fn, *args, target=target, donate_argnums=donate)
    return dict(zip(KEY, (what, size, target, dtype), strict=True)) | {
        "cycles": program.cycles,
        "flops": program.flops,
        "bytes": program.bytes,
        "kernels": program.launches,
        "temp": program.memory["temp"],
        "date": datetime.date.today().isoformat(),
        "versions": program.versions,
    }


def main() -> None:
    """Compile what the arguments say, one program after another."""
    p = argparse.ArgumentParser(description="Compile for TPUs; keep the estimates.")
    split = partial(str.split, sep=",")
    p.add_argument("--what", type=split, default=["step", "prefill"])
    p.add_argument("--sizes", type=split, default=list(PRESETS))
    p.add_argument("--targets", type=split, default=["tpu-v6e", "tpu-v5e"])
    p.add_argument("--dtype", type=split, default=["float32", "bfloat16"])
    args = p.parse_args()
    for key in product(args.what, args.sizes, args.targets, args.dtype):
        rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
        rows = [r for r in rows if [r[k] for k in KEY] != list(key)]
        rows = sorted([*rows, r := row(*key)], key=lambda r: [r[k] for k in KEY])
        record = {"prefill": PREFILL, "batch": 1, "rows": rows}
        PATH.write_text(json.dumps(record, indent=1) + "\n")
        print(*(r[k] for k in (*KEY, "cycles", "kernels")))


if __name__ == "__main__":
    main()
