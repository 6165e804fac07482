"""Record what compilers make of mamba2-jax 1.1.2: a cached step, a prefill.

    pip install mamba2-jax==1.1.2 ".[tpu]"
    python benchmarks/mamba2_jax_hlo.py [130m 370m ...]

Writes book/results/hlo/mamba2_jax_{step,prefill}_SIZE@TARGET.json.gz, which chapters 4
to 10 show. Weights are shapes only and nothing is run: float32, batch 1, the default
precision of products. With its optional dependency missing it says so and ends.
"""

import dataclasses
import sys
from importlib import metadata

import jax
import jax.numpy as jnp

from ssdlib.compiler.hlo import compile_for
from ssdlib.params import PRESETS

PREFILL = 1024


def programs(size: str, layers: int | None = None):
    """{"step": (fn, args), "prefill": (fn, args)} for a published size.

    Or for as many layers of that size.
    """
    import mamba2_jax
    from flax import nnx

    d_model, n_layers = PRESETS[size]
    config = mamba2_jax.Mamba2Config(
        vocab_size=50288,
        hidden_size=d_model,
        num_hidden_layers=layers or n_layers,
    )
    model = nnx.eval_shape(
        lambda: mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: mamba2_jax.create_empty_cache(config, 1))

    def step(state, token, cache):
        out = nnx.merge(graph, state)(token, cache=cache)
        return out["logits"], out["cache"]

    def prefill(state, tokens):
        out = nnx.merge(graph, state)(tokens)
        return out["logits"], out["cache"]

    token, tokens = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (1, PREFILL))
    return {
        "step": (step, (state, token, cache)),
        "prefill": (prefill, (state, tokens)),
    }


def main() -> None:
    """Compile and record every size given, or all five."""
    try:
        version = metadata.version("mamba2-jax")
    except metadata.PackageNotFoundError:
        print("mamba2-jax is not installed: nothing recorded")
        return
    for size in sys.argv[1:] or PRESETS:
        for what, (fn, args) in programs(size).items():
            targets = ["tpu-v6e", "cpu"] if size == "130m" else ["tpu-v6e"]
            for target in targets:
                program = compile_for(fn, *args, target=target)
                versions = program.versions | {"mamba2-jax": version}
                program = dataclasses.replace(program, versions=versions)
                program.save(f"mamba2_jax_{what}_{size}")
                print(
                    f"{size} {what} {target}: {program.flops / 1e9:.1f} GFLOP, "
                    f"{(program.cycles or 0) / 1e6:.2f} M cycles, "
                    f"compiled in {program.compile_seconds} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
