"""Text to token ids and back: the repository's tokenizer, or plain bytes."""

from pathlib import Path

from ssdlib.checkpoint.config_json import load_config
from ssdlib.checkpoint.hub import fetch

__all__ = ["ByteTokenizer", "load_tokenizer"]


class ByteTokenizer:
    """One token per UTF-8 byte: ids 0 to 255. Byte 0 ends a document."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        """The bytes of text."""
        return list(text.encode())

    def decode(self, ids) -> str:
        """The text of these bytes; a broken UTF-8 sequence becomes U+FFFD."""
        return bytes(int(i) for i in ids).decode(errors="replace")


class _HubTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise ImportError(
                "tokenizer.json needs the tokenizers package: pip install tokenizers, "
                "or install ssdlib with the extra `text`"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # its parser raises plain exceptions
            raise ValueError(f"{path.name}: not a tokenizer ({error})") from error
        ends = map(self._tokenizer.token_to_id, ("<|endoftext|>", "</s>"))
        self.eos_id = next((i for i in ends if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(
    source: str | Path, revision: str | None = None
) -> ByteTokenizer | _HubTokenizer:
    """The tokenizer beside a checkpoint; bytes if it has none and 256 tokens.

    The original state-spaces repositories have none: their models read with the
    tokenizer of EleutherAI/gpt-neox-20b. Raises FileNotFoundError if neither fits,
    ImportError if `tokenizers` is missing, ValueError for a broken file.
    """
    folder = fetch(source, ["config.json", "tokenizer.json"], revision)
    if (folder / "tokenizer.json").exists():
        return _HubTokenizer(folder / "tokenizer.json")
    if load_config(folder).vocab_size == 256:
        return ByteTokenizer()
    raise FileNotFoundError(
        f"{source}: no tokenizer.json (the original state-spaces models use that of "
        "EleutherAI/gpt-neox-20b)"
    )
