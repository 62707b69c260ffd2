"""Types: the package is clean to mypy and pyright, and so is a user's program; a user's mistakes are not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USER = ROOT / "tests" / "typed" / "user.py"
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)
MISTAKES = [n for n, line in enumerate(USER.read_text().splitlines(), 1) if line.endswith("# error")]


def _mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    pytest.importorskip("torch", reason="its types are checked against")
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def _pyright(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pyright")
    pytest.importorskip("torch", reason="its types are checked against")
    if shutil.which("node") is None and shutil.which("pyright") is None:
        pytest.skip("pyright needs node")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_package_is_clean_to_mypy():
    done = _mypy()
    assert done.returncode == 0, done.stdout


def test_the_package_is_clean_to_pyright():
    done = _pyright()
    assert done.returncode == 0, done.stdout


def test_a_users_program_in_mypy():
    done = _mypy("--strict", str(USER))
    lines = [int(n) for n in re.findall(r"user\.py:(\d+): error:", done.stdout)]
    assert sorted(set(lines)) == MISTAKES, done.stdout


def test_a_users_program_in_pyright():
    done = _pyright("--outputjson", str(USER))
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = [d["range"]["start"]["line"] + 1 for d in found if d["severity"] == "error"]
    assert sorted(set(lines)) == MISTAKES, found
