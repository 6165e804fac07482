"""The chips: how fast each can be at most, and what its compiler must know of it.

One row a chip. A program is compiled for it by its description, without hardware, and
its roofline follows from its peaks.
"""

from dataclasses import dataclass, replace

__all__ = ["CHIPS", "GPU", "TPU", "Chip"]


@dataclass(frozen=True)
class TPU:
    """A TPU generation, in libtpu's names for one host of it."""

    topology: str
    accelerator: str


@dataclass(frozen=True)
class GPU:
    """An NVIDIA chip, as XLA's GPU compiler wants it described."""

    capability: tuple[int, int]
    cores: int
    fp32_units: int  # per core
    threads: int  # per core
    shared_kib: int  # shared memory per core; a block may use 1 KiB less
    l2_mib: int
    clock_ghz: float


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip: dense products in FLOP/s, main memory in bytes, bytes/s."""

    name: str
    flops: float  # of products in `fast`
    bandwidth: float
    memory: float
    source: str
    compiler: TPU | GPU | None = None  # None: a CPU, whose peaks are measured
    alias: str = ""  # another name that jax has for an attached one
    fast: str = "bfloat16"  # float16 on a T4; a CPU has one speed
    float32: float | None = None  # what other products reach, at default precision

    def at(self, dtype: str) -> "Chip":
        """The chip with the peak that products in this dtype can reach.

        Those of float16 are as fast as bfloat16 where a chip has both. Those of int8
        are twice as fast and take two rows for one.
        """
        fast = dtype in (self.fast, "float16", "int8")
        slower = not fast and self.float32 is not None
        return replace(self, flops=self.float32) if slower else self

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which products, not memory, set the bound."""
        return self.flops / self.bandwidth

    @property
    def peaks(self) -> dict:
        """What a record of measurements keeps of a chip."""
        names = "name", "flops", "bandwidth", "memory", "source"
        return {name: getattr(self, name) for name in names}

    @property
    def kinds(self) -> tuple[str, str]:
        """What jax calls an attached chip of this kind."""
        return self.name, self.alias


def _tpu(name, alias, flops, bandwidth, memory, *names) -> Chip:
    source = "Google Cloud TPU documentation; jax/_src/pallas/mosaic/tpu_info.py"
    return Chip(name, flops, bandwidth, memory, source, TPU(*names), alias)


def _nvidia(name, flops, float32, bandwidth, memory, *description, **more) -> Chip:
    source = "NVIDIA data sheet, without sparsity"
    gpu, more = GPU(*description), more | {"float32": float32}
    return Chip(name, flops, bandwidth, memory, source, gpu, **more)


# fmt: off
CHIPS = {  # the one table; every other number is derived from it
    # A TPU takes float32 products in one pass of bfloat16, NVIDIA in TF32 from 8.0 on.
    "tpu-v5e": _tpu("TPU v5e", "TPU v5 lite", 197e12, 819e9, 16e9,
                    "v5e:1x1", "v5litepod-1"),
    "tpu-v5p": _tpu("TPU v5p", "TPU v5", 459e12, 2765e9, 95e9,
                    "v5p:2x2x1", "v5p-8"),
    "tpu-v6e": _tpu("TPU v6e", "TPU v6 lite", 918e12, 1638e9, 32e9,
                    "v6e:1x1", "v6e-1"),
    "tpu-7x": _tpu("TPU7x", "TPU v7x", 2307e12, 7380e9, 192 * 2.0**30,
                   "tpu7x:1x1x1", "tpu7x-2"),
    "t4": _nvidia("Tesla T4", 65e12, 8.1e12, 320e9, 16e9,
                  (7, 5), 40, 64, 1024, 65, 4, 1.59, fast="float16"),
    "l4": _nvidia("NVIDIA L4", 121e12, 60e12, 300e9, 24e9,
                  (8, 9), 58, 128, 1536, 100, 48, 2.04),
    "l40s": _nvidia("NVIDIA L40S", 362e12, 183e12, 864e9, 48e9,
                    (8, 9), 142, 128, 1536, 100, 96, 2.52),
    "a100": _nvidia("NVIDIA A100-SXM4-80GB", 312e12, 156e12, 2039e9, 80e9,
                    (8, 0), 108, 64, 2048, 164, 40, 1.41),
    "h100": _nvidia("NVIDIA H100 80GB HBM3", 989e12, 494.5e12, 3350e9, 80e9,
                    (9, 0), 132, 128, 2048, 228, 50, 1.98),
    "h200": _nvidia("NVIDIA H200", 989e12, 494.5e12, 4800e9, 141e9,
                    (9, 0), 132, 128, 2048, 228, 50, 1.98),
}
# fmt: on
