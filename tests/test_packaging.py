"""The wheel, the sdist and an editable install: each finds the kernels, and none installs a top-level `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADERS = {
    "activation",
    "bf12",
    "bias",
    "elements",
    "memory",
    "mma",
    "peers",
    "plain",
    "programmatic",
    "row_dot",
    "warp",
    "weights",
}
KERNELS = {
    *(f"{name}.cuh" for name in HEADERS),
    "all_reduce.cu",
    "attend.cu",
    "ffn_1.cu",
    "ffn_12_kept.cu",
    "ffn_123_kept.cu",
    "ffn_1_kept.cu",
    "ffn_1_mma.cu",
    "kept.cuh",
    "ffn_12.cu",
    "ffn_123.cu",
    "ffn_23.cu",
    "ffn_4.cu",
    "ffn_4_mma.cu",
    "pack_down.cu",
    "decompress.cu",
}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def _run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel, built from the sdist as `build` does, and the sdist."""
    pytest.importorskip("build", reason="the `test` extra brings build and hatchling")
    pytest.importorskip("hatchling", reason="the `test` extra brings build and hatchling")
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_kernels_are_in_the_tree():
    assert {path.name for path in (ROOT / "kernels").iterdir()} == KERNELS


def test_wheel_has_the_kernels_inside_the_package(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    assert {f"prosparse_cupy/kernels/{name}" for name in KERNELS} <= names
    assert "prosparse_cupy/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prosparse_cupy"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)


def test_wheel_tells_vllm_of_its_plugin(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(name).decode()
    assert "[vllm.general_plugins]\nprosparse = prosparse_cupy.engines.vllm:register\n" in f"{text}\n"


def test_sdist_has_what_a_build_and_the_tests_need(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    wanted = {f"kernels/{name}" for name in KERNELS} | {"pyproject.toml", "README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"}
    assert wanted | {"tests/conftest.py", "tests/host_cuda/host_cuda.h", "prosparse_cupy/ops.py"} <= names


def _found_kernels(path: Path, workdir: Path) -> Path:
    """Where a Python that sees the package at `path` finds the kernels, from a folder that is not the checkout."""
    code = (
        "from prosparse_cupy.compiler import kernel_folder, source; print(kernel_folder()); assert 'ffn_4' in source('ffn_4')"
    )
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return Path(_run(sys.executable, "-c", code, cwd=workdir, env=environment).strip())


def test_an_installed_wheel_finds_its_kernels(built, tmp_path):
    _run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
        str(built[0]),
    )
    assert _found_kernels(tmp_path / "site", tmp_path) == tmp_path / "site" / "prosparse_cupy" / "kernels"
    assert not (tmp_path / "site" / "kernels").exists()


def test_an_installed_sdist_finds_its_kernels(built, tmp_path):
    options = ("-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(tmp_path / "site"))
    _run(sys.executable, "-m", "pip", "install", *options, str(built[1]))
    assert _found_kernels(tmp_path / "site", tmp_path) == tmp_path / "site" / "prosparse_cupy" / "kernels"


def test_an_editable_install_finds_the_checkouts_kernels(tmp_path):
    pytest.importorskip("editables", reason="the `test` extra brings it")
    options = ("-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--prefix", str(tmp_path / "env"))
    _run(sys.executable, "-m", "pip", "install", *options, "-e", str(ROOT))
    (site,) = (tmp_path / "env").rglob("site-packages")
    # -S leaves out the environment's own packages; the editable install's come first, then those with NumPy.
    code = (
        f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({str(Path(np.__file__).parent.parent)!r})\n"
        "import prosparse_cupy; from prosparse_cupy.compiler import kernel_folder\n"
        "print(prosparse_cupy.__file__); print(kernel_folder())"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    lines = _run(sys.executable, "-S", "-c", code, cwd=tmp_path, env=clean).splitlines()
    assert [Path(line) for line in lines] == [ROOT / "prosparse_cupy" / "__init__.py", ROOT / "kernels"]


def test_a_broken_installation_says_so(monkeypatch, tmp_path):
    from prosparse_cupy import compiler

    monkeypatch.setattr(compiler, "_PACKAGE", tmp_path / "prosparse_cupy")
    with pytest.raises(FileNotFoundError, match=r"no kernels found in .*reinstall prosparse-cupy"):
        compiler.kernel_folder()
