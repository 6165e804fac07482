"""Where the files of a checkpoint are: on disk, or on the Hugging Face hub.

A hub id is downloaded once, by the `huggingface_hub` client: its cache, its offline
mode (HF_HUB_OFFLINE=1) and its mirrors (HF_ENDPOINT) work here as everywhere.
"""

import importlib.util
import json
import os
from pathlib import Path

from ssdlib._checks import check_is

__all__ = ["fetch", "read_json", "resolve", "weight_files"]

TINY = Path(__file__).parent.parent / "tiny"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"


def resolve(source: str | Path, revision: str | None = None) -> tuple[Path, list[Path]]:
    """(folder, weight files) of "tiny", a folder, a weight file or a hub id.

    Safetensors come first: one file, or the shards that an index names. Without them,
    `pytorch_model.bin` is taken; torch is looked for before it is downloaded. Raises
    OSError for what cannot be found, ImportError without torch, ValueError for a
    broken index.
    """
    check_is("source", source, str, os.PathLike)
    check_is("revision", revision, str, type(None))
    if Path(source).suffix in (".safetensors", ".bin") and Path(source).is_file():
        return Path(source).parent, [Path(source)]
    folder = fetch(source, ["config.json", INDEX, "model*.safetensors"], revision)
    if (folder / INDEX).exists():
        files = [folder / name for name in _shards(folder / INDEX)]
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif (folder / BIN).exists() or not Path(source).exists():
        check_torch(folder.name if Path(source).exists() else str(source))
        files = [fetch(source, [BIN], revision) / BIN]
    else:
        raise FileNotFoundError(f"{folder.name}: no model.safetensors")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder.name}: no {file.name}")
    return folder, files


def weight_files(folder: Path) -> list[Path]:
    """The weights in safetensors of a folder, and the index that comes first."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    return [
        p for p in (folder / INDEX, folder / "model.safetensors", *shards) if p.exists()
    ]


def fetch(source: str | Path, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a source, with the files of these patterns if the hub has them.

    A file stands for its folder. Raises FileNotFoundError for a source or repository
    that does not exist, OSError for a download that fails.
    """
    if source == "tiny":
        return TINY
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else Path(source).parent
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"source: {str(source)!r} is no folder, no file and no hub id (owner/name)"
        )
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            str(source), revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # the client raises errors of several libraries
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, errors.HfHubHTTPError):  # status, then what it means
            lines = [" ".join(lines[:2])]
        absent = (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.EntryNotFoundError,
        )
        kind = FileNotFoundError if isinstance(error, absent) else OSError
        reason = lines[0] if lines else type(error).__name__
        raise kind(f"source: cannot download {str(source)!r}: {reason}") from error
    return Path(folder)


def check_torch(name: str) -> None:
    """Raise ImportError, with what to do instead, unless torch can be imported."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            f"{name}: no model.safetensors, and reading {BIN} needs torch. Either "
            "pip install torch, or load the model from a repository in safetensors: "
            "for state-spaces/mamba2-130m, AntonV/mamba2-130m-hf"
        )


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError names a key that comes twice."""
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: holds no JSON object")
    return value


def unique(pairs: list[tuple]) -> dict:
    """`dict(pairs)` for a JSON object; JSON itself lets the last of two keys win."""
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} comes twice")
    return out


def _shards(path: Path) -> list[str]:
    """The files that an index names: each must lie beside it."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{INDEX}: no weight_map")
    names = sorted({str(name) for name in names.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX}: {name!r} is not a file name in this folder")
    return names
