"""What the chapters' full sizes take on one chip that is not here: memory and time.

    python tools/fits.py [--target tpu-v5e] [--only 2.7b]
    python tools/rehearse.py --tpu --fits

The first compiles the largest programs that chapters run on an accelerator, and writes
book/results/fits.json, one row a program: bytes of arguments, results and temporary
arrays, cycles by the compiler's estimate, processor seconds in the compiler, and how
often the chapter runs it. Nothing is run here. The second one compiles *all* programs
that a rehearsed chapter made for the chip, and adds one row a chapter: their number,
their seconds in the compiler, and the largest of them. Needs: pip install ".[tpu]".
"""

import argparse
import dataclasses
import datetime
import json
import time
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import rows

import ssdlib
from ssdlib.beyond import transformer
from ssdlib.companion.notebook import enable_x64
from ssdlib.compiler import hlo, targets
from ssdlib.compiler.chips import CHIPS
from ssdlib.measure import bench, estimate, roofline
from ssdlib.params import PRESETS

PATH = hlo.RECORDS / "fits.json"
KEY = "chapter", "what", "target"
TARGET = "tpu-v5e"  # what Colab has
ALL = "all programs"
CLOCK = 1.5e9  # of a v5e: an assumption, as in chapter 10
heard: list[tuple] = []  # name and jaxpr of each program, by `listen`


def of_a_layer(T: int, H: int = 24, P: int = 64, N: int = 128) -> tuple:
    """x, dt, A, B, C of one layer, without values; by default of the 130m model."""
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


def _gradient(*inputs):
    return jax.grad(lambda *v: (ssdlib.ssd_chunked(*v)[0] ** 2).sum())(*inputs)


def programs() -> dict:
    """{(chapter, what): (fn, args, times)}: times is how often the chapter runs it."""
    made = {}
    half = dataclasses.replace(ssdlib.Mamba2Config.preset("130m"), n_layers=12)
    rival = transformer.AttentionConfig.like(half)
    weights = jax.eval_shape(partial(transformer.init_params, rival), jax.random.key(0))
    past = jax.eval_shape(partial(transformer.init_cache, rival, 1, 32_768))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    args = weights, rival, one, past
    made["06", "attention, 32,768 tokens"] = transformer.decode_step, args, 4 * 32
    made["01", "ssd_recurrent"] = ssdlib.ssd_recurrent, of_a_layer(8192), 8
    of_four = of_a_layer(4096, H=4)
    made["02", "ssd_recurrent"] = ssdlib.ssd_recurrent, of_four, 10
    made["02", "ssd_quadratic"] = ssdlib.ssd_quadratic, of_four, 10
    made["03", "ssd_quadratic"] = ssdlib.ssd_quadratic, of_a_layer(4096), 8
    args = of_a_layer(100_000, H=4, P=16, N=32)
    in_chunks = partial(ssdlib.ssd_chunked, chunk_size=64)
    made["11", "ssd_chunked, 100,000 tokens"] = in_chunks, args, 8
    made["11", "ssd_recurrent, 100,000 tokens"] = ssdlib.ssd_recurrent, args, 2
    _, tiny = ssdlib.load("tiny")
    weights, _ = bench.shapes(tiny, 1, "float32")
    for chapter, b, T in (("04", 1, 256), ("05", 1, 2048), ("07", 82, 256)):
        tokens = jax.ShapeDtypeStruct((b, T), jnp.int32)
        what = f"forward, {b} x {T:,} bytes"
        made[chapter, what] = ssdlib.forward, (weights, tiny, tokens), 4
    x, *rest = of_a_layer(8192, H=8, N=64)
    made["16", "gradient, 8,192 tokens"] = _gradient, (x, *rest), 4
    for size in PRESETS:
        for what, program in of_a_model(size, bench.LENGTHS[-1]).items():
            made["10", what] = program
    return made


def seconds(row: dict) -> np.ndarray:
    """The least and the most seconds of all runs of a program.

    By the model of chapter 9 and its factor, both found on a v6e. The most is no less
    than that factor times the compiler's cycles: a scan of short steps takes far more
    of them for its bytes than the programs that the model was fitted to.
    """
    fit, work = estimate.model(), roofline.Work(row["flops"], row["bytes"])
    least = work.seconds(CHIPS[row["target"]])
    middle = float(fit.seconds(least, row["cycles"]))
    most = fit.factor * max(middle, row["cycles"] / CLOCK)
    return row["times"] * np.array([max(least, middle / fit.factor), most])


def of_page(name: str) -> dict:
    """What a page takes on a v5e, from records; only `host` if nothing runs there.

    `largest` and `memory` of a program; `programs`, how many were compiled, None where
    only the recorded ones were; `compile`, processor seconds; `runs`, the
    least and the most seconds of the programs that are recorded one by one; `host`,
    processor seconds of the whole page with Colab's versions and no chip.
    """
    key = name.partition("_")[0], TARGET
    known = json.loads(PATH.read_text())["rows"]
    known = [row for row in known if (row["chapter"], row["target"]) == key]
    colab = json.loads((hlo.RECORDS / "colab.json").read_text())["rows"]
    (host,) = (r for r in colab if (r["chapter"], r["image"]) == (name, "tpu"))
    if not known:
        return {"host": host["processor"]}
    taken = {
        row.get("largest", row["what"]): sum(row["memory"].values()) for row in known
    }
    largest = max(taken, key=taken.get)
    return {
        "largest": largest,
        "memory": taken[largest],
        "programs": next((r["programs"] for r in known if r["what"] == ALL), None),
        "compile": sum(row["compile_seconds"] for row in known),
        "runs": sum((seconds(row) for row in known if "times" in row), np.zeros(2)),
        "host": host["processor"],
    }


def listen(chip: jax.Device) -> None:
    """From now on keep in `heard` what is lowered for this device."""
    from jax._src.interpreters import pxla  # private: the status page needs none of it

    lower = pxla.lower_sharding_computation

    def lower_and_keep(jaxpr, kind, name, *args, **how):
        made = lower(jaxpr, kind, name, *args, **how)
        if tuple(made._device_list) == (chip,):
            heard.append((name, jaxpr))
        return made

    pxla.lower_sharding_computation = lower_and_keep


@enable_x64(True)  # for those programs that have float64
def compile_heard(page: str) -> None:
    """Compile all that was heard for a v5e, and write the row of the chapter."""
    device, _ = targets._device(TARGET)
    there = jax.sharding.SingleDeviceSharding(device)
    programs, made, start = tuple(heard), [], time.process_time()
    for name, jaxpr in programs:
        fn = jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr), out_shardings=there)
        shapes = (jax.ShapeDtypeStruct(v.shape, v.dtype) for v in jaxpr.in_avals)
        stats = fn.lower(*shapes).compile().memory_analysis()
        kinds = ("argument", "output", "temp")
        made.append((name, {k: getattr(stats, f"{k}_size_in_bytes") for k in kinds}))
    seconds = round(time.process_time() - start, 1)
    largest, memory = max(made, key=lambda m: sum(m[1].values()))
    known = {"programs": len(programs), "largest": largest, "memory": memory}
    known |= {"compile_seconds": seconds, "date": datetime.date.today().isoformat()}
    known |= {"versions": targets.versions("libtpu")}
    values = page.partition("_")[0], ALL, TARGET
    rows.put(PATH, KEY, [dict(zip(KEY, values, strict=True)) | known])


def main() -> None:
    """Compile one program after another; each row is written when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--only", default="", help="programs with this in their name")
    options = parser.parse_args()
    target = options.target
    for (chapter, what), (fn, args, times) in programs().items():
        if options.only not in what:
            continue
        start = time.process_time()
        # Chapters ask for full products; chapter 10 measures what a user gets.
        with jax.default_matmul_precision("default" if chapter == "10" else "highest"):
            p = hlo.compile_for(fn, *args, target=target)
        row = dict(zip(KEY, (chapter, what, target), strict=True))
        row |= {"times": times, "memory": p.memory, "cycles": p.cycles}
        row |= {"flops": p.flops, "bytes": p.bytes, "kernels": p.launches}
        row |= {"compile_seconds": round(time.process_time() - start, 1)}
        row |= {"date": p.date, "versions": p.versions}
        rows.put(PATH, KEY, [row])
        print(chapter, what, p.memory, p.cycles, row["compile_seconds"], flush=True)


if __name__ == "__main__":
    main()
