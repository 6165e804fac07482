"""Against an implementation that we did not write: transformers' Mamba2ForCausalLM.

Always against the values it gave when tests/golden/make_golden.py recorded them, and
live where torch and transformers are installed.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ssdlib import forward, load, save

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make_golden as golden

# Warnings of other libraries are not ours to mend.
theirs_to_warn = pytest.mark.filterwarnings("ignore")
each_case = pytest.mark.parametrize("name", golden.CASES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a case and what ssdlib makes of it, once for all tests."""
    made = {}

    def make(name):
        if name not in made:
            folder = golden.write_checkpoint(tmp_path_factory.mktemp(name), name)
            made[name] = folder, golden.ours(folder, name)
        return made[name]

    return make


def agree(mine, theirs):
    errors = golden.compare(mine, theirs)
    for key in golden.ARRAYS:  # logits, both caches, logits of 64 decoding steps
        assert errors[key] <= 1e-5, key
    assert errors["argmax"] == 1
    assert errors["greedy"] == golden.STEPS
    assert errors["perplexity"] <= 1e-4


@each_case
def test_logits_cache_greedy_tokens_and_perplexity_are_the_recorded_ones(
    name, checkpoint
):
    agree(checkpoint(name)[1], dict(np.load(golden.GOLDEN / f"{name}.npz")))


@theirs_to_warn
@each_case
def test_logits_cache_greedy_tokens_and_perplexity_equal_transformers(name, checkpoint):
    pytest.importorskip("transformers")
    folder, mine = checkpoint(name)
    agree(mine, golden.reference(folder, name))


@theirs_to_warn
@pytest.mark.parametrize("name", ["untied_head", "biases", "time_step_limit"])
def test_transformers_loads_what_save_writes(name, checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    params, config = load(checkpoint(name)[0])
    save(tmp_path, params, config)
    model, report = transformers.Mamba2ForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = golden.prompt(name)
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens)).logits.numpy()
    mine = np.asarray(forward(params, config, tokens))
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


@theirs_to_warn
def test_what_transformers_saves_loads(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = checkpoint("two_groups")
    model = transformers.Mamba2ForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1  # sharded, with an index
    saved, config = load(tmp_path)
    params, same = load(folder)
    assert config == same
    jax.tree.map(np.testing.assert_array_equal, saved, params)


def test_the_comparison_can_fail(checkpoint):
    """Another case's limit on dt, or one weight changed by a thousandth."""
    recorded = dict(np.load(golden.GOLDEN / "one_group.npz"))
    _, mine = checkpoint("time_step_limit")
    with pytest.raises(AssertionError):
        agree(mine, recorded)
    _, mine = checkpoint("one_group")
    with pytest.raises(AssertionError, match="steps"):
        agree(mine | {"steps": mine["steps"] * 1.0001}, recorded)


def test_the_greedy_texts_say_something():
    """Equal tokens prove little if they are one token, or if nothing is close."""
    for name in golden.CASES:
        recorded = np.load(golden.GOLDEN / f"{name}.npz")
        assert max(len(np.unique(row)) for row in recorded["greedy"]) >= 10, name
        assert recorded["steps"].shape[1] == golden.STEPS
        assert (golden.GOLDEN / f"{name}.npz").stat().st_size < 1e6
