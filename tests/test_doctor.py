"""The doctor: what it sees, and each known mismatch with the command that fixes it."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import prosparse_cupy
from prosparse_cupy import cli
from prosparse_cupy.cli import doctor

H100 = doctor.GpuFact("NVIDIA H100", 90)
HEALTHY = doctor.Facts(
    cupy_wheels={"cupy-cuda12x": "14.2.0"},
    nvrtc=(12, 9),
    nvrtc_path="libnvrtc.so.12",
    headers=(12, 9),
    headers_path="include",
    runtime=(12, 9),
    driver=(12, 8),
    gpus=(H100,),
    cache="cache",
)


def _with(**changes) -> doctor.Facts:
    return doctor.Facts(**{**{name: getattr(HEALTHY, name) for name in HEALTHY.__dataclass_fields__}, **changes})


def test_a_healthy_environment_has_no_problem():
    assert doctor.diagnose(HEALTHY) == []
    assert doctor.diagnose(_with(driver=(13, 0), torch="2.11.0", torch_cuda="13.0", nvrtc=(13, 0))) == []


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"cupy_wheels": {}}, "CuPy is not installed", 'pip install "prosparse-cupy[cuda12x]"'),
        ({"cupy_wheels": {}, "driver": (13, 0)}, "CuPy is not installed", 'pip install "prosparse-cupy[cuda13x]"'),
        ({"cupy_wheels": {}, "driver": None, "torch": "2.11.0", "torch_cuda": "13.0"}, "CuPy is not installed", "[cuda13x]"),
        ({"cupy_wheels": {}, "driver": (13, 0), "torch": "2.9.0", "torch_cuda": "12.8"}, "CuPy is not installed", "[cuda12x]"),
        ({"cupy_wheels": {}, "driver": (12, 8), "torch": "2.11.0", "torch_cuda": "13.0"}, "CuPy is not installed", "[cuda12x]"),
        ({"cupy_wheels": {}, "driver": None, "torch": "2.11.0+cpu"}, "CuPy is not installed", "[cuda12x]"),
        (
            {"cupy_wheels": {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}},
            "two CuPy wheels",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "prosparse-cupy[cuda12x]"',
        ),
        (
            {"cupy_error": "ImportError: libcuda"},
            "CuPy cannot be imported: ImportError",
            "pip install --force-reinstall cupy-cuda12x",
        ),
        (
            {"nvrtc": None, "nvrtc_error": "libnvrtc not found"},
            "NVRTC, the run-time compiler, is missing: libnvrtc not found",
            'pip install "cuda-toolkit[cudart,nvrtc]==12.*"',
        ),
        ({"headers_path": "", "headers": None}, "CUDA headers", 'pip install "cuda-toolkit[cudart,nvrtc]==12.*"'),
        (
            {"nvrtc": (13, 0)},
            "NVRTC 13.0 is newer than the driver's CUDA 12.8",
            'pip install --force-reinstall "cuda-toolkit[cudart,nvrtc]==12.*"',
        ),
        (
            {"nvrtc": (13, 0), "torch": "2.11.0", "torch_cuda": "13.0"},
            "NVRTC 13.0 is newer",
            "pip uninstall -y torch nvidia-cuda-nvrtc",
        ),
        (
            {"cupy_wheels": {"cupy-cuda13x": "14.2.0"}, "runtime": (13, 0)},
            "CuPy is built for CUDA 13.0, the driver supports 12.8",
            'pip uninstall -y cupy-cuda13x && pip install "prosparse-cupy[cuda12x]"',
        ),
        (
            {"gpus": (doctor.GpuFact("RTX 5090", 120),), "nvrtc": (12, 6)},
            "NVRTC 12.6 does not know RTX 5090 (sm_120)",
            'pip install "cuda-toolkit[cudart,nvrtc]==12.*"',
        ),
        ({"gpus": (doctor.GpuFact("Tesla T4", 75),)}, "no GPU of compute capability 8.0 or later: Tesla T4 (sm_75)", "Ampere"),
        ({"gpus": (), "gpu_error": "no driver"}, "no CUDA GPU: no driver", "nvidia-smi"),
        ({"cache_error": "Permission denied"}, "kernel cache cache is not writable (Permission denied)", "CUPY_CACHE_DIR"),
    ],
)
def test_each_mismatch_is_flagged_with_its_fix(changes, what, fix):
    (problem,) = doctor.diagnose(_with(**changes))
    assert what in problem.what and fix in problem.fix


def test_doctor_command(monkeypatch):
    monkeypatch.setattr(doctor, "collect", lambda: HEALTHY)
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == 0 and "all good" in done.output and "NVIDIA H100 (sm_90)" in done.output
    monkeypatch.setattr(doctor, "collect", lambda: _with(cache_error="Permission denied"))
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == 1 and "problem" in done.output and "CUPY_CACHE_DIR" in done.output
    done = CliRunner().invoke(cli.main, ["doctor", "--json"])
    found = json.loads(done.output)
    assert done.exit_code == 1 and found["nvrtc"] == [12, 9] and "CUPY_CACHE_DIR" in found["problems"][0]["fix"]


def test_doctor_looks_at_this_environment(monkeypatch, tmp_path):
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "new" / "cache"))
    facts = doctor.collect()
    assert facts.cupy_wheels and all(re.match(r"\d+\.\d+", v) for v in facts.cupy_wheels.values())
    assert facts.nvrtc is not None and facts.nvrtc >= (12, 0) and "libnvrtc" in facts.nvrtc_path
    assert facts.headers is not None and facts.headers_path
    assert (facts.version, facts.python) == (prosparse_cupy.__version__, platform.python_version())
    assert facts.system.startswith("Linux")
    lines = dict(doctor.describe(facts))
    assert (lines["prosparse-cupy"], lines["Python"]) == (facts.version, facts.python) and lines["system"] == facts.system
    assert (facts.cache, facts.cache_error) == (str(tmp_path / "new" / "cache"), "")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    assert doctor.collect().cache_error


def test_doctor_beside_half_a_torch_and_without_a_home(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(Path, "mkdir", lambda self, **_: None)
    facts = doctor.collect()
    assert facts.torch == "" and facts.cache == "~/.cupy/kernel_cache" and facts.cache_error


def test_doctor_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(doctor, "_wheels", dict)
    facts = doctor.collect()
    assert facts.cupy_error
    assert [p.what for p in doctor.diagnose(facts) if "CuPy" in p.what] == ["CuPy is not installed: NumPy arrays only"]
