"""The examples, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch_devices import DEVICES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "data" / "relu-lm"


def _run(*arguments: str, fails: bool = False) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done


def _generate(*arguments: str):
    """`examples/generate.py` in this process."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "examples" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return CliRunner().invoke(module.main, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_generate_streams_the_same_text_patched_and_dense(device):
    given = ("examples/generate.py", "--model", str(SMALL), "--prompt", "def parse_args(", "--max-new-tokens", "60")
    given += ("--dtype", "float32", "--device", device)
    sparse, dense = _run(*given), _run(*given, "--dense")
    assert sparse.stdout == dense.stdout and sparse.stdout.startswith("def parse_args(")
    assert "4 of 4 gated MLPs decode sparsely" in sparse.stderr and "gated MLPs" not in dense.stderr
    for done, how in ((sparse, "sparse"), (dense, "dense")):
        *_, last = done.stderr.strip().splitlines()
        assert last.startswith("60 tokens, ") and f"({how}, float32, {device}), sparsity 9" in last


def test_generate_says_what_is_wrong(tmp_path):
    assert "Error" in _run("examples/generate.py", "--model", str(tmp_path), "--prompt", "x", fails=True).stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(SMALL / name)
    config = {**json.loads((SMALL / "config.json").read_text()), "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = _run("examples/generate.py", "--model", str(tmp_path), "--prompt", "x", "--device", "cpu", fails=True)
    assert (
        "the config says hidden_act='silu': gated FFNs with relu or fatrelu" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--prompt", "x", "--max-new-tokens", "0"), "'--max-new-tokens': 0 is not in the range x>=1"),
        (("--prompt", ""), "Error: the prompt has no tokens"),
        (("--prompt", "x", "--device", "nonsense"), "Error: "),
        pytest.param(
            ("--prompt", "x", "--device", "cuda"),
            "Error: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the device is not missing here"),
        ),
        (("--prompt", "x", "--device", "cuda:99"), "Error: "),
    ],
)
def test_generate_has_no_traceback_for(given, message):
    done = _generate("--model", str(SMALL), "--device", "cpu", *given)
    assert done.exit_code and isinstance(done.exception, SystemExit) and message in done.output


def test_generate_from_a_file_cut_short(tmp_path):
    for file in SMALL.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:4000] if file.suffix == ".safetensors" else content)
    done = _generate("--model", str(tmp_path), "--prompt", "x", "--device", "cpu")
    assert done.exit_code and isinstance(done.exception, SystemExit) and "Error: " in done.output


def test_training_makes_a_folder_that_loads(tmp_path):
    given = ("--steps", "4", "--batch", "2", "--length", "64", "--device", "cpu")
    done = _run("examples/train_relu_lm.py", str(tmp_path), *given)
    assert "bits a byte" in done.stdout
    facts = json.loads((tmp_path / "training.json").read_text())
    assert 0 < facts["sparsity"] < 1 and facts["held_out_bits_per_byte"] > 2 and len(facts["sparsity_by_layer"]) == 4
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in SMALL.iterdir()} - {"README.md"}
    done = _run("examples/generate.py", "--model", str(tmp_path), "--prompt", "a", "--max-new-tokens", "3", "--device", "cpu")
    assert "3 tokens" in done.stderr
