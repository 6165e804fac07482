"""Where readers are: Colab's images, old and new widgets, chips that are not seen."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import fits
import imitate_colab
import ipywidgets as widgets
import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
import rehearse
import rows
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ssdlib.companion import notebook
from ssdlib.compiler import targets
from ssdlib.compiler.chips import CHIPS

ROOT = Path(__file__).parent.parent


def pins(image):
    """{package: version} of a committed list."""
    text = (ROOT / f"tools/colab/{image}.txt").read_text()
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.M))
    return {canonicalize_name(name): version for name, version in found.items()}


# --- Colab's images ------------------------------------------------------------------


@pytest.mark.parametrize("image", imitate_colab.IMAGES)
def test_the_bounds_of_the_chapters_extra_take_what_an_image_has(image):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["chapters"]
    wanted, have = map(Requirement, wanted), pins(image)
    wanted = {canonicalize_name(r.name): r for r in wanted}
    assert set(wanted) - set(have) == {"jaxtyping"}  # what the first cell adds
    for name in set(wanted) & set(have):
        assert have[name] in wanted[name].specifier, f"it would replace {name}"


def test_every_list_names_the_jax_and_the_compiler_of_its_image():
    shared = {"jax", "jaxlib", "numpy", "ipywidgets", "ipython"}
    plugin = {"jax-cuda12-plugin", "jax-cuda12-pjrt"}
    assert shared | plugin | {"libtpu"} == set(imitate_colab.KEPT)
    for image, own in {"cpu": set(), "gpu": plugin, "tpu": {"libtpu"}}.items():
        assert set(pins(image)) & set(imitate_colab.KEPT) == shared | own


def test_a_changed_package_is_named_and_an_absent_one_too():
    before = {"jax": "0.7.2", "libtpu": "0.0.21.1", "numpy": "2.1.3"}
    assert imitate_colab.changed(before, dict(before)) == ""
    after = before | {"jax": "0.12.0.1", "libtpu": None}
    said = imitate_colab.changed(before, after)
    assert said == "jax 0.7.2 -> 0.12.0.1, libtpu 0.0.21.1 -> None"


def test_the_lists_are_renewed_from_those_of_colab(tmp_path):
    shutil.copytree(ROOT / "tools/colab", tmp_path / "colab")
    date = {"committer": {"date": "2027-01-02T03:04:05Z"}}
    files = {"commit": json.dumps({"sha": "0123456789", "commit": date})}
    for end in imitate_colab.IMAGES.values():
        files[f"pip-freeze{end}.txt"] = "# ours\njax==9.1\nopt-einsum==7\nother==1\n"
    imitate_colab.renew(files.__getitem__, tmp_path / "colab")
    text = (tmp_path / "colab/tpu.txt").read_text()
    assert "Python 3.13" in text and "0123456, 2027-01-02, pip-freeze.tpu.txt" in text
    assert text.splitlines()[3:] == ["jax==9.1", "opt_einsum==7"]


def test_a_python_that_is_not_there_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert imitate_colab.find_python("3.99") == sys.executable
    assert "no Python 3.99 on PATH, in uv or pyenv" in capsys.readouterr().out


def test_only_a_python_of_the_version_is_taken(monkeypatch, tmp_path):
    bin_ = tmp_path / "versions/3.99.1/bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").write_text("#!/bin/sh\necho 3.98\n")  # a shim to another
    (bin_ / "python").chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert imitate_colab.find_python("3.99") == sys.executable
    (bin_ / "python").write_text("#!/bin/sh\necho 3.99\n")
    assert imitate_colab.find_python("3.99") == str(bin_ / "python")


# --- no kernel dies ------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.0.21.1", None])
def test_an_old_libtpu_is_refused_before_it_ends_the_process(monkeypatch, version):
    found = {} if version is None else {"libtpu": version}
    monkeypatch.setattr(targets, "versions", lambda *names: found)
    monkeypatch.setattr(targets, "_installed", lambda name: True)

    def crash(*args, **how):
        pytest.fail("the process would have ended here")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", crash)
    with pytest.raises(targets.CompilerMissing, match=r"must be at least 0\.0\.42"):
        targets.tpu_slice("v6e:2x4")
    with pytest.raises(targets.CompilerMissing, match=r"target: 'tpu-v5e' .*libtpu"):
        targets.compile_with("tpu-v5e", jnp.sin, (jnp.ones(8),))


def test_a_plugin_that_refuses_a_description_is_a_missing_compiler(monkeypatch):
    def refuse(*args, **how):
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Failed to parse")

    monkeypatch.setattr(targets, "_installed", lambda name: True)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", refuse)
    with pytest.raises(targets.CompilerMissing, match="the plugin refuses NVIDIA L40S"):
        targets.compile_with("l40s", jnp.sin, (jnp.ones(8),))


@pytest.mark.parametrize("old", [True, False])
def test_one_frame_is_seen_with_ipywidgets_7_and_8(monkeypatch, old):
    if old:
        monkeypatch.delattr(widgets, "Stack", raising=False)
    elif not hasattr(widgets, "Stack"):
        pytest.skip("this is ipywidgets 7")
    frames = [widgets.HTML(text) for text in "abc"]
    seen, slider = notebook.stack(frames, first=1), widgets.IntSlider(value=1, max=2)
    assert tuple(seen.children) == tuple(frames) and seen.selected_index == 1
    if old:  # the kernel does what the browser does from version 8 on
        control = widgets.SelectionSlider(options=list("abc"), index=1)
        notebook.link(control, seen)
        control.index = 2
        assert [f.layout.display for f in frames] == ["none", "none", None]
        seen.selected_index = 0
        assert [f.layout.display for f in frames] == [None, "none", "none"]
    assert slider.value == 1


def test_float64_is_switched_on_under_any_jax():
    with notebook.enable_x64(True):
        assert jnp.ones(1, jnp.float64).dtype == jnp.float64
    assert jnp.ones(1).dtype == jnp.float32


# --- which runtime this is, and rehearsals --------------------------------------------


def started(monkeypatch, capsys, **env):
    """What `start` returns and prints in this environment."""
    for name in ("JAX_PLATFORMS", "SSDLIB_FULL", "SSDLIB_ARITHMETIC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with jax.default_matmul_precision("highest"):
        full = notebook.start()
    return full, capsys.readouterr().out


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="not on a CPU")


@on_cpu
def test_a_chip_that_jax_does_not_see_is_said_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(notebook, "_CHIPS", {"TPU": ("/dev/nul*",)})
    full, said = started(monkeypatch, capsys)
    assert not full and "A TPU is attached, but this jax does not see it" in said
    _, said = started(monkeypatch, capsys, JAX_PLATFORMS="cpu")  # as it was asked for
    assert "attached" not in said


@on_cpu
def test_in_colab_without_a_chip_the_menu_is_named(monkeypatch, capsys):
    monkeypatch.setattr(notebook, "_CHIPS", {})
    assert "Runtime" not in started(monkeypatch, capsys)[1]
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    assert "Change runtime type" in started(monkeypatch, capsys)[1]


@on_cpu
def test_a_rehearsal_takes_the_long_path_with_small_sizes(monkeypatch, capsys):
    assert started(monkeypatch, capsys)[0] is False
    assert started(monkeypatch, capsys, SSDLIB_FULL="1")[0] is True
    assert notebook.pick(4096, 16) == 16


@on_cpu
def test_a_tolerance_is_wider_only_where_products_are(monkeypatch):
    monkeypatch.delenv("SSDLIB_ARITHMETIC", raising=False)
    assert notebook.tolerance(2e-6) == 2e-6
    monkeypatch.setenv("SSDLIB_ARITHMETIC", "tpu")
    assert 2e-6 < notebook.tolerance(2e-6) < 1e-5


ARITHMETIC = """
import json
import tpu_arithmetic
tpu_arithmetic.install()
import jax, jax.numpy as jnp, numpy as np
chip, cpu = jax.devices() + jax.devices("cpu")
assert chip != cpu and jnp.ones(1).devices() == {chip}
rng = np.random.default_rng(0)
a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
x = rng.uniform(-5, 5, 10_000).astype(np.float32)
off = {}
for device in (cpu, chip):
    with jax.default_device(device):
        for p in ("default", "high", "highest"):
            y, exact = jnp.matmul(a, b, precision=p), np.float64(a) @ np.float64(b)
            worst = np.abs(y - exact).max() / np.abs(exact).max()
            off[f"{p} {device.id}"] = float(worst)
        y = np.float64(jnp.exp(x)) / np.exp(np.float64(x)) - 1
        off[f"exp {device.id}"] = float(np.abs(y).max() * 2**23)
        off[f"one {device.id}"] = float(jnp.exp(jnp.zeros(1))[0])
        off[f"slope {device.id}"] = float(jax.grad(lambda v: (a @ v).sum())(b).sum())
print(json.dumps(off))
"""


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="it patches the pinned jax")
def test_a_rehearsed_tpu_is_inexact_where_a_tpu_is_and_the_cpu_beside_it_is_not():
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", ARITHMETIC]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    off = json.loads(done.stdout)
    assert max(off[f"{p} 0"] for p in ("default", "high", "highest")) < 2e-6
    assert 1e-3 < off["default 1"] < 1e-2 and 2e-6 < off["high 1"] < 1e-4
    assert off["highest 1"] < 2e-6  # six products are as good as float32
    assert off["exp 0"] < 1.5 < off["exp 1"] < 4 and off["one 1"] == 1
    assert off["slope 1"] == pytest.approx(off["slope 0"], rel=1e-2)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="it patches the pinned jax")
def test_a_rehearsal_runs_a_notebook_and_a_wrong_cell_fails(tmp_path, capsys):
    cells = """
from ssdlib.companion import notebook
FULL = notebook.start()
assert FULL and notebook.tolerance(1e-6) > 1e-6
import jax, jax.numpy as jnp
wide = jnp.float32(1 + 2**-12)
assert jnp.matmul(wide[None], wide[None], precision="default") == 1
"""
    path = tmp_path / "01_some.ipynb"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cells)])
    nbformat.write(nb, path)
    rehearse.rehearse(path, True, tmp_path)
    assert "01_some.ipynb" in capsys.readouterr().out
    with pytest.raises(Exception, match="AssertionError"):
        rehearse.rehearse(path, False, tmp_path)


def test_the_script_for_an_accelerator_is_valid_and_names_what_it_needs():
    script = ROOT / "tools/on_accelerator.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(["bash", script, "--needs"], capture_output=True, text=True)
    assert {"jaxtyping", "safetensors", "nbclient", "pytest"} <= set(
        done.stdout.split()
    )
    assert not {"jax", "jaxlib", "numpy"} & set(done.stdout.split())  # it replaces none


# --- chips ----------------------------------------------------------------------------


def test_a_peak_is_that_of_the_dtype():
    t4, h200, v5e = CHIPS["t4"], CHIPS["h200"], CHIPS["tpu-v5e"]
    assert t4.at("float16").flops == 65e12  # the only fast one: a T4 has no bfloat16
    assert t4.at("float32").flops == t4.at("bfloat16").flops == 8.1e12
    assert h200.at("bfloat16").flops == 989e12 == 2 * h200.at("float32").flops  # TF32
    assert h200.at("float16").flops == h200.at("bfloat16").flops
    assert v5e.at("float32") == v5e.at("bfloat16") == v5e
    assert (h200.bandwidth, h200.memory) == (4800e9, 141e9)
    for chip in CHIPS.values():
        assert chip.at("float32").flops <= chip.flops
        assert chip.at("float32").peaks.keys() == chip.peaks.keys()


PAGES = sorted(path.stem for path in (ROOT / "book").glob("[0-9i]*.ipynb"))
ON_HOST = {"15_scale_out"}  # it makes eight devices of a CPU everywhere


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="it patches the pinned jax")
def test_chapter_15_keeps_the_devices_of_a_cpu_in_every_rehearsal(tmp_path):
    cells = """
import os, jax
assert jax.devices() == jax.devices("cpu")
assert "SSDLIB_ARITHMETIC" not in os.environ and os.environ["SSDLIB_FULL"] == "1"
"""
    path = tmp_path / "15_some.ipynb"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cells)])
    nbformat.write(nb, path)
    rehearse.rehearse(path, True, tmp_path)


def test_every_page_ran_with_the_versions_of_colabs_cpu_and_tpu_images():
    rows = json.loads(imitate_colab.PATH.read_text())["rows"]
    ran = {(row["chapter"], row["image"]): row["versions"] for row in rows}
    assert set(ran) == {(page, image) for page in PAGES for image in ("cpu", "tpu")}
    for (_, image), versions in ran.items():
        assert versions == {k: v for k, v in pins(image).items() if k in versions}
        assert {"jax", "jaxlib", "numpy", "ipywidgets"} <= set(versions)


def test_a_record_takes_the_place_of_that_of_the_same_page_and_image(tmp_path):
    path = tmp_path / "colab.json"
    one = {"chapter": "01_x", "image": "cpu", "processor": 1.5}
    other = one | {"image": "tpu"}
    rows.put(path, imitate_colab.KEY, [other, one])
    rows.put(path, imitate_colab.KEY, [one | {"processor": 3.0}])
    assert json.loads(path.read_text())["rows"] == [one | {"processor": 3.0}, other]


def test_what_the_chapters_run_on_a_v5e_fits_its_memory():
    rows = json.loads(fits.PATH.read_text())["rows"]
    rows = [row for row in rows if row["target"] == "tpu-v5e"]
    have = {(row["chapter"], row["what"]) for row in rows}
    assert {("10", f"2.7b, {k}") for k in ("step", "prefill", "uncached")} <= have
    assert {key for key in fits.programs() if key[0] != "10"} <= have
    for row in rows:
        assert sum(row["memory"].values()) < CHIPS["tpu-v5e"].memory, row


def test_the_status_page_says_what_every_page_takes_on_a_v5e():
    for page in PAGES:
        taken = fits.of_page(page)
        assert ("largest" in taken) == (page not in ON_HOST), page
        if "largest" in taken:
            assert 0 < taken["memory"] < CHIPS["tpu-v5e"].memory
            low, high = taken["runs"]
            assert 0 <= low <= high and min(taken["host"], taken["compile"]) > 0
    assert "{on-v5e}" in (ROOT / "book/status.md").read_text()


def test_a_time_on_a_v5e_has_an_interval_that_no_roofline_and_no_cycle_leaves():
    row = {"target": "tpu-v5e", "times": 10, "flops": 1.0, "bytes": 819e6}
    low, high = fits.seconds(row | {"cycles": 1e6})
    assert low >= 10e-3 * (1 - 1e-6) and low < high  # 1 ms of bytes, ten times
    slow, slower = fits.seconds(row | {"cycles": 1e12})  # a scan of short steps
    assert slower > 10 * 1e12 / fits.CLOCK > slow > low


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="it patches the pinned jax")
def test_all_that_a_device_was_given_is_compiled_for_a_v5e(monkeypatch, tmp_path):
    monkeypatch.setattr(fits, "PATH", tmp_path / "fits.json")
    monkeypatch.setattr(fits, "heard", [])
    from jax._src.interpreters import pxla

    lower = pxla.lower_sharding_computation
    monkeypatch.setattr(pxla, "lower_sharding_computation", lower)  # put back
    x = jnp.ones((4, 4))
    fits.listen(jax.devices()[0])
    jax.jit(lambda x: x @ x + 17)(x)
    with notebook.enable_x64(True):
        jax.jit(lambda: jnp.zeros((3, 1000), jnp.float64))()
    fits.compile_heard("99_page")
    (row,) = json.loads(fits.PATH.read_text())["rows"]
    assert (row["chapter"], row["programs"]) == ("99", 2)
    assert sum(row["memory"].values()) >= 3 * 1000 * 8 and "libtpu" in row["versions"]


def test_two_compilers_are_compared_on_the_same_programs():
    rows = json.loads((ROOT / "book/results/versions.json").read_text())["rows"]
    made = {}
    for row in rows:
        made.setdefault(row["versions"]["jax"], set()).add((row["name"], row["target"]))
    old, new = made.values()
    assert old == new and len(old) > 30
    assert {target for _, target in old} == {"cpu", "l40s", "tpu-v6e"}


def test_the_libtpu_that_is_pinned_is_not_refused():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu")
    (device, *_) = targets.tpu_slice("v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    assert np.prod(device.coords) == 0
