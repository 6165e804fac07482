"""Compile for a chip, attached or absent: XLA's compilers need no hardware.

A target is a chip with its compiler. libtpu compiles for every TPU generation it knows
and XLA's GPU plugin for any NVIDIA chip that is described to it, each on a Linux x86-64
machine that has neither. What comes out is the scheduled program that the chip would
run. Nothing here initializes a device: a topology is only a description.
Source: jax.experimental.topologies; GpuTargetConfigProto in openxla/xla,
xla/stream_executor/device_description.proto.
"""

import contextlib
import importlib
import importlib.util
import os
import time
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from ssdlib._checks import described
from ssdlib.roofline import HARDWARE

__all__ = ["TARGETS", "CompilerMissing", "compile_with", "tpu_slice"]


class CompilerMissing(ImportError):
    """The compiler for a target is not installed here; the text names the extra."""


@dataclass(frozen=True)
class TPU:
    """A TPU generation: libtpu's names for one host of it."""

    kinds: tuple[str, ...]  # what jax calls an attached device
    topology: str
    accelerator: str

    extra = "tpu"

    def device(self):
        """The first core of a described, absent host."""
        chips = tuple(int(n) for n in self.topology.split(":")[1].split("x"))
        return tpu_slice(
            self.topology, self.accelerator, chips_per_host_bounds=(*chips, 1)[:3]
        )[0]


@dataclass(frozen=True)
class GPU:
    """An NVIDIA chip, as XLA's GPU compiler wants it described."""

    kinds: tuple[str, ...]
    capability: tuple[int, int]
    cores: int
    fp32_units: int  # per core
    threads: int  # per core
    shared_kib: int  # shared memory per core; a block may use 1 KiB less
    l2_mib: int
    clock_ghz: float

    extra = "cuda"

    def device(self):
        """A described, absent chip."""
        versions = ("xla_cuda13", "xla_cuda12")
        plugins = [f"jax_plugins.{version}" for version in versions]
        found = [name for name in plugins if _installed(name)]
        if not found:
            raise CompilerMissing
        describe = dict(topology="1x1x1", target_config=self.config())
        try:
            topology = topologies.get_topology_desc("", "cuda", **describe)
        except NotImplementedError:  # jax left the plugin out: no driver here
            with _environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
                importlib.import_module(found[0]).initialize()
            topology = topologies.get_topology_desc("", "cuda", **describe)
        return topology.devices[0]

    def config(self) -> str:
        """GpuTargetConfigProto as text; bandwidth and memory from `HARDWARE`."""
        chip = next(c for c in HARDWARE.values() if c.name == self.kinds[0])
        major, minor = self.capability
        return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {self.cores} fpus_per_core: {self.fp32_units}
          threads_per_core_limit: {self.threads}
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_core: {self.shared_kib * 1024}
          shared_memory_per_block_optin: {(self.shared_kib - 1) * 1024}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          l2_cache_size: {self.l2_mib << 20} clock_rate_ghz: {self.clock_ghz}
          memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {int(chip.memory)}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          runtime_version: "12.9.0" driver_version: "12.9.0" dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{self.kinds[0]}"
        """


@dataclass(frozen=True)
class CPU:
    """The processor that Python runs on."""

    kinds = ("cpu",)
    extra = None

    def device(self):
        """The CPU device; always attached."""
        return jax.local_devices(backend="cpu")[0]


TARGETS = {
    "cpu": CPU(),
    "tpu-v5e": TPU(("TPU v5 lite", "TPU v5e"), "v5e:1x1", "v5litepod-1"),
    "tpu-v5p": TPU(("TPU v5", "TPU v5p"), "v5p:2x2x1", "v5p-8"),
    "tpu-v6e": TPU(("TPU v6 lite", "TPU v6e"), "v6e:1x1", "v6e-1"),
    "tpu-7x": TPU(("TPU7x", "TPU v7x"), "tpu7x:1x1x1", "tpu7x-2"),
    "t4": GPU(("Tesla T4",), (7, 5), 40, 64, 1024, 65, 4, 1.59),
    "a100": GPU(("NVIDIA A100-SXM4-80GB",), (8, 0), 108, 64, 2048, 164, 40, 1.41),
    "l4": GPU(("NVIDIA L4",), (8, 9), 58, 128, 1536, 100, 48, 2.04),
    "l40s": GPU(("NVIDIA L40S",), (8, 9), 142, 128, 1536, 100, 96, 2.52),
    "h100": GPU(("NVIDIA H100 80GB HBM3",), (9, 0), 132, 128, 2048, 228, 50, 1.98),
}


def compile_with(target: str, fn, args: tuple, donate_argnums=()):
    """Lower and compile: (jax's compiled object, origin, seconds in the compiler).

    Arrays and `ShapeDtypeStruct`s in `args` are traced; any argument without them, such
    as a config, is static. `origin` is "attached" if the chip is a device of this
    process, else "absent": then there is a program but nothing to run it on.

    Raises ValueError for an unknown target and CompilerMissing, which names the extra
    to install, if its compiler is not here.
    """
    if not callable(fn):
        raise ValueError(f"fn: {described(fn)}; it must be a function")
    if not isinstance(target, str) or target not in TARGETS:
        raise ValueError(f"target: {target!r}; it must be one of {', '.join(TARGETS)}")
    donated = jax.tree.leaves(donate_argnums)  # a number, or several
    if not all(isinstance(i, int) and 0 <= i < len(args) for i in donated):
        raise ValueError(
            f"donate_argnums: {donate_argnums!r}; it must be of the {len(args)} "
            "arguments, counted from 0"
        )
    device, origin = _device(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    static, structs = [], []
    for i, arg in enumerate(args):
        leaves = jax.tree.leaves(arg)
        if leaves and not all(hasattr(v, "shape") for v in leaves):
            static.append(i)
            structs.append(arg)
        else:
            structs.append(jax.tree.map(lambda v: _struct(v, sharding), arg))
    fn = jax.jit(fn, static_argnums=static, donate_argnums=donate_argnums)
    lowered = fn.lower(*structs)
    # Autotuning times candidates on the chip. Without one, take the default choices.
    absent_gpu = origin == "absent" and isinstance(TARGETS[target], GPU)
    options = {"xla_gpu_autotune_level": 0} if absent_gpu else None
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    return compiled, origin, time.perf_counter() - start


def tpu_slice(topology: str, accelerator: str = "v6e-1", **options) -> list:
    """The devices of a described, absent slice: "v6e:2x4", "v6e:16x16", ...

    Programs compile for a mesh of them; nothing runs there. Raises CompilerMissing
    without libtpu.
    """
    if not _installed("libtpu"):
        raise CompilerMissing(
            'a TPU slice needs libtpu: pip install ".[tpu]" in a checkout of ssdlib'
        )
    settings = dict(  # no query to the cloud's metadata server, no lock of a chip
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=accelerator,
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_LOG_DIR="disabled",
    )
    with _environment(**settings):
        return topologies.get_topology_desc(topology, "tpu", **options).devices


def _device(target: str):
    """(device, origin): the attached device of this kind if there is one."""
    spec = TARGETS[target]
    for device in jax.devices() if target != "cpu" else [spec.device()]:
        if device.device_kind in spec.kinds:
            return device, "attached"
    try:
        return spec.device(), "absent"
    except CompilerMissing:
        raise CompilerMissing(
            f"target: {target!r} needs a compiler that is not installed; on Linux "
            f'x86-64, pip install ".[{spec.extra}]" in a checkout of ssdlib brings it, '
            "without hardware"
        ) from None


def _struct(v, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


@contextlib.contextmanager
def _environment(**settings: str):
    """Set environment variables for a moment; those that are set already stay."""
    new = {k: v for k, v in settings.items() if k not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for k in new:
            os.environ.pop(k, None)
