"""Text to token ids and back: the repository's tokenizer, or plain bytes."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr  # of what a file may hold: one line, cut where it is long

from ssdlib.checkpoint.config_json import load_config
from ssdlib.checkpoint.hub import fetch, read_json

__all__ = ["ByteTokenizer", "added_text", "end_ids", "load_tokenizer"]

KEPT = 1024  # tokens of the past that may matter for the text of the next


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
    """A `tokenizer.json`, read by the `tokenizers` package.

    Whether to cut or to fill up what is encoded is stored there too, as training left
    it; neither is done here. Special tokens, such as a start, are not part of a text:
    `encode` adds those that the file asks for, `decode` leaves all of them out.
    """

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise ImportError(
                "tokenizer.json needs the tokenizers package: pip install tokenizers, "
                "or install ssdlib with the extra `text`"
            ) from error
        with _errors_named():
            self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ends = map(self._tokenizer.token_to_id, ("<|endoftext|>", "</s>"))
        self.eos_id = next((i for i in ends if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """The ids of all of text. Raises ValueError if a part of it has none."""
        with _errors_named():
            encoding = self._tokenizer.encode(text)
        covered = bytearray(len(text))
        for start, end in encoding.offsets:
            covered[start:end] = b"x" * (end - start)
        seen = zip(text, covered, strict=False)
        if lost := sum(not (read or letter.isspace()) for letter, read in seen):
            raise ValueError(
                f"text: the tokenizer leaves out {lost} of its {len(text)} characters"
            )
        return encoding.ids

    def decode(self, ids) -> str:
        """The text of these ids."""
        with _errors_named():
            return self._tokenizer.decode([int(i) for i in ids])


@contextlib.contextmanager
def _errors_named():
    """ValueError for all that goes wrong in `tokenizers`, a panic in Rust included."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception, plain or not
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"tokenizer.json: it does not work ({reason})") from error


def added_text(tokenizer, prompt: list[int], parts: Iterable[list]) -> Iterator[str]:
    """The text that parts of a continuation add to that of the prompt, one by one.

    Some decoders strip the first space of what they are given, or join what they get
    with what came before, so this is the difference of two texts that both begin with
    the prompt. A character that a part leaves unfinished waits for the next part; after
    the last it comes as U+FFFD.
    """
    past, new, shown, text = list(prompt), [], 0, ""
    for part in parts:
        past, new = past[-KEPT:], new + list(part)
        text = tokenizer.decode(past + new)[len(tokenizer.decode(past)) :]
        ready = text.rstrip("\ufffd")
        yield ready[shown:]
        shown = max(shown, len(ready))
        if ready == text:
            past, new, shown, text = past + new, [], 0, ""
    yield text[shown:]


def end_ids(source, tokenizer, vocab_size: int, revision: str | None = None) -> list:
    """The ids that end a text: of generation_config.json, config.json or tokenizer.

    The first that names any decides. An id outside the vocabulary cannot be made and
    counts as none. Raises ValueError for what is no id.
    """
    folder = fetch(source, ["config.json", "generation_config.json"], revision)
    for name in ("generation_config.json", "config.json"):
        raw = read_json(folder / name) if (folder / name).exists() else {}
        ids = raw.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in ids):
            raise ValueError(
                f"{name}: eos_token_id is {repr(raw['eos_token_id'])}; it must be an "
                "integer or a list of integers"
            )
        if ids := [i for i in ids if 0 <= i < vocab_size]:
            return ids
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


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
