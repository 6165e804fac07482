"""Time the loop in Python, the loop on the device, and a call, on the first device.

    python tools/loops.py OUT.json [PRESET,... [dtype,...]]

Greedy tokens of one row with random weights. `host` reads each token back before the
next step, `device` is `generate`; both per token. `call` is a compiled program of one
addition, from the call until its result is there. Every sample is kept.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ssdlib
from ssdlib.measure import record

PROMPT, TOKENS, ROUNDS = 16, 64, 5


@partial(jax.jit, static_argnums=1, donate_argnums=3)
def step(params, config, token, cache):
    """The best next token, and the cache that has read this one."""
    logits, cache = ssdlib.decode_step(params, config, token, cache)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def host(params, config, prompt):
    """TOKENS tokens, each read back by Python before the next step."""
    logits, cache = ssdlib.prefill(params, config, prompt)
    tokens = [np.asarray(jnp.argmax(logits, axis=-1).astype(jnp.int32))]
    while len(tokens) < TOKENS:
        token, cache = step(params, config, tokens[-1], cache)
        tokens.append(np.asarray(token))
    return np.stack(tokens, axis=1)


def device(params, config, prompt):
    """The same tokens by one program."""
    return np.asarray(ssdlib.generate(params, config, prompt, TOKENS).tokens)


def samples(*calls) -> list[list[float]]:
    """Seconds of each call, in turns, after a round that compiles."""
    seconds = [[] for _ in calls]
    for i in range(ROUNDS + 1):
        for call, laps in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                laps.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure, and write the file."""
    out, sizes, dtypes, *_ = [*sys.argv[1:], "130m,780m,2.7b", "float32,bfloat16"][:3]
    one = jnp.ones(())
    (call,) = samples(partial(jax.jit(lambda v: v + 1), one))
    made = record.provenance(jax.devices()[0]) | {"call": call, "tokens": TOKENS}
    made |= {"load": record.load_average(), "rows": []}
    for size in sizes.split(","):
        for dtype in dtypes.split(","):
            preset = ssdlib.Mamba2Config.preset
            config = ssdlib.Mamba2Config.tiny() if size == "tiny" else preset(size)
            params = ssdlib.init_params(config, jax.random.key(0), jnp.dtype(dtype))
            args = params, config, np.ones((1, PROMPT), np.int32)
            equal = np.array_equal(host(*args), device(*args))
            found = dict(
                zip(
                    ("host", "device"),
                    samples(partial(host, *args), partial(device, *args)),
                    strict=True,
                )
            )
            row = {"preset": size, "dtype": dtype, "same_tokens": bool(equal)}
            ms = {k: [1e3 * s / TOKENS for s in v] for k, v in found.items()}
            made["rows"].append(row | {"ms_per_token": ms})
            Path(out).write_text(json.dumps(record.rounded(made), indent=1) + "\n")
            print(size, dtype, {k: f"{min(v):.3g}" for k, v in ms.items()}, flush=True)


if __name__ == "__main__":
    main()
