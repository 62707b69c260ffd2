"""The examples, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason='the extra "torch" brings it')
pytest.importorskip("transformers", reason='the extra "hf" brings it')

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "data" / "relu-lm"


def _run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_training_makes_a_folder_that_loads(tmp_path):
    given = ("--steps", "4", "--batch", "2", "--length", "64", "--device", "cpu")
    done = _run("examples/train_relu_lm.py", str(tmp_path), *given)
    assert "bits a byte" in done.stdout
    facts = json.loads((tmp_path / "training.json").read_text())
    assert 0 < facts["sparsity"] < 1 and facts["held_out_bits_per_byte"] > 2 and len(facts["sparsity_by_layer"]) == 4
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in SMALL.iterdir()} - {"README.md"}
    given = ("--model", str(tmp_path), "--prompt", "a", "--max-new-tokens", "3", "--device", "cpu")
    done = _run("-m", "prosparse_cupy", "generate", *given)
    assert "3 tokens" in done.stderr
