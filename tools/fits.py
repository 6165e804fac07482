"""What the chapters' full sizes take on one chip that is not here: memory and time.

    python tools/fits.py [--target tpu-v5e] [--only 2.7b]

Compiles the largest programs that chapters run on an accelerator, and writes
book/results/fits.json, one row a program: bytes of arguments, results and temporary
arrays, cycles by the compiler's estimate, processor seconds in the compiler, and how
often the chapter runs it. Nothing is run here. Needs: pip install ".[tpu]".
"""

import argparse
import dataclasses
import json
import time
from functools import partial

import jax
import jax.numpy as jnp

import ssdlib
from ssdlib.beyond import transformer
from ssdlib.compiler import hlo
from ssdlib.config import PRESETS
from ssdlib.measure import bench

PATH = hlo.RECORDS / "fits.json"
KEY = "chapter", "what", "target"


def of_a_layer(T: int) -> tuple:
    """x, dt, A, B, C of one layer of the 130m model, without values."""
    c = ssdlib.Mamba2Config.preset("130m")
    H, P, N = c.n_heads, c.head_dim, c.d_state
    shapes = (1, T, H, P), (1, T, H), (H,), (1, T, 1, N), (1, T, 1, N)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def of_a_model(size: str, T: int) -> dict:
    """{name: (fn, args, times)}: the passes of chapter 10 over T tokens, and a step."""
    config = ssdlib.Mamba2Config.preset(size)
    weights, cache = bench.shapes(config, 1, "float32")
    tokens, one = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, T), (1,)))
    rounds = 4  # three and the one that is dropped
    steps = rounds * (bench.LOOP + 1)
    return {
        f"{size}, step": (ssdlib.decode_step, (weights, config, one, cache), steps),
        f"{size}, prefill": (ssdlib.prefill, (weights, config, tokens, cache), rounds),
        f"{size}, uncached": (ssdlib.forward, (weights, config, tokens), rounds),
    }


def programs() -> dict:
    """{(chapter, what): (fn, args, times)}: times is how often the chapter runs it."""
    made = {}
    half = dataclasses.replace(ssdlib.Mamba2Config.preset("130m"), n_layers=12)
    rival = transformer.AttentionConfig.like(half)
    weights = jax.eval_shape(partial(transformer.init_params, rival), jax.random.key(0))
    past = jax.eval_shape(partial(transformer.init_cache, rival, 1, 65_536))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    args = weights, rival, one, past
    made["06", "attention, 65,536 tokens"] = transformer.decode_step, args, 4 * 32
    for name, T, times in (("ssd_recurrent", 8192, 8), ("ssd_quadratic", 4096, 8)):
        chapter = "01" if name == "ssd_recurrent" else "03"
        made[chapter, name] = getattr(ssdlib, name), of_a_layer(T), times
    for size in PRESETS:
        for what, program in of_a_model(size, bench.LENGTHS[-1]).items():
            made["10", what] = program
    return made


def main() -> None:
    """Compile one program after another; each row is written when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="tpu-v5e")
    parser.add_argument("--only", default="", help="programs with this in their name")
    options = parser.parse_args()
    target = options.target
    for (chapter, what), (fn, args, times) in programs().items():
        if options.only not in what:
            continue
        start = time.process_time()
        p = hlo.compile_for(fn, *args, target=target)
        key = dict(zip(KEY, (chapter, what, target), strict=True))
        row = key | {"times": times, "memory": p.memory, "cycles": p.cycles}
        row |= {"flops": p.flops, "bytes": p.bytes, "kernels": p.launches}
        row |= {"compile_seconds": round(time.process_time() - start, 1)}
        row |= {"date": p.date}
        row |= {"versions": p.versions}
        rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
        rows = [r for r in rows if any(r[k] != v for k, v in key.items())]
        rows = sorted([*rows, row], key=lambda r: [r[k] for k in KEY])
        PATH.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(chapter, what, p.memory, p.cycles, row["compile_seconds"], flush=True)


if __name__ == "__main__":
    main()
