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
import re
import threading
import time
from importlib import metadata

import jax
import jaxlib
from jax.experimental import topologies

from ssdlib._checks import described
from ssdlib.compiler.chips import CHIPS, GPU, TPU, Chip

__all__ = [
    "TARGETS",
    "CompilerMissing",
    "attached",
    "chip_name",
    "compile_with",
    "is_static",
    "tpu_slice",
    "versions",
]


class CompilerMissing(ImportError):
    """No compiler for a target is here, or one that is too old; the text says which."""


TARGETS = "cpu", *CHIPS
# libtpu 0.0.21.1 (with jax 0.7.2) ends the process with SIGSEGV when it compiles for a
# chip that is not attached. 0.0.42.1 and 0.0.50 do not; between, nothing was tried.
OLDEST_LIBTPU = 0, 0, 42


def compile_with(target: str | jax.Device, fn, args: tuple, donate_argnums=()):
    """Lower and compile: (jax's compiled object, origin, seconds in the compiler).

    Arrays and `ShapeDtypeStruct`s in `args` are traced; any argument without them, such
    as a config, is static. `origin` is "attached" if the chip is a device of this
    process, else "absent": then there is a program but nothing to run it on. A device
    in place of a target is attached, whatever its kind.

    Raises ValueError for an unknown target and CompilerMissing, which names the extra
    to install, if its compiler is not here.
    """
    if not callable(fn):
        raise ValueError(f"fn: {described(fn)}; it must be a function")
    here = isinstance(target, jax.Device)
    if not here:
        check_target(target)
    donated = jax.tree.leaves(donate_argnums)  # a number, or several
    if not all(isinstance(i, int) and 0 <= i < len(args) for i in donated):
        raise ValueError(
            f"donate_argnums: {donate_argnums!r}; it must be of the {len(args)} "
            "arguments, counted from 0"
        )
    device, origin = (target, "attached") if here else _device(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    static, structs = [], []
    for i, arg in enumerate(args):
        if is_static(arg):
            static.append(i)
            structs.append(arg)
        else:
            structs.append(jax.tree.map(lambda v: _struct(v, sharding), arg))
    fn = jax.jit(fn, static_argnums=static, donate_argnums=donate_argnums)
    lowered = fn.lower(*structs)
    # Autotuning times candidates on the chip. Without one, take the default choices.
    absent_gpu = origin == "absent" and isinstance(CHIPS[target].compiler, GPU)
    options = {"xla_gpu_autotune_level": 0} if absent_gpu else None
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    return compiled, origin, time.perf_counter() - start


def is_static(arg) -> bool:
    """Whether `compile_with` takes this argument as a part of the program."""
    leaves = jax.tree.leaves(arg)
    return bool(leaves) and not all(hasattr(v, "shape") for v in leaves)


def tpu_slice(topology: str, accelerator: str = "v6e-1", **options) -> list:
    """The devices of a described, absent slice: "v6e:2x4", "v6e:16x16", ...

    Programs compile for a mesh of them; nothing runs there. Raises CompilerMissing
    without libtpu, and with one that would end the process.
    """
    if not _installed("libtpu"):
        raise CompilerMissing(
            'a TPU slice needs libtpu: pip install ".[tpu]" in a checkout of ssdlib'
        )
    version = versions("libtpu").get("libtpu", "")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_LIBTPU:
        raise CompilerMissing(
            f"libtpu {version or 'of unknown version'} may end the process when it "
            "compiles for a TPU that is not attached; it must be at least "
            + ".".join(map(str, OLDEST_LIBTPU))
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


def check_target(target) -> None:
    """Raise ValueError unless target is one of `TARGETS`."""
    if not isinstance(target, str) or target not in TARGETS:
        raise ValueError(f"target: {target!r}; it must be one of {', '.join(TARGETS)}")


def chip_name(device: jax.Device) -> str:
    """The target that this device is, else its kind in small letters."""
    for name, chip in CHIPS.items():
        if device.device_kind in chip.kinds:
            return name
    return re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")


def attached(target: str | None = None) -> jax.Device:
    """The device to run on. A chip that is only compiled for cannot be measured.

    Raises ValueError if no such chip is attached, naming the command that compiles.
    """
    if target is None:
        return jax.devices()[0]
    check_target(target)
    if device := _attached(target):
        return device
    raise ValueError(
        f"target: {target} is not attached, and what its compiler says is no "
        f"measurement; python -m ssdlib inspect --target {target} shows that"
    )


def versions(*packages: str) -> dict[str, str]:
    """Versions of jax and jaxlib, and of those packages that are installed."""
    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


# --- descriptions of absent chips -----------------------------------------------------


def _attached(target: str) -> jax.Device | None:
    devices = jax.devices() if target != "cpu" else jax.local_devices(backend="cpu")
    return next((d for d in devices if chip_name(d) == target), None)


def _device(target: str):
    """(device, origin): the attached device of this kind, else a description."""
    if device := _attached(target):
        return device, "attached"
    chip = CHIPS[target]
    tpu = isinstance(chip.compiler, TPU)
    try:
        return (_absent_tpu if tpu else _absent_gpu)(chip), "absent"
    except CompilerMissing as error:
        raise CompilerMissing(
            f"target: {target!r} needs a compiler that is not here ({error}); on Linux "
            f'x86-64, pip install ".[{"tpu" if tpu else "cuda"}]" in a checkout of '
            "ssdlib brings it, without hardware"
        ) from None


def _absent_tpu(chip: Chip):
    """The first core of a described host."""
    topology, accelerator = chip.compiler.topology, chip.compiler.accelerator
    bounds = tuple(int(n) for n in topology.split(":")[1].split("x"))
    return tpu_slice(topology, accelerator, chips_per_host_bounds=(*bounds, 1)[:3])[0]


def _absent_gpu(chip: Chip):
    """A described chip."""
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    found = [name for name in plugins if _installed(name)]
    if not found:
        raise CompilerMissing("jax has no CUDA plugin")
    describe = dict(topology="1x1x1", target_config=gpu_description(chip))
    try:
        try:
            topology = topologies.get_topology_desc("", "cuda", **describe)
        except NotImplementedError:  # jax left the plugin out: no driver here
            with _environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
                importlib.import_module(found[0]).initialize()
            topology = topologies.get_topology_desc("", "cuda", **describe)
    except jax.errors.JaxRuntimeError as error:  # the plugin of jax 0.7.2
        raise CompilerMissing(f"the plugin refuses {chip.name}: {error}") from None
    return topology.devices[0]


def gpu_description(chip: Chip) -> str:
    """A chip's GpuTargetConfigProto as text."""
    gpu = chip.compiler
    major, minor = gpu.capability
    return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {gpu.cores} fpus_per_core: {gpu.fp32_units}
      threads_per_core_limit: {gpu.threads}
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_core: {gpu.shared_kib * 1024}
      shared_memory_per_block_optin: {(gpu.shared_kib - 1) * 1024}
      shared_memory_per_block: 49152
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      l2_cache_size: {gpu.l2_mib << 20} clock_rate_ghz: {gpu.clock_ghz}
      memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {int(chip.memory)}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      runtime_version: "12.9.0" driver_version: "12.9.0" dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{chip.name}"
    """


def _struct(v, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


_settings = threading.RLock()


@contextlib.contextmanager
def _environment(**settings: str):
    """Set environment variables for a moment; those that are set already stay.

    One thread at a time: another would find them set, and lose them on the way.
    """
    with _settings:
        new = {k: v for k, v in settings.items() if k not in os.environ}
        os.environ.update(new)
        try:
            yield
        finally:
            for k in new:
                os.environ.pop(k, None)
