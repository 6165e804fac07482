"""Text to ids and back, with real tokenizers of the kinds that models come with."""

import json
import shutil

import jax
import pytest

from ssdlib import Mamba2Config, init_params, save
from ssdlib.__main__ import main
from ssdlib.checkpoint.hub import TINY
from ssdlib.checkpoint.tokenizer import ByteTokenizer, added_text, end_ids
from ssdlib.checkpoint.tokenizer import load_tokenizer as load

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers  # noqa: E402

TEXTS = ["Hello world", " Hello", "Hello  world ", "naïve ☃ 😀👍🏽!", "a\n b", "x"]
LETTERS = sorted(set("".join(TEXTS)) - {" "})


def byte_level(merges=()):
    """As GPT-NeoX, whose tokenizer the published models use: a token is some bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [a + b for a, b in merges]
    vocab = {letter: i for i, letter in enumerate([*letters, *joined])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(scheme):
    """As T5: a unigram model whose words begin with a mark for their space."""
    words = ["▁Hello", "Hello", "▁world", "▁", *LETTERS]
    vocab = [("<unk>", 0.0)] + [(word, -float(len(LETTERS))) for word in words]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    options = dict(replacement="▁", prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    tokenizer.decoder = decoders.Metaspace(**options)
    return tokenizer


def byte_fallback():
    """As Llama and Mistral: marked words, and bytes for all that is not in the list."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Helowrd"]
    pairs = ["H e", "l l", "He ll", "Hell o", "▁ Hello", "▁ w", "o r", "▁w or"]
    merges = [tuple(pair.split()) for pair in pairs]
    words += [a + b for a, b in merges]
    vocab = {word: i for i, word in enumerate(words)}
    options = dict(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


KINDS = {
    "byte-level": byte_level(),
    "byte-level with merges": byte_level([("H", "e"), ("Ġ", "w"), ("ð", "Ł")]),
    "metaspace, always": metaspace("always"),
    "metaspace, first": metaspace("first"),
    "metaspace, never": metaspace("never"),
    "byte fallback": byte_fallback(),
}


def stored(tokenizer, folder):
    """A model of 512 tokens with this tokenizer beside it."""
    config = Mamba2Config.tiny(vocab_size=512, n_layers=1)
    save(folder, init_params(config, jax.random.key(0)), config)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load(folder)


@pytest.fixture(params=KINDS, scope="module")
def kind(request, tmp_path_factory):
    return stored(KINDS[request.param], tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_text_and_what_is_added_to_it_are_the_whole_text(kind, text, size):
    """Cut at every character, and streamed in blocks that split a character."""
    whole = kind.encode(text)
    for cut in range(1, len(text)):
        ids = kind.encode(text[:cut])
        if whole[: len(ids)] != ids:
            continue  # the rest would change how the beginning is cut
        rest = whole[len(ids) :]
        parts = [rest[i : i + size] for i in range(0, len(rest), size)]
        pieces = list(added_text(kind, ids, parts))
        assert kind.decode(ids) + "".join(pieces) == kind.decode(whole)
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_waits_and_comes_at_the_end():
    kind = ByteTokenizer()
    ids = kind.encode("a😀")
    pieces = list(added_text(kind, ids[:1], [ids[1:3], ids[3:4]]))
    assert pieces == ["", "", "\ufffd"]
    pieces = list(added_text(kind, ids[:1], [ids[1:3], ids[3:], ids[:1]]))
    assert pieces == ["", "😀", "a", ""]


def test_only_the_last_thousand_tokens_are_decoded_again():
    longest = []

    class Watched(ByteTokenizer):
        def decode(self, ids):
            longest.append(len(ids))
            return super().decode(ids)

    text = "☃" * 5000
    ids = Watched().encode(text)
    parts = [ids[i : i + 16] for i in range(30, len(ids), 16)]
    assert "☃" * 10 + "".join(added_text(Watched(), ids[:30], parts)) == text
    assert max(longest) <= 1024 + 3 * 16  # three blocks until a snowman is whole


# --- through the command line ---------------------------------------------------------


def run(capsys, *argv):
    status = main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", ["metaspace, always", "byte fallback"])
def test_a_word_keeps_the_space_before_it(tmp_path, capsys, monkeypatch, name):
    tokenizer = stored(KINDS[name], tmp_path)
    start, whole = tokenizer.encode("Hello"), tokenizer.encode("Hello world")
    assert whole[: len(start)] == start
    made = iter([[[token]] for token in whole[len(start) :]])
    monkeypatch.setattr("ssdlib.companion.commands.stream", lambda *a, **k: made)
    _, out, _ = run(capsys, "generate", "Hello", "--model", str(tmp_path))
    assert out == "Hello world\n"


def test_half_a_character_at_the_end_is_printed_as_one(capsys, monkeypatch):
    made = iter([[list("☃".encode())[:2]]])
    monkeypatch.setattr("ssdlib.companion.commands.stream", lambda *a, **k: made)
    assert run(capsys, "generate", "x")[1] == "x\ufffd\n"


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("Hello world, " * 30)
    out = []
    for folder, cut in (("plain", False), ("cut", True)):
        tokenizer = byte_level()
        if cut:
            tokenizer.enable_truncation(8)
            tokenizer.enable_padding(length=16, pad_id=7)
        encoded = stored(tokenizer, tmp_path / folder).encode("Hello world")
        assert len(encoded) == 11
        model = ("--model", str(tmp_path / folder))
        out += [run(capsys, "evaluate", "--text", str(text), *model)[1]]
    assert out[0] == out[1]
    assert "tokens scored   389" in out[0]


def test_a_text_that_is_left_out_in_part_is_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    read = stored(tokenizer, tmp_path)
    assert read.encode("ba ") == [1, 0]  # a space may have none
    with pytest.raises(ValueError, match="leaves out 1 of its 4 characters"):
        read.encode("abca")


# --- where a text ends ----------------------------------------------------------------


def end_tokens(folder, generation=None, config=None):
    for name, value in (
        ("generation_config.json", generation),
        ("config.json", config),
    ):
        path = folder / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(raw | {"eos_token_id": value}))


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        (None, None, [0]),  # of the bytes
        (None, 5, [5]),
        (None, [5, 7], [5, 7]),
        ([3, 4], 5, [3, 4]),
        ([3, 99999, -1], 5, [3]),
        (99999, 5, [5]),
        ([], 5, [5]),
    ],
)
def test_the_ends_of_a_text_are_those_of_the_first_file_that_names_any(
    tmp_path, generation, config, want
):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    assert end_ids(tmp_path, ByteTokenizer(), 256) == [0]
    end_tokens(tmp_path, generation, config)
    assert end_ids(tmp_path, ByteTokenizer(), 256) == want


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [1, None], {"a": 1}, "x" * 500])
def test_an_end_that_is_no_id_is_named(tmp_path, value):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    end_tokens(tmp_path, value)
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id is"
    ) as e:
        end_ids(tmp_path, ByteTokenizer(), 256)
    assert len(str(e.value)) < 200


def test_the_command_stops_where_the_model_ends(tmp_path, capsys):
    how = "--temperature", "0", "--max-new-tokens", "24"
    _, free, _ = run(capsys, "generate", "The with", *how)
    made = free[len("The with") :]
    ends = [ord(made[5]), ord(made[9])]
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    end_tokens(tmp_path, ends)
    _, out, err = run(capsys, "generate", "The with", *how, "--model", str(tmp_path))
    stop = min(made.index(chr(i)) for i in ends)
    assert out == f"The with{made[:stop]}\n"
    assert err.startswith(f"{stop} tokens; ")
