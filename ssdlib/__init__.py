"""State space duality in standard JAX: three forms of one map, and Mamba-2 on them."""

from ssdlib.cache import Cache, fork, init_cache
from ssdlib.checkpoint.weights import load, save
from ssdlib.chunked import ssd_chunked
from ssdlib.compiler.hlo import compile_for
from ssdlib.generate import Generation, generate, stream
from ssdlib.model import decode_step, forward, prefill
from ssdlib.params import Mamba2Config, init_params, quantize
from ssdlib.quadratic import decay_mask, segsum, ssd_quadratic
from ssdlib.recurrence import ssd_recurrent, ssd_step
from ssdlib.serve.cards import load_cache, rewind, save_cache
from ssdlib.serve.speculate import speculate

__all__ = [
    "Cache",
    "Generation",
    "Mamba2Config",
    "compile_for",
    "decay_mask",
    "decode_step",
    "fork",
    "forward",
    "generate",
    "init_cache",
    "init_params",
    "load",
    "load_cache",
    "prefill",
    "quantize",
    "rewind",
    "save",
    "save_cache",
    "segsum",
    "speculate",
    "ssd_chunked",
    "ssd_quadratic",
    "ssd_recurrent",
    "ssd_step",
    "stream",
]
