"""What compilers make of a decode step: it may only get better.

Two layers of the 130m model, batch 1, float32, the cache donated. Each bound is today's
value: lower it when you improve on it, and raise none without a reason. (The counts of
one in-projection instead of three are higher: a kernel that reads a slice of its result
is counted with the whole, and all of its 8 rows on a TPU are. One FLOP counts the
token.)

All hold with jax 0.10.2 (libtpu 0.0.42.1) and with jax 0.12.0.1 (libtpu 0.0.50.1), and
those of a CPU with jax 0.7.2, whose compilers for absent chips `targets` refuses.
"""

from functools import cache

import jax
import pytest
from test_hlo import decode_args, target

import ssdlib
from ssdlib.compiler import hlo
from ssdlib.measure import roofline

BOUNDS = {  # bytes and fusions of one more layer; FLOPs and temporary bytes of the step
    "cpu": (18_091_532, 18, 94_433_295, 201_152),
    "tpu-v6e": (16_677_152, 12, 199_873_932, 0),
}
BOTH = [target(name) for name in BOUNDS]


@cache
def step(n_layers, name):
    args = decode_args(n_layers)
    try:
        with jax.default_matmul_precision("default"):
            return hlo.compile_for(
                ssdlib.decode_step, *args, target=name, donate_argnums=3
            )
    except hlo.CompilerMissing as reason:
        if jax.__version_info__ >= (0, 10):
            raise
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", BOTH)
def test_one_more_layer_takes_no_more_bytes_and_fusions(name):
    one, two = step(1, name), step(2, name)
    most_bytes, most_fusions, *_ = BOUNDS[name]
    assert two.bytes - one.bytes <= most_bytes
    assert two.fusions - one.fusions <= most_fusions


@pytest.mark.parametrize("name", BOTH)
def test_one_token_takes_no_more_flops_and_temporary_memory(name):
    *_, most_flops, most_temp = BOUNDS[name]
    assert step(2, name).flops <= most_flops
    assert step(2, name).memory["temp"] <= most_temp


@pytest.mark.parametrize("name", BOTH)
def test_the_whole_cache_is_updated_where_it_lies(name):
    *_, kept = decode_args()
    size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(kept))
    padding = 512 if name.startswith("tpu") else 0  # of the number of tokens read
    assert size <= step(2, name).memory["alias"] <= size + padding


def test_one_kernel_of_a_cpu_writes_a_state_and_none_copies_it():
    writers = [op for op in step(2, "cpu").ops if "f32[1,24,64,128]" in op.shape]
    assert [op.opcode for op in writers] == ["fusion"] * 2
    assert all(op.kind != "copy" for op in writers)
    assert "f32[1,1,24,64,128]" not in step(2, "cpu").hlo  # in no other shape


def test_a_cpu_does_little_beyond_what_is_needed():
    _, config, *_ = decode_args()
    need = roofline.decode(config, 1)
    assert step(2, "cpu").flops <= 1.01 * need.flops
    assert step(2, "cpu").bytes <= 1.02 * need.bytes


@pytest.mark.parametrize("name", [target("l40s")])
def test_a_layer_on_a_gpu_is_seven_kernels_all_of_xla(name):
    one, two = step(1, name), step(2, name)
    assert two.launches - one.launches <= 7
    assert not two.custom_calls
    assert not {op.opcode for op in two.ops} & {"infeed", "outfeed", "send", "recv"}
