"""What a program on a mesh sends: by formula, and counted in what was compiled.

    on `model`:  b T d_model numbers a layer, summed, and once for the embedding
    on `seq`:    ⌈log₂ n⌉ b H (P N + 1) numbers a layer, permuted, whatever T is

Source: `parallel`, whose crossings these are; the kinds are those of HLO.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

from ssdlib import hlo_text
from ssdlib.config import Mamba2Config
from ssdlib.parallel import decode_step, prefill, segment
from ssdlib.params import init_params
from ssdlib.sharding import AnyMesh, cache_shapes, local_config, shard

__all__ = ["compile_over", "counted", "formula"]

ALONE = re.compile(r"replica_groups=(\[\d+,1\]|\{\{\d+\})")  # groups of one device


def compile_over(config: Mamba2Config, mesh: Mesh, b: int, T: int, dtype=jnp.float32):
    """`prefill` of (b, T), or `decode_step` for T = 1, compiled for a mesh.

    Its devices may be absent, as those of `targets.tpu_slice`. Returns jax's compiled
    object: `.as_text()` for `counted`, `.memory_analysis()` for one device's bytes.
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    function, shape = (prefill, (b, T)) if T > 1 else (decode_step, (b,))
    program = jax.jit(
        lambda params, tokens, cache: function(params, config, mesh, tokens, cache),
        donate_argnums=2,
    )
    rows = NamedSharding(mesh, S("data"))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    cache = cache_shapes(config, mesh, b, dtype)
    return program.lower(shard(shapes, config, mesh), tokens, cache).compile()


def formula(
    config: Mamba2Config, mesh: AnyMesh, b: int, T: int, itemsize: int = 4
) -> dict[str, int]:
    """Bytes that one device puts into collectives, by kind, for `prefill` of (b, T).

    On `model`: an all-reduce of 4 b T d_model for the embedding and for each layer;
    with fewer groups than devices, one of 4 G b T a layer for the norm. On `seq`, for
    each layer: permutes of ⌈log₂ n⌉ pairs of b H (P N + 1) numbers (the last round
    needs no decay), of one state, and of d_conv - 1 rows of the convolution; an
    all-reduce of the final state and rows; once, of the last token. b, T and H are
    those of one device.

    T = 1 is `decode_step`. What is counted is the payload: a ring all-reduce of it
    sends 2 (n - 1)/n times as much. Where products need less than float32, a compiler
    may send the state that enters a segment in bfloat16. Not counted: logits, which are
    gathered if n does not divide the vocabulary.
    """
    local, seq = local_config(config, mesh), mesh.shape["seq"]
    model, L, d = mesh.shape["model"], config.n_layers, config.d_model
    split = seq > 1 and T > 1
    b, T = b // mesh.shape["data"], segment(config, T, seq) if split else T
    sent: Counter = Counter()
    if model > 1:
        sent["all-reduce"] += 4 * b * T * d * (L + 1)
    if model > config.n_groups:
        sent["all-reduce"] += 4 * config.n_groups * b * T * L
    if split:
        state = 4 * b * local.n_heads * config.head_dim * config.d_state
        conv = itemsize * b * (config.d_conv - 1) * local.d_xBC
        rounds = (seq - 1).bit_length()
        pairs = rounds * state + (rounds - 1) * 4 * b * local.n_heads
        sent["collective-permute"] += L * (pairs + state + conv)
        sent["all-reduce"] += L * (state + conv) + 4 * b * d
    return dict(sent)


def counted(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (how many, bytes that one device puts in), from a compiled program.

    Counts each instruction once: in these programs, none is inside a loop.
    """
    found: dict = {}
    for computation in hlo_text.parse(text).computations.values():
        lines = computation.instructions
        for i in lines.values():
            kind = i.opcode.removesuffix("-start")
            if kind in hlo_text.COLLECTIVES and not ALONE.search(i.attributes):
                sizes = (s.nbytes for name in i.operands for s in lines[name].shapes)
                n, total = found.get(kind, (0, 0))
                found[kind] = n + 1, total + int(sum(sizes))
    return found
