"""Write recurrences.npz: outputs of other people's code for the same recurrences.

Needs packages that the tests do not: pip install torch transformers einops
fla-core==0.6.0 mamba3-jax==1.0.1 flax optax (each file of fla is loaded by itself,
since importing the package asks for Triton). Then run this file.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from mamba3_jax.modeling import apply_rope_pairwise, cumulative_angles, ssd_forward
from transformers.models.xlstm.modeling_xlstm import mlstm_recurrent_sequence_native

b, T, H, P, N = 2, 24, 3, 4, 6
FLA = Path(importlib.util.find_spec("fla").submodule_search_locations[0])


def fla(op, function):
    """One function of flash-linear-attention's plain torch references."""
    spec = importlib.util.spec_from_file_location(op, FLA / "ops" / op / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def inputs():
    rng = np.random.default_rng(0)
    normal, uniform = rng.standard_normal, rng.uniform
    arrays = {
        "q": normal((b, T, H, N)),
        "k": normal((b, T, H, N)),
        "v": normal((b, T, H, P)),
        "log_a": -uniform(0, 1, (b, T, H)),
        "log_a_vector": np.log(1 / (1 + np.exp(-normal((b, T, H, N))))) / 16,
        "input_gate": normal((b, T, H)),
        "forget_gate": normal((b, T, H)) + 2,
        "beta": uniform(0, 1, (b, T, H)),
        "dt": uniform(0.001, 0.1, (b, T, H)),
        "A": -uniform(1, 16, (b, T, H)),
        "lam": uniform(0, 1, (b, T, H)),
        "angle_projection": normal((b, T, H, 2)),
    }
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    return {name: np.float32(a) for name, a in arrays.items()}


def by_torch(w):
    """flash-linear-attention (its scale of q is 1/√N) and transformers' xLSTM."""
    t = {name: torch.from_numpy(a) for name, a in w.items()}
    q, k, v = t["q"], t["k"], t["v"]
    out = {
        "linear_attention": fla("linear_attn", "naive_recurrent_linear_attn")(q, k, v),
        "normalized": fla("linear_attn", "naive_recurrent_linear_attn")(
            q.abs(), k.abs(), v, normalize=True
        ),
        "simple_gla": fla("simple_gla", "naive_recurrent_simple_gla")(
            q, k, v, t["log_a"]
        ),
        "gla": fla("gla", "naive_recurrent_gla")(q, k, v, t["log_a_vector"]),
    }
    out = {name: y[0].numpy() for name, y in out.items()}

    heads = {name: a.transpose(1, 2).contiguous() for name, a in t.items()}
    q, k, v = heads["q"], heads["k"], heads["v"]
    retention = fla("retention", "naive_retention")(q, k, v)
    delta, _ = fla("delta_rule", "delta_rule_recurrence")(q, k, v, heads["beta"])
    gates = heads["input_gate"], heads["forget_gate"]
    mlstm = mlstm_recurrent_sequence_native(q, k, v, *gates, eps=0.0)
    last = {"retention_unrotated": retention, "delta_net": delta, "mlstm": mlstm}
    return out | {name: y.transpose(1, 2).numpy() for name, y in last.items()}


def by_mamba3_jax(w):
    """The mixer's steps 2 to 4 of mamba3-jax, one chunk of 8 after another, no skip."""
    w = {name: jnp.asarray(a) for name, a in w.items()}
    dt, lam = w["dt"], w["lam"]
    after = jnp.pad((dt * (1 - lam))[:, 1:], ((0, 0), (0, 1), (0, 0)))
    angle = cumulative_angles(w["angle_projection"], dt)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    y, h = ssd_forward(
        x=w["v"],
        q=apply_rope_pairwise(w["q"], cos, sin),
        k=apply_rope_pairwise(w["k"], cos, sin),
        adt=w["A"] * dt,
        scale=dt * lam + after,
        skip=dt * lam * jnp.sum(w["q"] * w["k"], axis=-1),
        D=jnp.zeros(H),
        chunk_size=8,
        return_final_states=True,
    )
    return {"mamba3": np.asarray(y), "mamba3_state": np.asarray(h)}


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    w = inputs()
    outputs = by_torch(w) | by_mamba3_jax(w)
    file = Path(__file__).parent / "recurrences.npz"
    np.savez_compressed(file, **w, **{f"y_{name}": y for name, y in outputs.items()})
    print({name: y.shape for name, y in outputs.items()}, file.stat().st_size, "bytes")
