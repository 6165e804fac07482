"""Models by name: the real `huggingface_hub` client against a server on 127.0.0.1."""

import json
import os
import subprocess
import sys

import hub_server
import huggingface_hub.constants as client
import jax
import numpy as np
import pytest

from ssdlib import Mamba2Config, init_params, load, save
from ssdlib.checkpoint.hub import resolve
from ssdlib.checkpoint.tokenizer import ByteTokenizer, load_tokenizer

CONFIG = Mamba2Config.tiny(vocab_size=256)
WEIGHTS = "model.safetensors"
# What the client and the server's threads leave open is not ours to close.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    """Two revisions of a checkpoint, as {revision: {file: bytes}}."""
    out = {}
    for seed, revision in enumerate(hub_server.COMMITS):
        folder = tmp_path_factory.mktemp(revision)
        save(folder, init_params(CONFIG, jax.random.key(seed)), CONFIG)
        out[revision] = {p.name: p.read_bytes() for p in folder.iterdir()}
        out[revision]["README.md"] = b"not asked for"
        out[revision]["consolidated.safetensors"] = b"not asked for"
    return out


@pytest.fixture
def hub(revisions, tmp_path, monkeypatch):
    config = {"config.json": revisions["main"]["config.json"]}
    repositories = {
        "org/model": revisions,
        "org/gated": revisions,
        "org/no-weights": {"main": config},
        "org/no-config": {"main": {WEIGHTS: revisions["main"][WEIGHTS]}},
        "org/original": {"main": config | {"pytorch_model.bin": b"large"}},
    }
    with hub_server.serve(repositories) as hub:
        hub.gated.add("org/gated")
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(client, "ENDPOINT", hub.url)
        monkeypatch.setattr(client, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(client, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(client, "HF_HUB_OFFLINE", False)
        yield hub


def seed_of(params):
    """Which of the two revisions these parameters are."""
    for seed in range(2):
        want = init_params(CONFIG, jax.random.key(seed))
        if np.array_equal(params["embedding"], want["embedding"]):
            return seed
    raise AssertionError("neither revision")


def downloads(hub):
    return [
        (path.rsplit("/", 1)[1], start)
        for method, path, start in hub.log
        if method == "GET" and "/resolve/" in path
    ]


def test_a_model_is_downloaded_once_and_only_what_is_needed(hub):
    params, config = load("org/model")
    assert config == CONFIG
    assert seed_of(params) == 0
    assert sorted(downloads(hub)) == [("config.json", None), (WEIGHTS, None)]
    load("org/model")
    assert len(downloads(hub)) == 2


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    assert seed_of(load("org/model", revision="v1")[0]) == 1
    assert seed_of(load("org/model", revision=hub_server.COMMITS["v1"])[0]) == 1
    assert seed_of(load("org/model", revision="main")[0]) == 0


@pytest.mark.parametrize("how", ["offline mode", "no server"])
def test_the_second_load_needs_no_network(hub, monkeypatch, how):
    load("org/model")
    if how == "offline mode":
        monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(client, "ENDPOINT", "http://127.0.0.1:9")  # nobody there
    asked = len(hub.log)
    assert seed_of(load("org/model")[0]) == 0
    assert isinstance(load_tokenizer("org/model"), ByteTokenizer)
    assert len(hub.log) == asked


def test_offline_without_a_copy_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="cannot download 'org/model': Cannot find an app"
    ):
        load("org/model")
    assert hub.log == []


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        (
            "org/absent",
            None,
            "cannot download 'org/absent': 401 .*Repository Not Found",
        ),
        (
            "org/gated",
            None,
            "cannot download 'org/gated': 401 .*Cannot access gated repo",
        ),
        ("org/model", "v9", "cannot download 'org/model': 404 .*Revision Not Found"),
        ("org/no-weights", None, r"no pytorch_model\.bin|needs torch"),
        ("org/no-config", None, r"no config\.json"),
        ("org/mo:del", None, "cannot download 'org/mo:del'"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, source, revision, message):
    with pytest.raises((OSError, ImportError), match=message) as caught:
        load(source, revision=revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["offline mode", "no server"])
def test_with_only_the_config_in_the_cache_the_missing_file_is_named(
    hub, monkeypatch, how
):
    load_tokenizer("org/model")  # which needs config.json alone
    assert downloads(hub) == [("config.json", None)]
    if how == "offline mode":
        monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(client, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"org/model.*model\.safetensors") as caught:
        load("org/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("code", ["GatedRepo", "RepoNotFound", None])
def test_what_a_token_has_no_access_to_is_named(hub, status, code):
    hub.refusal = status, code
    for read in (load, load_tokenizer):
        with pytest.raises(OSError, match=f"'org/gated': .*{status}.*token") as caught:
            read("org/gated")
        assert "\n" not in str(caught.value)


def test_shards_of_pytorch_come_with_their_index(hub, revisions):
    torch = pytest.importorskip("torch")
    import io

    from safetensors.numpy import load as parse

    tensors = parse(revisions["main"][WEIGHTS])
    files = {"config.json": revisions["main"]["config.json"]}
    index = {}
    for i, part in enumerate((sorted(tensors)[:5], sorted(tensors)[5:]), 1):
        file, data = f"pytorch_model-{i:05}-of-00002.bin", io.BytesIO()
        torch.save({name: torch.tensor(tensors[name]) for name in part}, data)
        files[file] = data.getvalue()
        index |= dict.fromkeys(part, file)
    files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": index}).encode()
    hub.repositories["org/bins"] = {"main": files}
    assert seed_of(load("org/bins")[0]) == 0


def test_a_connection_cut_halfway_is_resumed(hub, revisions, monkeypatch):
    """The client keeps whole blocks of 10 MB; the model of this test has 67 kB."""
    monkeypatch.setattr(client, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts = 2
    assert seed_of(load("org/model")[0]) == 0
    starts = [start for file, start in downloads(hub) if file == WEIGHTS]
    half = len(revisions["main"][WEIGHTS]) // 2 // 1000 * 1000
    assert starts[:2] == [None, f"bytes={half}-"]
    assert half < int(starts[2][6:-1]) < 2 * half


def test_a_file_of_the_wrong_size_is_refused_and_not_kept(hub, tmp_path):
    hub.extra = 1000
    with pytest.raises(OSError, match=r"cannot download .* should be of size"):
        load("org/model")
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    hub.extra = 0
    assert seed_of(load("org/model")[0]) == 0


def test_a_large_file_that_only_torch_reads_is_not_downloaded_without_it(
    hub, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"org/original: .* needs torch"):
        resolve("org/original")
    assert downloads(hub) == [("config.json", None)]


def test_the_environment_variables_of_the_client_work(hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, from a shell."""
    code = (
        "from ssdlib.checkpoint.hub import resolve\nprint(resolve('org/model')[1][0])"
    )

    def shell(**variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            env=environment | variables,
        )

    first = shell()
    assert str(tmp_path / "home") in first.stdout, first.stderr
    asked = len(hub.log)
    assert shell(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert len(hub.log) == asked


def test_a_sharded_model_comes_with_all_its_shards(hub, revisions):
    from safetensors.numpy import load as parse
    from safetensors.numpy import save as build

    tensors = parse(revisions["main"][WEIGHTS])
    names = sorted(tensors)
    files = {"config.json": revisions["main"]["config.json"]}
    index = {}
    for i, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        files[file] = build({name: tensors[name] for name in part})
        index |= dict.fromkeys(part, file)
    files[WEIGHTS + ".index.json"] = json.dumps({"weight_map": index}).encode()
    hub.repositories["org/sharded"] = {"main": files}
    assert seed_of(load("org/sharded")[0]) == 0
