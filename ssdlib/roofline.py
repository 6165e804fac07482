"""Rooflines: FLOPs, bytes and the time that they take at least."""

from dataclasses import dataclass

__all__ = ["HARDWARE", "Chip"]


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip: dense products in FLOP/s, memory in bytes and bytes/s."""

    name: str
    flops: float  # bfloat16 (float16 where the chip has no bfloat16)
    bandwidth: float
    memory: float
    source: str


_TPU = "Google Cloud TPU documentation"
_NVIDIA = "NVIDIA data sheet"
HARDWARE = {
    "tpu-v5e": Chip("TPU v5e", 197e12, 819e9, 16e9, _TPU),
    "tpu-v5p": Chip("TPU v5p", 459e12, 2765e9, 95e9, _TPU),
    "tpu-v6e": Chip("TPU v6e", 918e12, 1638e9, 32e9, _TPU),
    "tpu-7x": Chip("TPU7x", 2307e12, 7380e9, 192 * 2.0**30, _TPU),
    "t4": Chip("Tesla T4", 65e12, 320e9, 16e9, _NVIDIA),
    "l4": Chip("NVIDIA L4", 121e12, 300e9, 24e9, _NVIDIA),
    "l40s": Chip("NVIDIA L40S", 362e12, 864e9, 48e9, _NVIDIA),
    "a100": Chip("NVIDIA A100-SXM4-80GB", 312e12, 2039e9, 80e9, _NVIDIA),
    "h100": Chip("NVIDIA H100 80GB HBM3", 989e12, 3350e9, 80e9, _NVIDIA),
}
