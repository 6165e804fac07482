"""Record the bytes that a cached step of mamba2-jax 1.1.2 moves: step_bytes.json.

    pip install mamba2-jax==1.1.2 ".[tpu]"
    python benchmarks/mamba2_jax_bytes.py [130m 370m ...]

For each size, with float32 and with bfloat16 weights, compiled for a TPU v6e: bytes by
XLA's cost analysis of the program before it is optimized, where every operation reads
and writes memory, and of the compiled one; by `ssdlib.compiler`, of the compiled one,
which leaves out what stays on the chip; and of the weights. Chapter 9 holds them
against published times. Weights are shapes only and nothing is run.
"""

import datetime
import json
import sys
from importlib import metadata
from itertools import product

import jax
import jax.numpy as jnp
from mamba2_jax_hlo import programs

from ssdlib.compiler import hlo
from ssdlib.compiler.targets import compile_with
from ssdlib.params import PRESETS

PATH = hlo.RECORDS / "step_bytes.json"
TARGET, DTYPES = "tpu-v6e", ("float32", "bfloat16")


def row(size: str, dtype: str) -> dict:
    """One step, by every count."""
    fn, (state, *rest) = programs(size)["step"]
    state = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, jnp.dtype(dtype)), state
    )
    args = state, *rest
    compiled, origin, seconds = compile_with(TARGET, fn, args)
    program = hlo.read(TARGET, compiled, origin, seconds)
    return {
        "size": size,
        "dtype": dtype,
        "weights": sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state)),
        "bytes": program.bytes,
        "xla_compiled": compiled.cost_analysis()["bytes accessed"],
        "xla_before": jax.jit(fn).lower(*args).cost_analysis()["bytes accessed"],
        "flops": program.flops,
        "cycles": program.cycles,
        "versions": program.versions | {"mamba2-jax": metadata.version("mamba2-jax")},
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Compile the sizes given, or all five, one program after another."""
    rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    rows = {(r["size"], r["dtype"]): r for r in rows}
    for key in product(sys.argv[1:] or PRESETS, DTYPES):
        rows[key] = row(*key)
        print(*rows[key].values(), flush=True)
        record = {
            "target": TARGET,
            "command": "python benchmarks/mamba2_jax_bytes.py",
            "rows": [
                rows[key]
                for key in product(PRESETS, ("float32", "bfloat16"))
                if key in rows
            ],
        }
        PATH.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
