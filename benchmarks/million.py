"""Read a million tokens with the shipped model, in pieces, at constant memory.

    python benchmarks/million.py [tokens]

The cache of one piece is where the next begins. Writes book/results/million.json: the
seconds, and the most memory the process had held after the first eighth and at the end.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import ssdlib
from ssdlib.compiler import hlo, targets
from ssdlib.measure import record

PIECE = 8192  # tokens


def main() -> None:
    """Read, measure, write the record."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    params, config = ssdlib.load("tiny")
    rng, device = np.random.default_rng(0), targets.attached()
    facts = record.provenance(device) | {"load": record.load_average()}
    cache, read, peaks = ssdlib.init_cache(config, 1), 0, []
    start = time.perf_counter()
    while read < total:
        n = min(PIECE, total - read)
        tokens = rng.integers(0, config.vocab_size, (1, n), np.int32)
        logits, cache = ssdlib.prefill(params, config, tokens, cache)
        jax.block_until_ready(logits)
        read += n
        peaks.append(record.peak_memory(device))
    facts |= {
        "tokens": read,
        "piece": PIECE,
        "seconds": time.perf_counter() - start,
        "cache": cache.nbytes,
        "peak_early": peaks[len(peaks) // 8],
        "peak_late": peaks[-1],
        "finite": bool(jnp.isfinite(logits).all()),
    }
    path = hlo.RECORDS / "million.json"
    path.write_text(json.dumps(record.rounded(facts), indent=1) + "\n")
    print({k: facts[k] for k in ("tokens", "seconds", "peak_early", "peak_late")})


if __name__ == "__main__":
    main()
