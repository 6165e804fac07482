"""Records of measurements: where a number comes from, written next to the number.

A record is JSON; book/results/runs/schema.json says what each field means, and a test
checks every record against it.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median

import jax

from ssdlib._checks import check_is
from ssdlib.compiler.hlo import RECORDS
from ssdlib.compiler.targets import chip_name, versions
from ssdlib.compiler.view import Table, count
from ssdlib.measure import roofline
from ssdlib.measure.roofline import Work
from ssdlib.params import Mamba2Config

__all__ = [
    "RUNS",
    "free_memory",
    "load_average",
    "model",
    "peak_memory",
    "provenance",
    "rounded",
    "row",
    "save",
    "speedups",
    "table",
    "writable",
]

RUNS = RECORDS / "runs"
PACKAGES = "ssdlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"
_ROOT = Path(__file__).parents[2]


def provenance(device: jax.Device) -> dict:
    """Date, commit, versions and device, without a path or the name of the host."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "origin": "measured",
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "device": {
            "name": chip_name(device),
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(jax.devices(device.platform)),
            "used": 1,
            "host": proc("/proc/cpuinfo", "model name") or platform.machine(),
            "cores": _cores(),
        },
    }


def load_average() -> float | None:
    """Programs that ran or waited in the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def free_memory(device: jax.Device) -> int | None:
    """Bytes that a program may still take; None where the system does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    here = device.platform == "cpu"
    return _kilobytes("/proc/meminfo", "MemAvailable") if here else None


def peak_memory(device: jax.Device) -> int | None:
    """The most bytes that this process held; None where the system does not say."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    here = device.platform == "cpu"
    return _kilobytes("/proc/self/status", "VmHWM") if here else None


def model(config: Mamba2Config, name: str, trained: bool) -> dict:
    """What was run: its name, sizes, and whether its weights mean something."""
    sizes = asdict(config)
    sizes.pop("time_step_limit")  # infinite: JSON has no word for it
    return {
        "name": name,
        "weights": "trained" if trained else "random",
        "parameters": sum(roofline.parameters(config).values()),
        "sizes": sizes,
    }


def row(key, batch: int, program, seconds: list[float], work: Work, chip) -> dict:
    """One row from its samples; MFU and HBU are None for a chip of unknown peaks."""
    (what, T), t = key, median(seconds)
    tokens = T if what == "prefill" else 1  # that a sample brings each row of the batch
    return {
        "what": what,
        "length": T,
        "shape": [batch, 1 if what == "decode" else T],
        "seconds": _spread(seconds),
        "samples": seconds,
        "compile_seconds": program.compile_seconds,
        "temp": program.temp,
        "cache": program.cache,
        "tokens_per_second": batch * tokens / t,
        "ms_per_token": 1e3 * t / tokens,
        "tflops": work.flops / t / 1e12,
        "mfu": None if chip is None else work.mfu(t, chip),
        "hbu": None if chip is None else work.hbu(t, chip),
    }


def speedups(seconds: dict[tuple[str, int], list[float]]) -> list[dict]:
    """Uncached over cached time of a token, round by round, where both are there."""
    return [
        {
            "length": T,
            "ratio": _spread([a / b for a, b in zip(slow, fast, strict=True)]),
        }
        for (what, T), slow in seconds.items()
        if what == "uncached" and (fast := seconds.get(("decode", T)))
    ]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def rounded(value):
    """The same with five digits of every number that is not whole."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def writable(folder: str | Path | None = None) -> Path:
    """The folder for records, made if need be: an OSError comes before the work.

    None means that of the book in a checkout, else the current one: the records that
    an installed package carries are not the user's to change.
    """
    if folder is None:
        folder = RUNS if RECORDS == _ROOT / "book/results" else Path.cwd()
    check_is("folder", folder, str, os.PathLike)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: {folder} cannot be written to")
    return folder


def save(record: dict, folder: str | Path | None = None) -> Path:
    """Write the record as <chip>-<model>-<dtype>-<time>.json and return its path."""
    check_is("record", record, dict)
    stamp = re.sub(r"[-:]|T(?=\d)", lambda m: "-" * (m[0] == "T"), record["date"])
    names = record["device"]["name"], record["model"]["name"], record["dtype"]
    names = (name.replace("/", "-") for name in names)
    path = writable(folder) / f"{'-'.join(names)}-{stamp.rstrip('Z')}.json"
    part = path.with_suffix(".part")  # an interrupt leaves no half of a record
    part.write_text(json.dumps(record, indent=1) + "\n")
    return part.replace(path)


def table(record: dict) -> Table:
    """The rows of a record, and below them what they depend on."""
    check_is("record", record, dict)
    header = ["what", "tokens", "ms/token", "lowest", "highest", "tokens/s"]
    header += ["TFLOPS", "MFU", "HBU", "compile s"]
    rows = []
    for row in record["rows"]:
        one = row["ms_per_token"] / row["seconds"]["median"]
        cells = [row["what"], row["length"], f"{row['ms_per_token']:.4g}"]
        cells += [f"{one * row['seconds'][k]:.4g}" for k in ("lowest", "highest")]
        cells += [f"{row['tokens_per_second']:.4g}", f"{row['tflops']:.3g}"]
        for use in (row["mfu"], row["hbu"]):
            cells += ["-" if use is None else f"{100 * use:.3g}%"]
        rows += [[*cells, f"{row['compile_seconds']:.1f}"]]
    return Table(header, rows, _caption(record))


def _caption(record: dict) -> str:
    device, peak, memory = record["device"], record["peak"], record["memory"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [
        f"{record['model']['name']}, {record['dtype']}, batch {record['batch']}, "
        f"median of {record['repeats']}, measured on {device['kind']} "
        f"({device['host']}, {device['cores']} cores) with {versions}."
    ]
    if peak:
        lines += [
            f"MFU and HBU are shares of {peak['flops'] / 1e12:.3g} TFLOPS and "
            f"{peak['bandwidth'] / 1e9:.4g} GB/s ({peak['source']})."
        ]
    lines += [", ".join(f"{k} {count(v, 'B')}" for k, v in memory.items()) + "."]
    for s in record["speedups"]:
        r = s["ratio"]
        lines += [
            f"Cached decode at {s['length']} tokens: {r['median']:.3g} times as fast "
            f"as uncached ({r['lowest']:.3g} to {r['highest']:.3g})."
        ]
    load = record["load"]["before"]
    if load is not None and load > 0.5:
        lines += [f"Not a quiet machine: its load was {load} before the start."]
    return "\n".join(lines)


def _commit() -> str | None:
    """Of the checkout this runs from (+ if changed), or that pip installed; or None."""
    if (_ROOT / ".git").exists():
        git = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12"]
        options = ["--exclude=*", "--dirty=+"]
        try:
            done = subprocess.run([*git, *options], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() or None
    try:
        url = metadata.distribution("ssdlib").read_text("direct_url.json") or "{}"
    except metadata.PackageNotFoundError:
        return None
    return json.loads(url).get("vcs_info", {}).get("commit_id")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kilobytes(file: str, key: str) -> int | None:
    value = proc(file, key)
    return None if value is None else 1024 * int(value.split()[0])


def proc(file: str, key: str) -> str | None:
    """The value of the first line `key : value`; None if there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
