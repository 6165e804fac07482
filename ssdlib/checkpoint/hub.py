"""Where the files of a checkpoint are: on disk, or on the Hugging Face hub.

A hub id is downloaded once, by the `huggingface_hub` client: its cache, its offline
mode (HF_HUB_OFFLINE=1) and its mirrors (HF_ENDPOINT) work here as everywhere.
"""

import importlib.util
import json
import os
import re
from pathlib import Path

from ssdlib._checks import check_is

__all__ = ["fetch", "read_json", "resolve", "weight_files"]

TINY = Path(__file__).parent.parent / "tiny"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
SUFFIXES = ".safetensors", ".bin", ".pt", ".pth", ".ckpt"  # all but the first: torch's


def resolve(source: str | Path, revision: str | None = None) -> tuple[Path, list[Path]]:
    """(folder, weight files) of "tiny", a folder, a weight file or a hub id.

    Safetensors come first, then what torch writes: one file, the shards that an index
    names, or shards that are all there. torch is looked for before its files are
    downloaded. Raises OSError for what cannot be found, ImportError without torch,
    ValueError for a broken index.
    """
    check_is("source", source, str, os.PathLike)
    check_is("revision", revision, str, type(None))
    path = Path(source)
    if path.suffix in SUFFIXES and path.is_file():
        return path.parent, [path]
    folder = fetch(source, ["config.json", INDEX, "model*.safetensors"], revision)
    name = title(folder)
    if files := _weights(folder, "model.safetensors"):
        return folder, files
    if not path.exists():
        check_torch(name)
        fetch(source, [BIN, f"{BIN}.index.json", "pytorch_model-*.bin"], revision)
    if files := _weights(folder, BIN):
        check_torch(name)
        return folder, files
    others = sorted(p.name for p in folder.glob("*.*") if p.suffix in SUFFIXES)
    if others:
        what = f"load one of its files by its own path: {', '.join(others[:3])}"
    elif path.exists():
        what = "save the weights under one of these names"
    else:
        what = "if only a part of it was downloaded, load it with a network once"
    raise FileNotFoundError(f"{name}: no model.safetensors and no {BIN}; {what}")


def _weights(folder: Path, name: str) -> list[Path]:
    """The file of that name, or its shards; none if there is neither."""
    stem, suffix = name.split(".")
    shard = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}")
    if (folder / f"{name}.index.json").exists():
        files = [folder / shard for shard in _shards(folder / f"{name}.index.json")]
    elif (folder / name).exists():
        files = [folder / name]
    elif last := max(filter(shard.fullmatch, os.listdir(folder)), default=""):
        n = shard.fullmatch(last)[1]
        names = (f"{stem}-{i:05}-of-{n}.{suffix}" for i in range(1, int(n) + 1))
        files = [folder / shard for shard in names]
    else:
        return []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{title(folder)}: no {file.name}")
    return files


def title(folder: Path) -> str:
    """What to call a folder: the hub id whose copy it is, or its own name."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name or str(folder)


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
    path, shaped = Path(source), re.fullmatch(r"[^./~][^/]*/[^/]+", str(source))
    if path.is_dir() and str(source) and not any(path.iterdir()):
        hides = "; it hides the repository of that name on the hub" if shaped else ""
        raise FileNotFoundError(f"source: the folder {str(source)!r} is empty{hides}")
    if path.exists() and str(source):
        return path if path.is_dir() else path.parent
    if not shaped:
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
        if re.search(r"\b40[13] ", reason):
            reason += "; what is private or gated needs access and a token (HF_TOKEN)"
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
        raise ValueError(f"{path.name}: no weight_map")
    names = sorted({str(name) for name in names.values()})
    for name in names:
        suffix = ".bin" if path.name.startswith(BIN) else ".safetensors"
        if Path(name).name != name or not name.endswith(suffix):
            raise ValueError(f"{path.name}: {name!r} is not a file name in this folder")
    return names
