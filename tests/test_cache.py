"""CuPy's kernel cache where its folder cannot be made or written: kernels compile all the same, and one warning says why."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from plans import Shape, plan_of

from prosparse_cupy import compiler, device

pytest.importorskip("cupy", reason="it is CuPy's cache")


def _python(code: str, folder) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUPY_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("CUPY_CACHE_IN_MEMORY", None)
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], env=environment, capture_output=True, text=True, check=False
    )


IMPORT = """
import os
from prosparse_cupy import device
folder = os.environ["CUPY_CACHE_DIR"]
for _ in range(2):
    device.cupy()
assert os.environ["CUPY_CACHE_DIR"] == folder
print(os.environ.get("CUPY_CACHE_IN_MEMORY"))
"""


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = _python(IMPORT, tmp_path / "file" / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
    assert done.stderr.count("RuntimeWarning: prosparse_cupy: CuPy's kernel cache") == 1
    assert "cannot be written (Not a directory): every process compiles" in done.stderr


def test_a_folder_that_can_be_made(tmp_path):
    done = _python(IMPORT, tmp_path / "new" / "cache")
    assert done.returncode == 0 and done.stdout.split() == ["None"] and "RuntimeWarning" not in done.stderr
    assert (tmp_path / "new" / "cache").is_dir()


def test_a_folder_that_stops_to_work(monkeypatch):
    """A full disk, say: what was compiled is not lost for it."""
    tries = []

    def raw_module(code, options):
        tries.append(os.environ.get("CUPY_CACHE_IN_MEMORY"))
        if tries[-1] is None:
            raise OSError(28, "No space left on device")
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=name))

    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setattr(device.cupy(), "RawModule", raw_module)
    monkeypatch.setattr(device.cupy().cuda, "Device", _Anywhere)
    plan = plan_of("ffn_4", Shape(64, 64, "bfloat16"))
    with pytest.warns(RuntimeWarning, match="could not be used .*No space left.*: every process compiles"):
        assert compiler._compile(plan, 0) == "ffn_4"
    assert tries == [None, "1"]
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY")


class _Anywhere:
    """A GPU to be on."""

    def __init__(self, index: int) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error) -> None: ...


RUN = """
import numpy as np, cupy as cp
import prosparse_cupy as psc
w = cp.ones((8, 64), np.float32)
assert psc.sparse_ffn(cp.ones(64, np.float32), w, w, w).shape == (64,)
print("ran")
"""


@pytest.mark.gpu
def test_operators_run_without_a_cache(tmp_path):
    (tmp_path / "file").write_text("")
    torch_like = "import prosparse_cupy.device as g; g.cupy()\n" + RUN  # CuPy imported by us, as for users of torch
    done = _python(torch_like, tmp_path / "file" / "cache")
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
